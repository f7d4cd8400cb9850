"""Brings the groups of a session from a tier into memory. Knows nothing of engines, manifests or sessions' owners.

    chunks that a manifest names ── those whose names are of the session's tokens, from group 0 without a gap ──► frames
    ──► FrameReader ──► memory in the host tier's form; up to the first chunk that misses a frame

The window comes first, then chunk by chunk: what is there at any time is the beginning of the session, to be put in its
place and indexed while the rest is on its way.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvservice.tier.chunks import chain, chunk_name, window_end
from kvservice.tier.frame_sets import Chunk, FrameSet
from kvservice.tier.reader import FrameFetch, FrameRead, FrameReader, FrameWant, ReaderStats
from kvservice.types import GROUP_TOKENS, SINK_TOKENS, Reached, RestoredWindow, SessionId


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk as a manifest names it: where its frames lie, and what it says that it is."""

    home: SessionId
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class StoredWindow:
    """A window's frames as a manifest names them."""

    home: SessionId
    start: int
    stop: int
    name: bytes


class Arrival:
    """What is fetched of a session, as it comes: a `RestoredKv`. One thread fills it, any may read it.

    Args:
        reached: how the session's tokens were computed.
        plan: what is fetched; None: nothing, and it is done.

    Attributes:
        on_give_up: called when nobody wants the rest, from any thread; must neither block nor raise.
        num_bytes: raw ones that were read, in vain or not.
        misses: frames that weren't read, by reason.
    """

    def __init__(self, reached: Reached, plan: Plan | None) -> None:
        self.on_give_up: Callable[[], None] | None = None
        self.num_bytes = 0
        self.misses: Counter[str] = Counter()
        self._reached = reached
        self._wanted_groups = plan.num_groups if plan is not None else 0
        self._wanted_tokens = plan.num_tokens if plan is not None else 0
        self._memory = plan.memory if plan is not None else memoryview(b"")
        self._window = plan.window if plan is not None else None
        self._awaits_window = self._window is not None
        self._num_arrived = 0
        self._is_done = plan is None
        self._changed = threading.Event()

    @property
    def reached(self) -> Reached:
        """See `RestoredKv`."""
        return self._reached

    @property
    def num_groups(self) -> int:
        """See `RestoredKv`."""
        return self._num_arrived if self._is_done else self._wanted_groups

    @property
    def num_arrived(self) -> int:
        """See `RestoredKv`."""
        return self._num_arrived

    @property
    def memory(self) -> memoryview:
        """See `RestoredKv`."""
        return self._memory

    @property
    def awaits_window(self) -> bool:
        """See `RestoredKv`."""
        return self._awaits_window

    @property
    def window(self) -> RestoredWindow | None:
        """See `RestoredKv`."""
        return None if self._awaits_window else self._window

    @property
    def is_done(self) -> bool:
        """See `RestoredKv`."""
        return self._is_done

    @property
    def num_tokens(self) -> int:
        """See `RestoredKv`."""
        if not self._is_done:
            return self._wanted_tokens
        groups = SINK_TOKENS + self._num_arrived * GROUP_TOKENS if self._num_arrived else 0
        window = self.window
        return window.stop if window is not None and window.start == groups else groups

    def wait(self, timeout_s: float) -> None:
        """See `RestoredKv`."""
        self._changed.wait(timeout_s)
        self._changed.clear()

    def give_up(self) -> None:
        """See `RestoredKv`."""
        if not self._is_done and self.on_give_up is not None:
            self.on_give_up()

    def note_window(self, *, came: bool) -> None:
        """The window is there, or will not be."""
        self._window = self._window if came else None
        self._awaits_window = False
        self._changed.set()

    def note_groups(self, num_groups: int) -> None:
        """So many leading groups are there."""
        self._num_arrived = num_groups
        self._changed.set()

    def end(self) -> None:
        """Nothing more comes."""
        if self._awaits_window:
            self.note_window(came=False)
        self._is_done = True
        self._changed.set()


def nothing(reached: Reached) -> Arrival:
    """What is there when nothing is fetched."""
    return Arrival(reached, None)


def usable(tenant_tag: bytes, token_ids: Sequence[int], chunks: Sequence[StoredChunk], codec: str) -> list[StoredChunk]:
    """The chunks that stand for these tokens: those that follow one another from group 0 on.

    A chunk's name is a hash of all tokens up to its end: KV of other tokens is never taken, whatever a manifest says.
    """
    ends = chain(tenant_tag, token_ids)
    found: list[StoredChunk] = []
    following = 0
    for stored in sorted(chunks, key=lambda each: (each.chunk.first_group, each.chunk.stop_group)):
        first, stop = stored.chunk.first_group, stored.chunk.stop_group
        if first != following or not first < stop <= len(ends):
            continue
        # As `GroupFrames` names it.
        if stored.chunk.name == chunk_name(tenant_tag, ends[stop - 1], stored.chunk.start, codec):
            found.append(stored)
            following = stop
    return found


def usable_window(
    tenant_tag: bytes, token_ids: Sequence[int], window: StoredWindow | None, chunks: Sequence[StoredChunk]
) -> StoredWindow | None:
    """The window, if it stands for these tokens, and `chunks` lead up to it."""
    if window is None or not chunks or not window.start < window.stop <= len(token_ids):
        return None
    if SINK_TOKENS + chunks[-1].chunk.stop_group * GROUP_TOKENS != window.start:
        return None
    ends = chain(tenant_tag, token_ids[: window.start])
    end = window_end(tenant_tag, ends, window.start, token_ids[: window.stop])
    return window if window.name == chunk_name(tenant_tag, end, window.start, "raw") else None


class Plan:
    """What to fetch of a session, and where to.

    Args:
        frame_set: what the frames look like.
        tenant_tag: whose they are.
        chunks: that follow one another from group 0 on.
        window: behind them, if there is one.

    Attributes:
        num_groups: leading groups of the session.
        memory: for them, in the host tier's form.
        window: with memory for it.
        wants: the frames, in the order in which they are needed.
        num_bytes: raw ones.
    """

    def __init__(
        self, frame_set: FrameSet, tenant_tag: bytes, chunks: Sequence[StoredChunk], window: StoredWindow | None
    ) -> None:
        self._chunks = chunks
        self.num_groups = chunks[-1].chunk.stop_group if chunks else 0
        # Not zeroed: pages are touched when the values come.
        self.memory = np.empty(self.num_groups * frame_set.group_bytes, dtype=np.uint8).data
        self.window: RestoredWindow | None = None
        self.wants: list[FrameWant] = []
        # Frames of one place follow one another.
        self._last_of_places: set[int] = set()
        self._next_chunk = 0
        self._has_gap = self._misses_window = False
        if window is not None:
            num_bytes = frame_set.window_bytes(window.stop - window.start)
            self.window = RestoredWindow(window.start, window.stop, np.empty(num_bytes, dtype=np.uint8).data)
            headers = frame_set.window_headers(tenant_tag, window.home, window.start, window.stop, window.name)
            pieces = _split(self.window.memory, len(headers))
            self._add([FrameWant(header, [piece]) for header, piece in zip(headers, pieces, strict=True)])
        for stored in chunks:
            self._add(self._wants(frame_set, tenant_tag, stored))
        self.num_bytes = len(self.memory) + (len(self.window.memory) if self.window is not None else 0)

    @property
    def num_tokens(self) -> int:
        """Tokens of the session that needn't be computed if all comes."""
        return self.window.stop if self.window is not None else SINK_TOKENS + self.num_groups * GROUP_TOKENS

    def follow(self, arrival: Arrival, results: Sequence[FrameRead]) -> None:
        """Tells of further results, in the order asked for."""
        for result in results:
            if result.miss is None:
                arrival.num_bytes += self.wants[result.index].header.raw_bytes
            else:
                arrival.misses[result.miss.value] += 1
                self._has_gap |= not arrival.awaits_window
                self._misses_window |= arrival.awaits_window
            if result.index not in self._last_of_places:
                continue
            if arrival.awaits_window:
                arrival.note_window(came=not self._misses_window)
            elif not self._has_gap:
                arrival.note_groups(self._chunks[self._next_chunk].chunk.stop_group)
                self._next_chunk += 1

    def _add(self, wants: list[FrameWant]) -> None:
        self.wants += wants
        self._last_of_places.add(len(self.wants) - 1)

    def _wants(self, frame_set: FrameSet, tenant_tag: bytes, stored: StoredChunk) -> list[FrameWant]:
        chunk, group_bytes = stored.chunk, frame_set.group_bytes
        groups = [
            frame_set.parts_of(self.memory[group * group_bytes : (group + 1) * group_bytes])
            for group in range(chunk.first_group, chunk.stop_group)
        ]
        headers = frame_set.headers(tenant_tag, stored.home, chunk)
        pieces = zip(*groups, strict=True)
        return [FrameWant(header, list(parts)) for header, parts in zip(headers, pieces, strict=True)]


def _split(memory: memoryview, parts: int) -> list[memoryview]:
    size = len(memory) // parts
    return [memory[start : start + size] for start in range(0, len(memory), size)]


class GroupReader:
    """Reads groups by a `FrameReader`, which the caller closes. For one event loop."""

    def __init__(self, reader: FrameReader) -> None:
        self._reader = reader

    def stats(self) -> ReaderStats:
        """Of the reader below."""
        return self._reader.stats()

    async def fetch(self, plan: Plan, arrival: Arrival, timeout_s: float) -> None:
        """Brings what was planned, and ends `arrival`. Returns soon after `timeout_s`; raises nothing.

        Cancelling it gives up what hasn't arrived; its memory lives until the reader is through with it.
        """
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(arrived.set)
            except RuntimeError:
                # The event loop is closed: nobody waits any more.
                return

        # The reader's clock is time.monotonic, as the loop's is.
        fetch: FrameFetch = self._reader.fetch(plan.wants, loop.time() + timeout_s, wake)
        try:
            while True:
                plan.follow(arrival, fetch.ready())
                if fetch.is_done:
                    return
                try:
                    async with asyncio.timeout(timeout_s):
                        await arrived.wait()
                except TimeoutError:
                    # What is queued behind others ends by being looked at.
                    continue
                arrived.clear()
        finally:
            if not fetch.is_done:
                fetch.cancel()
            arrival.end()
