"""Thousands of short sessions that are cancelled, cut off, forked, moved, closed and left to expire: is anything left?

callers ─► create ─► append ─► ask | cancel | disconnect | fork | move | truncate ─► close | purge | leave alone
afterwards: no session, call, block, byte, lease or key; and the processes' descriptors and threads are what they were
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from kvservice.client import Client, ServiceStats, Tokens
from kvservice.drill.deployment import TENANT, Deployment
from kvservice.drill.servers import DrillServer
from kvservice.drill.stillness import Stillness
from kvservice.errors import Conflict, KVServiceError, NotFound, Overloaded

T = TypeVar("T")

CALLERS = 8
WARM_UP = 1000
"""Sessions before the first count of descriptors and threads: pools fill, and modules are loaded on first use."""
SAMPLE_S = 2.0
TTL_S = 100.0
"""Longer than any is used, and short enough to see what a call leaves that its caller no longer waits for."""
SHORT_TTL_S = 3.0
DRAIN_S = 150.0
"""Longer than stored KV lives that nobody renews."""
SLACK_FILES = 44
"""That a process may have more than after the warm-up: its pools of connections to `state` (32, 8 and 4 at most) grow
with the most calls that ever came at once, and don't shrink."""
SLACK_THREADS = 4
SLACK_RSS_BYTES = 24 << 20
"""That a process's memory may grow by in the second half of all sessions: allocators keep what they may need again."""
SESSION_S = 60.0
BUSY_PAUSE_S = 0.02
REQUEST_MEMORY_S = 30.0
"""How long outcomes are kept for repeats; they are bytes too, and must be gone in the end."""
DOCUMENT_TOKENS = (20, 60, 200, 500, 900)
"""The last two are longer than the window: what is left of it goes to the tier, and is recalled."""
LASTING = ("fleet", "ledger", "rate", "rates", "usage")
"""Kinds of keys in `state` that are no session's: workers, names of tenants, their rates, and what they have used,
which is kept for a month."""
SCRUBBER = "kvs:{session:kv-scrubber}:lock"
"""Which worker looks after all stored KV: always there."""

_PURGES = (True, False)


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """One look at one process."""

    files: int
    threads: int
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class ChurnSample:
    """One look at all of them.

    Attributes:
        sessions: begun so far.
        held_sessions: by workers.
        held_bytes: of KV, on devices and in host memory.
        state_keys: in the state server.
        kv_keys: in the kv server.
    """

    time_s: float
    sessions: int
    processes: Mapping[str, ProcessSample]
    held_sessions: int
    held_bytes: int
    state_keys: int
    kv_keys: int


@dataclass(frozen=True, slots=True)
class ChurnReport:
    """What came of it.

    Attributes:
        sessions: that were begun.
        actions: what was done, by name.
        errors: what calls failed with, by status and reason.
        findings: sentences; empty: nothing is left, and nothing unexpected came.
    """

    sessions: int
    seconds: float
    actions: Mapping[str, int]
    errors: Mapping[str, int]
    samples: tuple[ChurnSample, ...]
    findings: tuple[str, ...] = field(default=())


class Churn:
    """Puts callers on a deployment.

    Args:
        deployment: whole; its sessions may live as short as `SHORT_TTL_S`, its outcomes `REQUEST_MEMORY_S`.
        recipe: of the sessions.
    """

    def __init__(self, deployment: Deployment, recipe: str) -> None:
        self._deployment = deployment
        self._recipe = recipe
        self._rng = random.Random(deployment.config.seed)
        self._begun = 0
        self._actions: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._samples: list[ChurnSample] = []
        self._findings: list[str] = []

    async def run(self, sessions: int, report: Callable[[int], None]) -> ChurnReport:
        """So many sessions, then a look at what is left. Takes about a minute more than the sessions."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        await self._callers(min(WARM_UP, sessions // 2), report)
        before = self._look()
        sampling = asyncio.create_task(self._sample(started))
        try:
            await self._callers(sessions, report)
            await self._until_empty()
        finally:
            sampling.cancel()
            await asyncio.gather(sampling, return_exceptions=True)
        await self._take_sample(started)
        self._compare(before, self._look())
        return ChurnReport(
            self._begun,
            loop.time() - started,
            dict(self._actions),
            dict(self._errors),
            tuple(self._samples),
            tuple(self._findings),
        )

    async def _callers(self, sessions: int, report: Callable[[int], None]) -> None:
        async def caller(client: Client) -> None:
            while self._begun < sessions:
                self._begun += 1
                report(self._begun)
                made: list[str] = []
                async with Stillness() as still:
                    try:
                        async with asyncio.timeout(SESSION_S):
                            await self._session(client, made)
                    except (KVServiceError, TimeoutError) as error:
                        self._note(error, is_fair=still.is_long or isinstance(error, Overloaded))
                # Whatever it was that failed, what is left of it would be the caller's doing.
                for session in made:
                    with suppress(NotFound):
                        await self._patiently(partial(client.close_session, session, purge=True))

        clients = list(self._deployment.clients.values())
        await asyncio.gather(*(caller(clients[index % len(clients)]) for index in range(CALLERS)))

    def _note(self, error: KVServiceError | TimeoutError, *, is_fair: bool) -> None:
        """Counts it. One that isn't fair, as when the machine stood still, is a finding."""
        words = f"{error.status} {error.reason}" if isinstance(error, KVServiceError) else "hung"
        words += " (fair)" if is_fair else ""
        if not is_fair and not self._errors[words]:
            self._findings.append(f"{words}: {error}"[:300])
        self._errors[words] += 1

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """A call on a session that another, cut short a moment ago, may still hold."""
        while True:
            try:
                return await call()
            except Conflict as error:
                if error.reason != "session_busy":
                    raise
                self._actions["wait for one that was cut"] += 1
            await asyncio.sleep(BUSY_PAUSE_S)

    async def _session(self, client: Client, made: list[str]) -> None:
        """One session's life; `made` has those that are still to be closed."""
        rng = self._rng
        leave = rng.random() < 0.2
        created = await client.create_session(recipe=self._recipe, ttl_s=SHORT_TTL_S if leave else TTL_S)
        session = created.session_id
        made.append(session)
        try:
            await client.append(session, self._text(rng.choice(DOCUMENT_TOKENS)))
            for _ in range(rng.randint(1, 2)):
                await self._act(client, session, made)
        except NotFound:
            if not leave:
                raise
            # Its time was up before all was done: on a slow machine that may be.
            self._actions["expired in use"] += 1
            made.clear()
            return
        if leave:
            self._actions["left to expire"] += 1
        else:
            purge = rng.random() < 0.5
            self._actions["purge" if purge else "close"] += 1
            await self._patiently(partial(client.close_session, session, purge=purge))
        made.remove(session)

    async def _act(self, client: Client, session: str, made: list[str]) -> None:
        action = self._rng.choice(("ask", "ask", "cancel", "disconnect", "cancel_append", "fork", "move", "truncate"))
        self._actions[action] += 1
        await getattr(self, f"_{action}")(client, session, made)

    async def _ask(self, client: Client, session: str, made: list[str]) -> None:
        del made
        new_tokens = self._rng.randint(1, 8)
        await self._patiently(lambda: client.ask(session, "why? ", max_new_tokens=new_tokens, ignore_eos=True))

    async def _cancel(self, client: Client, session: str, made: list[str]) -> None:
        del made

        async def call() -> None:
            async with aclosing(client.generate(session, "go on ", max_new_tokens=64, ignore_eos=True)) as events:
                async for event in events:
                    if isinstance(event, Tokens):
                        return

        await self._patiently(call)

    async def _disconnect(self, client: Client, session: str, made: list[str]) -> None:
        del client, made

        async def call() -> None:
            gone = self._deployment.new_client()
            events = gone.generate(session, "go on ", max_new_tokens=64, ignore_eos=True)
            async with gone, aclosing(events):
                async for event in events:
                    if isinstance(event, Tokens):
                        # The connection goes first, and the call with it.
                        await gone.aclose()
                        return

        await self._patiently(call)

    async def _cancel_append(self, client: Client, session: str, made: list[str]) -> None:
        del made
        reading = asyncio.create_task(client.append(session, self._text(400)))
        await asyncio.sleep(self._rng.uniform(0.0, 0.05))
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    async def _fork(self, client: Client, session: str, made: list[str]) -> None:
        fork = (await self._patiently(partial(client.fork_session, session))).session_id
        made.append(fork)
        await self._ask(client, fork, made)
        await self._patiently(partial(client.close_session, fork, purge=self._rng.choice(_PURGES)))
        made.remove(fork)

    async def _move(self, client: Client, session: str, made: list[str]) -> None:
        await self._patiently(partial(client.move_session, session))
        await self._ask(client, session, made)

    async def _truncate(self, client: Client, session: str, made: list[str]) -> None:
        del made
        held = (await client.get(session)).num_tokens
        await self._patiently(partial(client.truncate_session, session, held // 2))

    async def _until_empty(self) -> None:
        """Waits until nothing is left; what is left after `DRAIN_S` is a finding."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + DRAIN_S
        while left := await self._left():
            if loop.time() > give_up:
                self._findings.append(f"left after {DRAIN_S:.0f} s: {', '.join(left)}")
                return
            await asyncio.sleep(SAMPLE_S)

    async def _left(self) -> list[str]:
        client = self._deployment.client
        left = _held(await client.stats())
        found = await client.verify(TENANT)
        left += [f"{found.own_frames} frames"] if found.own_frames else []
        stored = found.stored_bytes + found.reserved_bytes
        left += [f"{stored} bytes charged or reserved"] if stored else []
        left += [f"{len(found.session_ids)} sessions with something of them"] if found.session_ids else []
        kinds = await key_kinds(self._deployment.kv)
        left += [f"{count} keys of {kind} in kv" for kind, count in kinds.items()]
        kinds = await key_kinds(self._deployment.state)
        kinds["session"] -= await self._deployment.state.command("EXISTS", SCRUBBER)
        return left + [f"{num} keys of {kind} in state" for kind, num in kinds.items() if num and kind not in LASTING]

    def _compare(self, before: Mapping[str, ProcessSample], after: Mapping[str, ProcessSample]) -> None:
        for name, then in before.items():
            now = after[name]
            # A server has the connections of all processes.
            is_server = name in (self._deployment.kv.name, self._deployment.state.name)
            if now.files > then.files + SLACK_FILES * (len(self._deployment.processes) if is_server else 1):
                self._findings.append(f"{name} has {now.files} descriptors, {then.files} after the warm-up")
            if now.threads > then.threads + SLACK_THREADS:
                self._findings.append(f"{name} has {now.threads} threads, {then.threads} after the warm-up")
        middle = next((each for each in self._samples if each.sessions > self._begun // 2), None)
        for name, then in middle.processes.items() if middle is not None else ():
            grown = after[name].rss_bytes - then.rss_bytes
            if grown > SLACK_RSS_BYTES:
                self._findings.append(f"{name} grew by {grown >> 20} MiB in the second half")

    async def _sample(self, started: float) -> None:
        while True:
            with suppress(KVServiceError):
                await self._take_sample(started)
            await asyncio.sleep(SAMPLE_S)

    async def _take_sample(self, started: float) -> None:
        stats = await self._deployment.client.stats()
        held = (each.device_capacity_bytes - each.device_free_bytes for each in stats.workers)
        in_host = (each.host_capacity_bytes - each.host_free_bytes for each in stats.workers)
        sample = ChurnSample(
            asyncio.get_running_loop().time() - started,
            self._begun,
            self._look(),
            sum(each.resident_sessions for each in stats.workers),
            sum(held) + sum(in_host),
            int(await self._deployment.state.command("DBSIZE")),
            int(await self._deployment.kv.command("DBSIZE")),
        )
        self._samples.append(sample)

    def _look(self) -> dict[str, ProcessSample]:
        pids = {name: process.pid for name, process in self._deployment.processes.items()}
        pids |= {server.name: server.pid for server in (self._deployment.kv, self._deployment.state)}
        return {name: read_process(pid) for name, pid in pids.items()}

    def _text(self, num_tokens: int) -> str:
        return "".join(self._rng.choice("abcdefghij klmnop.\n") for _ in range(num_tokens))


def _held(stats: ServiceStats) -> list[str]:
    """What workers still hold, and calls that still run."""
    left = [f"{stats.running_calls} calls run"] if stats.running_calls else []
    for worker in stats.workers:
        amounts = {
            "sessions": worker.resident_sessions,
            "calls": worker.running_calls,
            "device bytes": worker.device_capacity_bytes - worker.device_free_bytes,
            "host bytes": worker.host_capacity_bytes - worker.host_free_bytes,
        }
        left += [f"worker {worker.worker_id}: {amount} {name}" for name, amount in amounts.items() if amount]
    return left


async def key_kinds(server: DrillServer) -> Counter[str]:
    """Keys of a server, by the word that their tags begin with: `session` of `kvs:{session:…}:record`."""
    kinds: Counter[str] = Counter()
    cursor = 0
    while True:
        following, keys = await server.command("SCAN", cursor, "COUNT", 1000)
        kinds.update(re.split(rb"[:}]", key.partition(b"{")[2] or key)[0].decode(errors="replace") for key in keys)
        cursor = int(following)
        if not cursor:
            return kinds


def read_process(pid: int) -> ProcessSample:
    """A process as the system sees it (/proc: Linux)."""
    folder = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
    return ProcessSample(
        files=sum(1 for _ in (folder / "fd").iterdir()),
        threads=int(fields["Threads"]),
        rss_bytes=int(fields["VmRSS"].split()[0]) * 1024,
    )
