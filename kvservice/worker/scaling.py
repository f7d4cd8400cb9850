"""How many workers a load asks for, and which one may go. Pure but for a clock; knows nothing of Ray.

    up     the policy of Ray Serve asks for more where bytes, the queue or what is computed again exceed their goals
    down   Descent names a worker ─► it drains and hands its sessions over ─► it is gone ─► the policy lowers the target

Ray Serve would choose its own victims, so the target follows a worker that has gone and never sends one away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from kvservice.types import WorkerStats

OCCUPANCY = "occupancy"
QUEUE_S = "queue_s"
MISS_S = "miss_s"
RUNNING_CALLS = "running_calls"
RESIDENT_SESSIONS = "resident_sessions"
RETIRING = "retiring"
"""Reported by a worker that is being taken away."""

SPARE = 0.7
"""Of the goals: a worker may go when the load of all would be below it on one fewer."""

Report = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Goals:
    """The load of a worker, on average over the workers, that no worker is added at."""

    occupancy: float
    queue_s: float
    miss_s: float = math.inf


def report(stats: WorkerStats, miss_s: float = 0.0) -> dict[str, float]:
    """What a worker tells of its load; `miss_s` is `MissMeter`'s."""
    headroom, load = stats.headroom, stats.headroom.load
    return {
        OCCUPANCY: max(
            _used(headroom.device_capacity_bytes, headroom.device_freeable_bytes),
            _used(headroom.host_capacity_bytes, headroom.host_freeable_bytes),
        ),
        QUEUE_S: load.waiting_tokens / load.prefill_tokens_per_s if load.prefill_tokens_per_s > 0.0 else 0.0,
        MISS_S: miss_s,
        RUNNING_CALLS: float(headroom.running_calls),
        RESIDENT_SESSIONS: float(headroom.resident_sessions),
        "recall_misses": float(stats.recall_lookups - stats.recall_hits),
    }


class MissMeter:
    """Seconds of each second that a worker spends on KV that it had to let go: tokens computed again, at its speed."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: tuple[float, int] | None = None

    def look(self, stats: WorkerStats) -> float:
        """Since the last look; 0 at the first."""
        now, tokens = self._clock(), stats.recomputed_tokens
        before, self._last = self._last, (now, tokens)
        speed = stats.headroom.load.prefill_tokens_per_s
        if before is None or now <= before[0] or speed <= 0.0:
            return 0.0
        return (tokens - before[1]) / speed / (now - before[0])


def workers_wanted(reports: Sequence[Report], now: int, goals: Goals) -> int:
    """How many workers should share the load that `now` workers report; never fewer than `now`."""
    if not reports:
        return now
    # At most twice as many at a time: a queue says little about how many would empty it.
    return max(now, min(2 * now, math.ceil(now * _pressure(reports, goals))))


def target(
    reports: Mapping[str, Report], running: Collection[str], target_now: int, retiring: Collection[str], goals: Goals
) -> tuple[int, list[str]]:
    """The number of workers to aim at, and those that are being taken away.

    Args:
        reports: of workers, by name.
        running: names of the workers there are.
        target_now: the number that is aimed at.
        retiring: what the last call gave.
        goals: see `Goals`.
    """
    going = {name for name, told in reports.items() if told.get(RETIRING)} | (set(retiring) & set(running))
    gone = set(retiring) - set(running)
    active = [told for name, told in reports.items() if name not in going]
    # One that goes still counts until it has gone: a target below what runs has Ray Serve choose who goes.
    return workers_wanted(active, target_now - len(gone) - len(going), goals) + len(going), sorted(going)


class Descent:
    """Names a worker to take away, once one fewer would have carried the load for a while."""

    def __init__(self, goals: Goals, min_workers: int, delay_s: float, clock: Callable[[], float]) -> None:
        self._goals = goals
        self._min_workers = min_workers
        self._delay_s = delay_s
        self._clock = clock
        self._spare_since: float | None = None

    def look(self, reports: Mapping[str, Report]) -> str | None:
        """The worker to take away now: the one with the fewest calls, then sessions. One at a time."""
        now = self._clock()
        if any(told.get(RETIRING) for told in reports.values()) or not self._has_spare(list(reports.values())):
            self._spare_since = None
            return None
        if self._spare_since is None:
            self._spare_since = now
        if now - self._spare_since < self._delay_s:
            return None
        self._spare_since = None
        return min(reports, key=lambda name: (reports[name][RUNNING_CALLS], reports[name][RESIDENT_SESSIONS], name))

    def _has_spare(self, reports: Sequence[Report]) -> bool:
        if len(reports) <= max(1, self._min_workers):
            return False
        return _pressure(reports, self._goals) * len(reports) / (len(reports) - 1) < SPARE


def _pressure(reports: Sequence[Report], goals: Goals) -> float:
    """The mean load over its goal, of the load that is nearest to its goal."""

    def mean(name: str) -> float:
        return sum(told.get(name, 0.0) for told in reports) / len(reports)

    return max(mean(OCCUPANCY) / goals.occupancy, mean(QUEUE_S) / goals.queue_s, mean(MISS_S) / goals.miss_s)


def _used(capacity_bytes: int, freeable_bytes: int) -> float:
    """Share of the bytes that running calls hold; idle sessions give way to others."""
    return 1.0 - freeable_bytes / capacity_bytes if capacity_bytes else 0.0
