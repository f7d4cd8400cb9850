"""What the gateway alone takes and holds: latency at a steady rate, open streams, unary calls.

Its worker computes nothing. Drives a gateway that runs in a process of its own; knows nothing of how that is made.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from kvservice.bench.instant import InstantEngine, InstantTokenizer
from kvservice.client import Client, Tokens
from kvservice.config.worker import WorkerConfig
from kvservice.errors import KVServiceError
from kvservice.store.base import StateStore
from kvservice.worker.server import WorkerServer

WARM_UP_CALLS = 50
UNARY_CALLERS = 32
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
OPENED_AT_ONCE = 64
"""Streams on their way to their first token."""
HOLD_S = 1.0
"""How long all streams are open at once, at least."""
STREAMS_OF_EACH = 100
"""On a connection: fewer than `limits.streams_per_connection`, beyond which a call waits for another's end."""


@dataclass(frozen=True, slots=True)
class GatewayFigures:
    """Milliseconds are a caller's, from sending a call that a worker answers at once to its end.

    Attributes:
        added_latency_ms_p50: of Generates of one token, at a steady rate.
        added_latency_ms_p99: the same.
        rpcs_per_s: the rate that came of it.
        open_streams: answers that were open at a time, each with a token sent.
        open_s: how long it took to open them.
        failed_streams: those that couldn't be opened.
        unary_rpcs_per_s: Gets of a session, as many as go.
        unary_rpcs_per_cpu_s: the same for each second that the gateway's process computed.
    """

    added_latency_ms_p50: float
    added_latency_ms_p99: float
    rpcs_per_s: float
    open_streams: int
    open_s: float
    failed_streams: int
    unary_rpcs_per_s: float
    unary_rpcs_per_cpu_s: float


@asynccontextmanager
async def instant_worker(store: StateStore) -> AsyncIterator[None]:
    """Runs a worker that computes nothing, registered in `store`."""
    config = WorkerConfig(worker_id="instant", drain_grace_s=0.0)
    worker = WorkerServer(config, InstantEngine, InstantTokenizer(), store)
    await worker.start()
    try:
        yield
    finally:
        await worker.stop()


async def measure_gateway(address: str, pid: int, *, rate: float, seconds: float, streams: int) -> GatewayFigures:
    """Measures one after the other.

    Args:
        address: of the gateway; its worker answers.
        pid: of its process.
        rate: Generates a second.
        seconds: that each figure is measured for.
        streams: to open.

    Raises:
        KVServiceError: a call failed.
    """
    async with Client(address) as client:
        for _ in range(WARM_UP_CALLS):
            await _generate(client)
        latencies, took_s = await _at_rate(client, rate, seconds)
        calls, wall_s, cpu_s = await _unary(client, pid, seconds)
    async with AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(Client(address)) for _ in range(0, streams, STREAMS_OF_EACH)]
        opened, open_s = await _open(callers, streams)
    percentiles = statistics.quantiles(latencies, n=100, method="inclusive")
    return GatewayFigures(
        added_latency_ms_p50=percentiles[49],
        added_latency_ms_p99=percentiles[98],
        rpcs_per_s=len(latencies) / took_s,
        open_streams=opened,
        open_s=open_s,
        failed_streams=streams - opened,
        unary_rpcs_per_s=calls / wall_s,
        unary_rpcs_per_cpu_s=calls / cpu_s,
    )


async def _generate(client: Client) -> float:
    """Milliseconds of one call."""
    started = time.perf_counter()
    async with aclosing(client.complete(prompt_token_ids=[65], max_new_tokens=1)) as events:
        async for _ in events:
            pass
    return (time.perf_counter() - started) * 1000.0


async def _at_rate(client: Client, rate: float, seconds: float) -> tuple[list[float], float]:
    """Calls that begin when it is their time: milliseconds of each, and the seconds."""
    started = time.perf_counter()
    tasks = []
    for number in range(round(rate * seconds)):
        await asyncio.sleep(max(0.0, started + number / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(_generate(client)))
    latencies = await asyncio.gather(*tasks)
    return latencies, time.perf_counter() - started


async def _unary(client: Client, pid: int, seconds: float) -> tuple[int, float, float]:
    """Gets of a session by callers that never rest: their number, the seconds, and the gateway's CPU seconds."""
    session = (await client.create_session()).session_id
    cpu_s, started = _cpu_s(pid), time.perf_counter()

    async def call_on() -> int:
        calls = 0
        while time.perf_counter() - started < seconds:
            await client.get(session)
            calls += 1
        return calls

    calls = sum(await asyncio.gather(*(call_on() for _ in range(UNARY_CALLERS))))
    return calls, time.perf_counter() - started, _cpu_s(pid) - cpu_s


async def _open(clients: Sequence[Client], streams: int) -> tuple[int, float]:
    """Answers that stay open until all are: how many were, and how long it took."""
    arrivals: asyncio.Queue[None] = asyncio.Queue()
    doors = asyncio.Semaphore(OPENED_AT_ONCE)
    started = time.perf_counter()

    async def hold(client: Client) -> None:
        await doors.acquire()
        is_open = False
        try:
            async with aclosing(client.complete(prompt_token_ids=[65], max_new_tokens=2)) as events:
                async for event in events:
                    if isinstance(event, Tokens):
                        # Nothing more comes: it reads on until it is cancelled, or was cut.
                        is_open = True
                        arrivals.put_nowait(None)
                        doors.release()
        except KVServiceError:
            if not is_open:
                arrivals.put_nowait(None)
                doors.release()

    tasks = [asyncio.create_task(hold(clients[number % len(clients)])) for number in range(streams)]
    for _ in tasks:
        await arrivals.get()
    open_s = time.perf_counter() - started
    await asyncio.sleep(HOLD_S)
    opened = sum(not task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return opened, open_s


def _cpu_s(pid: int) -> float:
    """Seconds that a process has computed for, in all its threads (/proc: Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
