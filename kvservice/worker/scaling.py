"""How many workers a load asks for. Pure; knows nothing of Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvservice.types import WorkerStats

OCCUPANCY = "occupancy"
QUEUE_S = "queue_s"


@dataclass(frozen=True, slots=True)
class Goals:
    """The load of a worker, on average over the workers, that no worker is added at."""

    occupancy: float
    queue_s: float


def report(stats: WorkerStats) -> dict[str, float]:
    """What a worker tells of its load."""
    headroom, load = stats.headroom, stats.headroom.load
    return {
        OCCUPANCY: max(
            _used(headroom.device_capacity_bytes, headroom.device_freeable_bytes),
            _used(headroom.host_capacity_bytes, headroom.host_freeable_bytes),
        ),
        QUEUE_S: load.waiting_tokens / load.prefill_tokens_per_s if load.prefill_tokens_per_s > 0.0 else 0.0,
        "running_calls": float(headroom.running_calls),
        "resident_sessions": float(headroom.resident_sessions),
        "recall_misses": float(stats.recall_lookups - stats.recall_hits),
    }


def workers_wanted(reports: Sequence[Mapping[str, float]], now: int, goals: Goals) -> int:
    """How many workers should share the load that `now` workers report; never fewer than `now`.

    Taking one away is no matter of numbers: its sessions must have moved before, so that is decided where they can be.
    """
    if not reports:
        return now
    occupancy = sum(each.get(OCCUPANCY, 0.0) for each in reports) / len(reports)
    queue_s = sum(each.get(QUEUE_S, 0.0) for each in reports) / len(reports)
    pressure = max(occupancy / goals.occupancy, queue_s / goals.queue_s)
    # At most twice as many at a time: a queue says little about how many would empty it.
    return max(now, min(2 * now, math.ceil(now * pressure)))


def _used(capacity_bytes: int, freeable_bytes: int) -> float:
    """Share of the bytes that running calls hold; idle sessions give way to others."""
    return 1.0 - freeable_bytes / capacity_bytes if capacity_bytes else 0.0
