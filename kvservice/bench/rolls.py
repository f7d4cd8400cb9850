"""What callers see of a roll: gateways restarted one after the other, and workers replaced, under load.

Starts nothing: the caller gives processes that can be stopped and started again. Callers use the client library as it
comes, with its own retries, and every gateway's address; each gateway is the first of some callers'.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from kvservice.bench.rounds import Rounds, RoundsLoad, RoundsReport
from kvservice.client import Client, RetryPolicy
from kvservice.errors import Unavailable

POLL_S = 0.1
FOUND_TIMEOUT_S = 60.0


class Part(Protocol):
    """A process of the service, as `client.LocalService` is one."""

    @property
    def address(self) -> str:
        """Where it serves, once started."""

    async def start(self) -> str:
        """Starts it, and waits until it serves."""

    async def stop(self) -> int:
        """SIGTERM: it drains. Gives its exit code once it has ended."""


@dataclass(frozen=True, slots=True)
class RollFigures:
    """What a roll cost.

    Attributes:
        gateways: restarts.
        workers: replacements.
        seconds: of the whole roll.
        slowest_gateway_s: to end, drain included, and to serve again.
        slowest_worker_s: of one: until its successor was found, and until it had drained and ended.
        bad_exits: processes that ended with another exit code than 0.
        answers: that came to their end.
        failed: calls that ended with a status after the library's own retries, by status and reason.
        wrong: answers with another token than before the roll.
        lost_turns: see RoundsReport.
        made_again: calls that the library made again.
        recomputed_tokens: whose KV was computed again.
    """

    gateways: int
    workers: int
    seconds: float
    slowest_gateway_s: float
    slowest_worker_s: float
    bad_exits: int
    answers: int
    failed: dict[str, int]
    wrong: int
    lost_turns: int
    made_again: int
    recomputed_tokens: int


async def measure_rolls(
    gateways: Sequence[Part],
    workers: Sequence[Part],
    new_worker: Callable[[], Part],
    load: RoundsLoad,
    *,
    rolls: int,
    report: Callable[[], None],
) -> RollFigures:
    """Rolls all gateways and all workers, each `rolls` times, while callers hold conversations.

    Args:
        gateways: that serve, on ports of their own that they keep.
        workers: that serve; each is stopped once its successor has been found.
        new_worker: one that hasn't been started. The last ones are left running.
        load: of all callers together.
        rolls: how often.
        report: called after each restart or replacement.

    Raises:
        Unavailable: a part didn't come.
    """
    again = Retries()
    async with Client(gateways[0].address) as client:
        await _found(client, len(workers))
        vocab_size = (await client.list_models())[0].shape.vocab_size
    callers = _callers([gateway.address for gateway in gateways], load, vocab_size, again)
    await asyncio.gather(*(each.rehearse() for each in callers))
    again.count = 0
    roll = _Roll(gateways, list(workers), new_worker, report)
    started = time.perf_counter()
    async with _running(callers) as end:
        for _ in range(rolls):
            await roll.gateways()
            await roll.workers()
        seconds = time.perf_counter() - started
        reports = await end()
    return RollFigures(
        gateways=len(roll.gateway_s),
        workers=len(roll.worker_s),
        seconds=seconds,
        slowest_gateway_s=max(roll.gateway_s),
        slowest_worker_s=max(roll.worker_s),
        bad_exits=roll.bad_exits,
        answers=sum(each.answers for each in reports),
        failed=dict(sum((each.refusals for each in reports), Counter[str]())),
        wrong=sum(each.wrong for each in reports),
        lost_turns=sum(each.lost_turns for each in reports),
        made_again=again.count,
        recomputed_tokens=sum(each.recomputed_tokens for each in reports),
    )


class Retries:
    """Counts how often the library waits before it makes a call again."""

    def __init__(self) -> None:
        self.count = 0

    def policy(self) -> RetryPolicy:
        """The library's own, but that it is counted."""
        return RetryPolicy(sleep=self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.count += 1
        await asyncio.sleep(seconds)


class _Roll:
    """One part after the other. `gateway_s` and `worker_s`: seconds of each."""

    def __init__(
        self, gateways: Sequence[Part], workers: list[Part], new_worker: Callable[[], Part], report: Callable[[], None]
    ) -> None:
        self.gateway_s: list[float] = []
        self.worker_s: list[float] = []
        self.bad_exits = 0
        self._gateways = gateways
        self._workers = workers
        self._new_worker = new_worker
        self._report = report

    async def gateways(self) -> None:
        for gateway in self._gateways:
            started = time.perf_counter()
            self.bad_exits += await gateway.stop() != 0
            await gateway.start()
            async with Client(gateway.address) as client:
                await _found(client, len(self._workers))
            self.gateway_s.append(time.perf_counter() - started)
            self._report()

    async def workers(self) -> None:
        for _ in range(len(self._workers)):
            started = time.perf_counter()
            successor = self._new_worker()
            await successor.start()
            self._workers.append(successor)
            # All gateways: one that doesn't know it yet would have nobody to go to once the old one drains.
            for gateway in self._gateways:
                async with Client(gateway.address) as client:
                    await _found(client, len(self._workers))
            self.bad_exits += await self._workers.pop(0).stop() != 0
            self.worker_s.append(time.perf_counter() - started)
            self._report()


def _callers(addresses: Sequence[str], load: RoundsLoad, vocab_size: int, again: Retries) -> list[Rounds]:
    """Callers for each gateway, who know the others too and go to them when theirs is away."""
    found = []
    for index in range(len(addresses)):
        in_order = [*addresses[index:], *addresses[:index]]
        share = len(range(index, load.callers, len(addresses)))
        if share:
            own = replace(load, callers=share, seed=load.seed + index)
            found.append(Rounds(f"ipv4:{','.join(in_order)}", own, vocab_size, again.policy()))
    return found


async def _found(client: Client, num_workers: int) -> None:
    """Returns once that gateway knows so many workers.

    Raises:
        Unavailable: it doesn't.
    """
    try:
        async with asyncio.timeout(FOUND_TIMEOUT_S):
            while True:
                if len((await client.stats()).workers) >= num_workers:
                    break
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise Unavailable(f"a gateway doesn't find {num_workers} workers within {FOUND_TIMEOUT_S:g} s") from None


@asynccontextmanager
async def _running(callers: Sequence[Rounds]) -> AsyncIterator[Callable[[], Awaitable[list[RoundsReport]]]]:
    """Runs the callers; what is given ends them and awaits their reports."""
    until = asyncio.Event()
    tasks = [asyncio.create_task(each.run(until), name="rounds") for each in callers]

    async def end() -> list[RoundsReport]:
        until.set()
        return await asyncio.gather(*tasks)

    try:
        yield end
    finally:
        until.set()
        await asyncio.gather(*tasks, return_exceptions=True)
