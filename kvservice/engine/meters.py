"""An engine's counters and speeds, and where a sequence's bytes are. Knows no calls."""

from __future__ import annotations

from dataclasses import replace

from kvservice.recall.memory import RecallCounters, SequenceMemory
from kvservice.types import KvTelemetry, ModelShape, WorkerStats

RATE_SMOOTHING = 0.1
"""Weight of the newest step in the reported speeds."""


class Meters:
    """Counters since the start.

    Attributes:
        stats: what has been counted; sizes are for the caller to fill in.
    """

    def __init__(self) -> None:
        self.stats = WorkerStats()

    def note_step(self, num_decodes: int, num_prefill: int, seconds: float) -> None:
        """Takes in what a step computed, and how long that took."""
        stats = self.stats
        if num_prefill:
            rate = _smoothed(stats.prefill_tokens_per_s, num_prefill / seconds)
            self.stats = replace(stats, prefill_tokens_per_s=rate)
        else:
            rate = _smoothed(stats.decode_tokens_per_s, num_decodes / seconds)
            self.stats = replace(stats, decode_tokens_per_s=rate)

    def note_recompute(self, num_tokens: int) -> None:
        """Counts tokens whose KV was computed again."""
        self.stats = replace(self.stats, recomputed_tokens=self.stats.recomputed_tokens + num_tokens)

    def note_recall(self, before: RecallCounters, now: RecallCounters) -> None:
        """Counts what a call recalled."""
        self.stats = replace(
            self.stats,
            recall_lookups=self.stats.recall_lookups + now.lookups - before.lookups,
            recall_hits=self.stats.recall_hits + now.hits - before.hits,
        )


def kv_telemetry(
    memory: SequenceMemory, shape: ModelShape, before: RecallCounters, redis_bytes: int = 0
) -> KvTelemetry:
    """Where a sequence's bytes are, and what its recall has done since `before`."""
    counters = memory.counters
    return KvTelemetry(
        window_bytes=memory.window_bytes,
        index_bytes=memory.index_bytes,
        slot_bytes=memory.slot_bytes,
        host_bytes=memory.host_bytes,
        redis_bytes=redis_bytes,
        dense_bytes=memory.state.num_computed * shape.kv_bytes_per_token,
        recall_lookups=counters.lookups - before.lookups,
        recall_hits=counters.hits - before.hits,
        recalled_bytes=counters.recalled_bytes - before.recalled_bytes,
        streamed_bytes=counters.streamed_bytes - before.streamed_bytes,
        index_groups=counters.scan.groups - before.scan.groups,
        index_groups_scanned=counters.scan.scanned - before.scan.scanned,
    )


def _smoothed(old: float, new: float) -> float:
    return new if old == 0.0 else (1 - RATE_SMOOTHING) * old + RATE_SMOOTHING * new
