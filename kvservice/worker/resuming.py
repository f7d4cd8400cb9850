"""Brings back what a tier has of a session that the engine doesn't hold. Knows nothing of engines, gRPC or Redis.

    engine: KV is missing ──► manifest ──► chunks of the session's own tokens ──► faster than computing? ──► frames

Whatever isn't brought is computed again: the answer is the same, and says how many tokens that took.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvservice.store.manifests import Manifest
from kvservice.store.tasks import end_tasks
from kvservice.telemetry.tracing import TRACING
from kvservice.tier.frame_sets import Chunk, FrameSets
from kvservice.tier.restore import (
    Arrival,
    GroupReader,
    Plan,
    StoredChunk,
    StoredWindow,
    nothing,
    usable,
    usable_window,
)
from kvservice.types import GROUP_TOKENS, SINK_TOKENS, EngineCall, FinishedEvent
from kvservice.worker.patience import KnownMissing, fetch_timeout_s

logger = logging.getLogger(__name__)

MAX_FETCHES = 2
"""Sessions brought back at a time: bounds memory, and each gets the tier's whole speed sooner."""
MIN_TOKENS_TIMED = 64
"""Fewer say little of how fast tokens are computed."""
TRY_AGAIN_S = 3.0
"""So long after a fetch the next one is made even if computing was faster then. What it may cost is bounded: a fetch is
waited for as long as computing takes."""
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
    """How long fetching and computing take here, as measured. What was never measured is taken to be fast.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._fetch_bytes_per_s: float | None = None
        self._fetched_at = 0.0
        self._prefill_tokens_per_s: float | None = None

    def note_fetch(self, num_bytes: int, seconds: float) -> None:
        """A fetch took so long. That it was fast is believed at once: none is faster than its tier."""
        if num_bytes:
            measured = num_bytes / max(seconds, 1e-6)
            self._fetch_bytes_per_s = max(measured, _smoothed(self._fetch_bytes_per_s, measured))
            self._fetched_at = self._clock()

    def note_prefill(self, num_tokens: int, seconds: float) -> None:
        """So many tokens took so long to compute."""
        if num_tokens >= MIN_TOKENS_TIMED:
            self._prefill_tokens_per_s = _smoothed(self._prefill_tokens_per_s, num_tokens / max(seconds, 1e-6))

    def prefill_s(self, num_tokens: int) -> float | None:
        """How long computing takes; None if that was never measured."""
        return None if self._prefill_tokens_per_s is None else num_tokens / self._prefill_tokens_per_s

    def fetching_is_faster(self, num_bytes: int, num_tokens: int) -> bool:
        """Whether to fetch `num_bytes` rather than to compute `num_tokens`.

        A tier that was slow is tried again now and then: who never asks never learns that it has recovered.
        """
        if self._fetch_bytes_per_s is None or self._prefill_tokens_per_s is None:
            return True
        if self._clock() - self._fetched_at >= TRY_AGAIN_S:
            self._fetched_at = self._clock()
            return True
        return num_bytes / self._fetch_bytes_per_s < num_tokens / self._prefill_tokens_per_s


class Resumer:
    """Fetches for one worker. For one event loop, save `note_finished`.

    Args:
        reader: of the worker's tier.
        frame_sets: what can be read.
        clock: seconds that never go back; calls' deadlines are on it.
    """

    def __init__(self, reader: GroupReader, frame_sets: FrameSets, clock: Callable[[], float]) -> None:
        self._reader = reader
        self._frame_sets = frame_sets
        self._clock = clock
        self._speeds = Speeds(clock)
        self._known_missing = KnownMissing()
        self._slots = asyncio.Semaphore(MAX_FETCHES)
        self._fetches: set[asyncio.Task[None]] = set()
        self._fetched = self._recomputed = self._restored_tokens = 0
        self._misses: Counter[str] = Counter()

    def stats(self) -> ResumeStats:
        """See `ResumeStats`."""
        return ResumeStats(self._fetched, self._recomputed, self._restored_tokens, dict(self._misses))

    def note_finished(self, event: FinishedEvent) -> None:
        """A call has ended: learns how fast tokens are computed. From the engine's thread."""
        self._speeds.note_prefill(event.usage.prompt_tokens + event.usage.recomputed_tokens, event.prefill_ms / 1e3)

    async def begin(self, call: EngineCall, manifest: Manifest, num_missing: int) -> Arrival:
        """Begins to bring what the tier has of a call's session; nothing, if computing what is missing is faster.

        Returns once it is under way. Cancelling this waits for nothing and leaves nothing behind.

        Args:
            call: the call.
            manifest: of its session.
            num_missing: the last tokens of the session, whose KV isn't held.
        """
        chunks: list[StoredChunk] = []
        frame_set = self._frame_sets.of(call.recipe)
        if manifest.fingerprint != frame_set.fingerprint:
            self._misses["fingerprint"] += 1
        else:
            chunks = usable(call.tenant_tag, call.base_tokens, _chunks(manifest), manifest.codec)
            known = self._known_missing.groups(call.session_id, manifest.epoch, manifest.version)
            if known is not None:
                self._misses["absent"] += sum(stored.chunk.stop_group > known for stored in chunks)
                chunks = [stored for stored in chunks if stored.chunk.stop_group <= known]
        window = usable_window(call.tenant_tag, call.base_tokens, _window(manifest), chunks)
        plan = Plan(frame_set, call.tenant_tag, chunks, window) if chunks else None
        saved = 0 if plan is None else plan.num_tokens - (len(call.base_tokens) - num_missing)
        if plan is None or saved <= 0 or not self._speeds.fetching_is_faster(plan.num_bytes, saved):
            self._recomputed += 1
            return nothing(manifest.reached)
        try:
            async with asyncio.timeout(self._patience_s(call, plan)):
                await self._slots.acquire()
        except TimeoutError:
            # Those before it wait for a slow tier, or are many: computing is faster by now.
            self._misses["timeout"] += len(chunks)
            self._recomputed += 1
            return nothing(manifest.reached)
        loop = asyncio.get_running_loop()
        arrival = Arrival(manifest.reached, plan)
        task = loop.create_task(self._fetch(call, manifest, plan, arrival), name=f"fetch {call.session_id}")
        self._fetches.add(task)

        def ended(_task: asyncio.Task[None]) -> None:
            # A task that is cancelled before it begins does nothing at all.
            arrival.end()
            self._fetches.discard(task)
            self._slots.release()

        def give_up() -> None:
            with contextlib.suppress(RuntimeError):  # The event loop is closed: then nothing is fetched any more.
                loop.call_soon_threadsafe(task.cancel)

        task.add_done_callback(ended)
        arrival.on_give_up = give_up
        return arrival

    async def restore(self, call: EngineCall, manifest: Manifest, num_missing: int) -> Arrival:
        """As `begin`, and returns once everything has come, or has missed. Ends within a bounded time."""
        arrival = await self.begin(call, manifest, num_missing)
        try:
            while not arrival.is_done:
                await asyncio.wait(self._fetches, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            arrival.give_up()
            raise
        return arrival

    async def stop(self) -> None:
        """Gives up what is under way."""
        await end_tasks(list(self._fetches))

    def _patience_s(self, call: EngineCall, plan: Plan) -> float:
        left_s = None if call.deadline is None else call.deadline - self._clock()
        return fetch_timeout_s(left_s, self._speeds.prefill_s(plan.num_tokens))

    async def _fetch(self, call: EngineCall, manifest: Manifest, plan: Plan, arrival: Arrival) -> None:
        started = self._clock()
        try:
            with TRACING.span("tier.fetch", session_id=call.session_id) as note:
                await self._reader.fetch(plan, arrival, self._patience_s(call, plan))
                misses = sum(arrival.misses.values())
                note({"tier.bytes": arrival.num_bytes, "tokens": arrival.num_tokens, "misses": misses})
            num_groups = max(0, arrival.num_tokens - SINK_TOKENS) // GROUP_TOKENS
            self._known_missing.note(call.session_id, manifest.epoch, manifest.version, num_groups, arrival.misses)
        finally:
            seconds = self._clock() - started
            self._speeds.note_fetch(arrival.num_bytes, seconds)
            self._fetched += 1
            self._misses.update(arrival.misses)
            self._restored_tokens += arrival.num_tokens
            logger.info(
                "session_fetched",
                extra={
                    "session_id": call.session_id,
                    "tokens": arrival.num_tokens,
                    "of_tokens": plan.num_tokens,
                    "seconds": round(seconds, 4),
                    "misses": dict(arrival.misses),
                },
            )


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


def _window(manifest: Manifest) -> StoredWindow | None:
    window = manifest.window
    return None if window is None else StoredWindow(window.home, window.start, window.stop, window.chunk_hash)


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else (1 - SMOOTHING) * old + SMOOTHING * new
