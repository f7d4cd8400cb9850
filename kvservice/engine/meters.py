"""An engine's counters and speeds, and where a sequence's bytes are. Knows no calls."""

from __future__ import annotations

from kvservice.recall.memory import RecallCounters, SequenceMemory
from kvservice.types import KvTelemetry, ModelShape, WorkerStats

RATE_SMOOTHING = 0.1
"""Weight of the newest step in the reported speeds."""


class Meters:
    """Counters since the start."""

    def __init__(self) -> None:
        self.prefill_tokens_per_s = 0.0
        """Smoothed over the last steps that read; 0: there was none."""
        self.read_alone_tokens_per_s = 0.0
        """Of these, those that did nothing else."""
        self.decode_tokens_per_s = 0.0
        """Of all answers together, smoothed over the last steps that decoded alone; 0: there was none."""
        self._recall_lookups = 0
        self._recall_hits = 0
        self._recomputed_tokens = 0

    def note_step(self, num_decodes: int, num_prefill: int, seconds: float) -> None:
        """Takes in what a step computed, and how long that took."""
        if num_prefill:
            self.prefill_tokens_per_s = _smoothed(self.prefill_tokens_per_s, num_prefill / seconds)
            if not num_decodes:
                self.read_alone_tokens_per_s = _smoothed(self.read_alone_tokens_per_s, num_prefill / seconds)
        else:
            self.decode_tokens_per_s = _smoothed(self.decode_tokens_per_s, num_decodes / seconds)

    def note_recompute(self, num_tokens: int) -> None:
        """Counts tokens whose KV was computed again."""
        self._recomputed_tokens += num_tokens

    def note_recall(self, before: RecallCounters, now: RecallCounters) -> None:
        """Counts what a call recalled."""
        self._recall_lookups += now.lookups - before.lookups
        self._recall_hits += now.hits - before.hits

    def stats(self) -> WorkerStats:
        """What has been counted; sizes are for the caller to fill in."""
        return WorkerStats(
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            decode_tokens_per_s=self.decode_tokens_per_s,
            recall_lookups=self._recall_lookups,
            recall_hits=self._recall_hits,
            recomputed_tokens=self._recomputed_tokens,
        )


def kv_telemetry(
    memory: SequenceMemory, shape: ModelShape, before: RecallCounters, redis_bytes: int = 0
) -> KvTelemetry:
    """Where a sequence's bytes are, and what its recall has done since `before`."""
    counters = memory.counters
    return KvTelemetry(
        window_bytes=memory.window_bytes,
        # What a method remembers lies beside the arena.
        index_bytes=memory.index_bytes + (memory.held.remembered_bytes if memory.held else 0),
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
        gated_rows=counters.gated - before.gated,
        skipped_rows=counters.skipped - before.skipped,
        follower_bytes=counters.follower_bytes - before.follower_bytes,
        arrived_bytes=counters.arrived_bytes - before.arrived_bytes,
    )


def _smoothed(old: float, new: float) -> float:
    return new if old == 0.0 else (1 - RATE_SMOOTHING) * old + RATE_SMOOTHING * new
