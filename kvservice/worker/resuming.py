"""Brings back what a tier has of a session that the engine doesn't hold. Knows nothing of engines, gRPC or Redis.

    engine: KV is missing ──► manifest ──► chunks of the session's own tokens ──► faster than computing? ──► frames

Whatever isn't brought is computed again: the answer is the same, and says how many tokens that took.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvservice.store.manifests import Manifest
from kvservice.tier.groups import Chunk
from kvservice.tier.restore import FetchedGroups, GroupReader, StoredChunk, usable
from kvservice.types import GROUP_TOKENS, SINK_TOKENS, EngineCall, FinishedEvent, RestoredKv

logger = logging.getLogger(__name__)

MAX_FETCHES = 2
"""Sessions brought back at a time: bounds memory, and each gets the tier's whole speed sooner."""
FETCH_TIMEOUT_S = 10.0
"""What hasn't come by then is computed."""
MIN_TOKENS_TIMED = 64
"""Fewer say little of how fast tokens are computed."""
SMOOTHING = 0.2
"""Weight of the newest measurement."""


@dataclass(frozen=True, slots=True)
class ResumeStats:
    """Counters since the start.

    Attributes:
        fetched_sessions: times that a session's KV was fetched.
        recomputed_sessions: times that computing was predicted to be faster, or there was nothing to fetch.
        restored_tokens: tokens whose KV came from the tier.
        misses: frames that weren't there, or not as they should be, by reason.
    """

    fetched_sessions: int = 0
    recomputed_sessions: int = 0
    restored_tokens: int = 0
    misses: Mapping[str, int] = field(default_factory=dict)


class Speeds:
    """How long fetching and computing take here, as measured. What was never measured is taken to be fast."""

    def __init__(self) -> None:
        self._fetch_bytes_per_s: float | None = None
        self._prefill_tokens_per_s: float | None = None

    def note_fetch(self, num_bytes: int, seconds: float) -> None:
        """A fetch took so long."""
        if num_bytes:
            self._fetch_bytes_per_s = _smoothed(self._fetch_bytes_per_s, num_bytes / max(seconds, 1e-6))

    def note_prefill(self, num_tokens: int, seconds: float) -> None:
        """So many tokens took so long to compute."""
        if num_tokens >= MIN_TOKENS_TIMED:
            self._prefill_tokens_per_s = _smoothed(self._prefill_tokens_per_s, num_tokens / max(seconds, 1e-6))

    def fetching_is_faster(self, num_bytes: int, num_tokens: int) -> bool:
        """Whether to fetch `num_bytes` rather than to compute `num_tokens`."""
        if self._fetch_bytes_per_s is None or self._prefill_tokens_per_s is None:
            return True
        return num_bytes / self._fetch_bytes_per_s < num_tokens / self._prefill_tokens_per_s


class Resumer:
    """Fetches for one worker. For one event loop, save `note_finished`.

    Args:
        reader: of the worker's tier.
        clock: seconds that never go back; calls' deadlines are on it.
    """

    def __init__(self, reader: GroupReader, clock: Callable[[], float]) -> None:
        self._reader = reader
        self._clock = clock
        self._speeds = Speeds()
        self._slots = asyncio.Semaphore(MAX_FETCHES)
        self._fetched = self._recomputed = self._restored_tokens = 0
        self._misses: Counter[str] = Counter()

    def stats(self) -> ResumeStats:
        """See `ResumeStats`."""
        return ResumeStats(self._fetched, self._recomputed, self._restored_tokens, dict(self._misses))

    def note_finished(self, event: FinishedEvent) -> None:
        """A call has ended: learns how fast tokens are computed. From the engine's thread."""
        self._speeds.note_prefill(event.usage.prompt_tokens + event.usage.recomputed_tokens, event.prefill_ms / 1e3)

    async def restore(self, call: EngineCall, manifest: Manifest) -> RestoredKv:
        """What the tier has of a call's session; nothing, if computing it is faster. Ends within a bounded time."""
        fetched = FetchedGroups()
        if manifest.fingerprint != self._reader.fingerprint:
            self._misses["fingerprint"] += 1
        else:
            chunks = usable(call.tenant_tag, call.base_tokens, _chunks(manifest), manifest.codec)
            fetched = await self._fetch(call, chunks)
        return RestoredKv(fetched.num_groups, fetched.memory, manifest.reached)

    async def _fetch(self, call: EngineCall, chunks: list[StoredChunk]) -> FetchedGroups:
        num_groups = chunks[-1].chunk.stop_group if chunks else 0
        num_bytes = num_groups * self._reader.group_bytes
        if not chunks or not self._speeds.fetching_is_faster(num_bytes, num_groups * GROUP_TOKENS):
            self._recomputed += 1
            return FetchedGroups()
        async with self._slots:
            started = self._clock()
            left = FETCH_TIMEOUT_S if call.deadline is None else min(FETCH_TIMEOUT_S, call.deadline - started)
            fetched = await self._reader.fetch(call.tenant_tag, chunks, max(left, 0.0))
            seconds = self._clock() - started
        self._speeds.note_fetch(fetched.num_bytes, seconds)
        self._fetched += 1
        self._misses.update(fetched.misses)
        self._restored_tokens += fetched.num_groups * GROUP_TOKENS
        logger.info(
            "session_fetched",
            extra={
                "session_id": call.session_id,
                "groups": fetched.num_groups,
                "of_groups": num_groups,
                "seconds": round(seconds, 4),
                "misses": dict(fetched.misses),
            },
        )
        return fetched


def _chunks(manifest: Manifest) -> list[StoredChunk]:
    return [
        StoredChunk(
            chunk.home,
            Chunk(
                (chunk.start - SINK_TOKENS) // GROUP_TOKENS,
                (chunk.stop - SINK_TOKENS) // GROUP_TOKENS,
                chunk.chunk_hash,
            ),
        )
        for chunk in manifest.frames.chunks
    ]


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else (1 - SMOOTHING) * old + SMOOTHING * new
