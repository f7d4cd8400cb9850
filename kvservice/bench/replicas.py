"""What a service on Ray does when its workers are killed in mid-stream, and when its load grows and goes away.

Starts nothing: the caller gives a running service whose workers are below one process. /proc: Linux.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from kvservice.bench.rounds import PATIENT, Rounds, RoundsLoad, RoundsReport
from kvservice.client import Client, ServiceStats
from kvservice.errors import InternalError, KVServiceError, Unavailable

POLL_S = 0.25
RESTART_TIMEOUT_S = 120.0
SETTLED_S = 45.0
"""Longer than Ray Serve takes to find out that a worker has gone and to bring another, which it mustn't."""
LISTENING = "0A"
"""State of a socket in /proc/net/tcp."""


@dataclass(frozen=True, slots=True)
class KillFigures:
    """Attributes: `restart_s`: of each kill, until there were as many workers as before. Others as in RoundsReport."""

    kills: int
    restart_s: tuple[float, ...]
    answers: int
    wrong: int
    lost_turns: int
    recomputed_tokens: int
    refusals: dict[str, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """The service at one moment.

    Attributes:
        at_s: since the load began.
        workers: that there are.
        running_calls: that they have admitted.
        resident_sessions: whose KV they hold.
        device_bytes: that is not free.
        host_bytes: the same.
    """

    at_s: float
    workers: int
    running_calls: int
    resident_sessions: int
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True)
class ScaleFigures:
    """Attributes: `up_s`: from the load's begin to the most workers; `down_s`: from its end to the fewest again.

    `samples` in order of time; others as in RoundsReport.
    """

    most_workers: int
    up_s: float
    down_s: float
    answers: int
    wrong: int
    lost_turns: int
    refusals: dict[str, int]
    samples: tuple[Sample, ...]


async def measure_kills(
    address: str, root: int, load: RoundsLoad, *, workers: int, kills: int, report: Callable[[], None]
) -> KillFigures:
    """Kills workers with SIGKILL while they answer, one after the other, each once all are there again.

    Args:
        address: of the gateway.
        root: the process that the workers are below.
        load: of the callers meanwhile.
        workers: that there are.
        kills: how many.
        report: called after each.

    Raises:
        Unavailable: a worker didn't come again.
    """
    async with Client(address, retry=PATIENT) as client:
        rounds = Rounds(address, load, (await client.list_models())[0].shape.vocab_size)
        await rounds.rehearse()
        restarts = []
        async with _running(rounds) as end:
            for _ in range(kills):
                restarts.append(await _kill(client, root, rounds, workers))
                report()
        found = await end()
    return KillFigures(
        kills=kills,
        restart_s=tuple(restarts),
        answers=found.answers,
        wrong=found.wrong,
        lost_turns=found.lost_turns,
        recomputed_tokens=found.recomputed_tokens,
        refusals=dict(found.refusals),
    )


async def measure_scaling(
    address: str, load: RoundsLoad, *, fewest: int, most: int, timeout_s: float, hold_s: float
) -> ScaleFigures:
    """Puts the load on until there are `most` workers and for `hold_s` more, takes it away until there are `fewest`.

    Raises:
        Unavailable: that takes longer than `timeout_s`, either way; or workers come again without a load.
    """
    async with Client(address, retry=PATIENT) as client:
        rounds = Rounds(address, load, (await client.list_models())[0].shape.vocab_size)
        await rounds.rehearse()
        started = time.perf_counter()
        samples: list[Sample] = []
        async with _sampled(client, samples, started), _running(rounds) as end:
            up_s = await _until(client, lambda stats: len(stats.workers) >= most, timeout_s)
            await asyncio.sleep(hold_s)
            found = await end()
            down_s = await _until(client, lambda stats: len(stats.workers) <= fewest, timeout_s)
            await _stays(client, fewest)
        samples.append(_sample(await client.stats(), time.perf_counter() - started))
    return ScaleFigures(
        most_workers=max(sample.workers for sample in samples),
        up_s=up_s,
        down_s=down_s,
        answers=found.answers,
        wrong=found.wrong,
        lost_turns=found.lost_turns,
        refusals=dict(found.refusals),
        samples=tuple(samples),
    )


@asynccontextmanager
async def _running(rounds: Rounds) -> AsyncIterator[Callable[[], asyncio.Future[RoundsReport]]]:
    """Runs the callers; what is given ends them and awaits their report."""
    until = asyncio.Event()
    task = asyncio.create_task(rounds.run(until), name="rounds")

    def end() -> asyncio.Future[RoundsReport]:
        until.set()
        return task

    try:
        yield end
    finally:
        until.set()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def _sampled(client: Client, samples: list[Sample], started: float) -> AsyncIterator[None]:
    async def look() -> None:
        while True:
            try:
                samples.append(_sample(await client.stats(), time.perf_counter() - started))
            except KVServiceError:
                # A worker may have gone while it was asked.
                continue
            finally:
                await asyncio.sleep(POLL_S)

    task = asyncio.create_task(look(), name="samples")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _sample(stats: ServiceStats, at_s: float) -> Sample:
    workers = stats.workers
    return Sample(
        at_s=at_s,
        workers=len(workers),
        running_calls=sum(worker.running_calls for worker in workers),
        resident_sessions=sum(worker.resident_sessions for worker in workers),
        device_bytes=sum(worker.device_capacity_bytes - worker.device_free_bytes for worker in workers),
        host_bytes=sum(worker.host_capacity_bytes - worker.host_free_bytes for worker in workers),
    )


async def _kill(client: Client, root: int, rounds: Rounds, workers: int) -> float:
    """Kills a worker in mid-stream; gives the seconds until there are as many workers as before, without it."""
    addresses: dict[str, str] = {worker.worker_id: worker.address for worker in (await client.stats()).workers}
    worker_id = await rounds.mid_stream(addresses)
    os.kill(listener(root, int(addresses[worker_id].rpartition(":")[2])), signal.SIGKILL)
    return await _until(
        client,
        lambda stats: len(stats.workers) >= workers and worker_id not in {each.worker_id for each in stats.workers},
        RESTART_TIMEOUT_S,
    )


async def _until(client: Client, condition: Callable[[ServiceStats], bool], timeout_s: float) -> float:
    """Waits for a condition; gives the seconds."""
    started = time.perf_counter()
    workers = 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                stats = await client.stats()
                workers = len(stats.workers)
                if condition(stats):
                    break
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise Unavailable(
            f"the workers aren't as many as they should be after {timeout_s:g} s; last seen: {workers}"
        ) from None
    return time.perf_counter() - started


async def _stays(client: Client, fewest: int) -> None:
    """Returns once there have been no more workers than that for a while.

    Raises:
        Unavailable: one came.
    """
    until = time.perf_counter() + SETTLED_S
    while time.perf_counter() < until:
        if (workers := len((await client.stats()).workers)) > fewest:
            raise Unavailable(f"{workers} workers again, without a load, where {fewest} should stay")
        await asyncio.sleep(POLL_S)


def listener(root: int, port: int) -> int:
    """The process below `root` that listens on a TCP port of this machine."""
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    for pid in _below(root):
        try:
            links = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue  # It has ended, or closed something, meanwhile.
        if sockets & set(links):
            return pid
    raise InternalError(f"no process below {root} listens on port {port}")


def _listening(port: int) -> list[str]:
    """Inodes of the sockets that listen on a port."""
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                found.append(fields[9])
    return found


def _below(root: int) -> Sequence[int]:
    """The processes that `root` started, and those that they started."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # It has ended meanwhile.
            parents[int(entry.name)] = int(fields[1])

    def is_below(pid: int) -> bool:
        while pid in parents and pid != root:
            pid = parents[pid]
        return pid == root

    return [pid for pid in parents if is_below(pid)]
