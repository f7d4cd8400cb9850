"""Thousands of short sessions that are cancelled, cut off, forked, moved, closed and left to expire: is anything left?

callers ─► create ─► append ─► ask | cancel | disconnect | fork | move | truncate ─► close | purge | leave alone
afterwards: no session, call, block, byte or lease; and the processes' descriptors and threads are what they were
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from kvservice.client import Client, ServiceStats, Tokens
from kvservice.drill.deployment import TENANT, Deployment
from kvservice.errors import KVServiceError, Overloaded

CALLERS = 8
WARM_UP = 100
"""Sessions before the first count of descriptors and threads: pools fill, and modules are loaded on first use."""
SAMPLE_S = 1.0
SHORT_TTL_S = 3.0
DRAIN_S = 150.0
"""Longer than stored KV lives that nobody renews."""
SLACK_FILES = 6
"""A pool may hold another connection or two at one moment than at another."""
SLACK_THREADS = 4
CALL_S = 60.0


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """One look at one process."""

    files: int
    threads: int
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class ChurnSample:
    """One look at all of them."""

    time_s: float
    sessions: int
    processes: Mapping[str, ProcessSample]


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
        deployment: whole; its sessions may live as short as `SHORT_TTL_S`.
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
        await self._callers(min(WARM_UP, sessions), report)
        before = self._look()
        sampling = asyncio.create_task(self._sample(started))
        try:
            await self._callers(sessions, report)
            await self._until_empty()
        finally:
            sampling.cancel()
            await asyncio.gather(sampling, return_exceptions=True)
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
                try:
                    async with asyncio.timeout(CALL_S):
                        await self._session(client)
                except Overloaded as error:
                    self._errors[f"{error.status} {error.reason}"] += 1
                except (KVServiceError, TimeoutError) as error:
                    words = f"{error.status} {error.reason}" if isinstance(error, KVServiceError) else "hung"
                    if not self._errors[words]:
                        self._findings.append(f"{words}: {error}"[:300])
                    self._errors[words] += 1

        clients = list(self._deployment.clients.values())
        await asyncio.gather(*(caller(clients[index % len(clients)]) for index in range(CALLERS)))

    async def _session(self, client: Client) -> None:
        rng = self._rng
        leave = rng.random() < 0.2
        created = await client.create_session(recipe=self._recipe, ttl_s=SHORT_TTL_S if leave else None)
        session = created.session_id
        await client.append(session, self._text(rng.choice((20, 60, 200, 500))))
        for _ in range(rng.randint(1, 2)):
            action = rng.choice(("ask", "ask", "cancel", "disconnect", "cancel_append", "fork", "move", "truncate"))
            self._actions[action] += 1
            await getattr(self, f"_{action}")(client, session)
        if leave:
            self._actions["left to expire"] += 1
            return
        purge = rng.random() < 0.5
        self._actions["purge" if purge else "close"] += 1
        await client.close_session(session, purge=purge)

    async def _ask(self, client: Client, session: str) -> None:
        await client.ask(session, "why? ", max_new_tokens=self._rng.randint(1, 8), ignore_eos=True)

    async def _cancel(self, client: Client, session: str) -> None:
        async with aclosing(client.generate(session, "go on ", max_new_tokens=64, ignore_eos=True)) as events:
            async for event in events:
                if isinstance(event, Tokens):
                    return

    async def _disconnect(self, client: Client, session: str) -> None:
        del client
        gone = self._deployment.new_client()
        events = gone.generate(session, "go on ", max_new_tokens=64, ignore_eos=True)
        async for event in events:
            if isinstance(event, Tokens):
                break
        await gone.aclose()
        await events.aclose()

    async def _cancel_append(self, client: Client, session: str) -> None:
        reading = asyncio.create_task(client.append(session, self._text(400)))
        await asyncio.sleep(self._rng.uniform(0.0, 0.05))
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    async def _fork(self, client: Client, session: str) -> None:
        fork = (await client.fork_session(session)).session_id
        await self._ask(client, fork)
        await client.close_session(fork, purge=self._rng.random() < 0.5)

    async def _move(self, client: Client, session: str) -> None:
        await client.move_session(session)
        await self._ask(client, session)

    async def _truncate(self, client: Client, session: str) -> None:
        held = (await client.get(session)).num_tokens
        await client.truncate_session(session, held // 2)

    async def _until_empty(self) -> None:
        """Waits until nothing is left; what is left after `DRAIN_S` is a finding."""
        client = self._deployment.client
        loop = asyncio.get_running_loop()
        give_up = loop.time() + DRAIN_S
        while True:
            left = _held(await client.stats())
            found = await client.verify(TENANT)
            left += [f"{found.own_frames} frames"] if found.own_frames else []
            stored = found.stored_bytes + found.reserved_bytes
            left += [f"{stored} bytes charged or reserved"] if stored else []
            left += [f"{len(found.session_ids)} sessions with something of them"] if found.session_ids else []
            if not left:
                return
            if loop.time() > give_up:
                self._findings.append(f"left after {DRAIN_S:.0f} s: {', '.join(left)}")
                return
            await asyncio.sleep(SAMPLE_S)

    def _compare(self, before: Mapping[str, ProcessSample], after: Mapping[str, ProcessSample]) -> None:
        for name, then in before.items():
            now = after[name]
            if now.files > then.files + SLACK_FILES:
                self._findings.append(f"{name} has {now.files} descriptors, {then.files} after the warm-up")
            if now.threads > then.threads + SLACK_THREADS:
                self._findings.append(f"{name} has {now.threads} threads, {then.threads} after the warm-up")

    async def _sample(self, started: float) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._samples.append(ChurnSample(loop.time() - started, self._begun, self._look()))
            await asyncio.sleep(SAMPLE_S)

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


def read_process(pid: int) -> ProcessSample:
    """A process as the system sees it (/proc: Linux)."""
    folder = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
    return ProcessSample(
        files=sum(1 for _ in (folder / "fd").iterdir()),
        threads=int(fields["Threads"]),
        rss_bytes=int(fields["VmRSS"].split()[0]) * 1024,
    )
