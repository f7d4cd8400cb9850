"""Brings the groups of a session from a tier into memory. Knows nothing of engines, manifests or sessions' owners.

    chunks that a manifest names ── those whose names are of the session's tokens, from group 0 without a gap ──► frames
    ──► FrameReader ──► memory in the host tier's form; up to the first chunk that misses a frame

Whoever waits for all of it waits for nothing else, so frames come chunk by chunk: what is there by the deadline is the
beginning of the session.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvservice.tier.chunks import chain, chunk_name
from kvservice.tier.groups import Chunk, FrameSet
from kvservice.tier.reader import FrameFetch, FrameRead, FrameReader, FrameWant, ReaderStats
from kvservice.types import SessionId


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk as a manifest names it: where its frames lie, and what it says that it is."""

    home: SessionId
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class FetchedGroups:
    """What came.

    Attributes:
        num_groups: from group 0 on.
        memory: theirs, `[num_groups, layers, kv, 64, 2, d]`.
        num_bytes: raw ones that were read, in vain or not.
        misses: frames that weren't read, by reason.
    """

    num_groups: int = 0
    memory: memoryview = field(default_factory=lambda: memoryview(b""))
    num_bytes: int = 0
    misses: Mapping[str, int] = field(default_factory=dict)


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


class GroupReader:
    """Reads groups by a `FrameReader`, which the caller closes. For one event loop; `serve` for any thread."""

    def __init__(self, reader: FrameReader) -> None:
        self._reader = reader
        self._set: FrameSet | None = None

    def serve(self, frame_set: FrameSet) -> None:
        """Says what the frames of the worker's model look like. Before that nothing can be read."""
        self._set = frame_set

    @property
    def fingerprint(self) -> bytes:
        """Of the frames that can be read; empty before `serve`."""
        return self._set.fingerprint if self._set is not None else b""

    @property
    def group_bytes(self) -> int:
        """Raw bytes of a group; 0 before `serve`."""
        return self._set.group_bytes if self._set is not None else 0

    def stats(self) -> ReaderStats:
        """Of the reader below."""
        return self._reader.stats()

    async def fetch(self, tenant_tag: bytes, chunks: Sequence[StoredChunk], timeout_s: float) -> FetchedGroups:
        """Brings chunks that follow one another from group 0 on. Ends soon after `timeout_s`; never raises.

        Cancelling it gives up what hasn't arrived; its memory lives until the reader is through with it.
        """
        if self._set is None or not chunks:
            return FetchedGroups()
        num_groups = chunks[-1].chunk.stop_group
        group_bytes = self._set.group_bytes
        # Not zeroed: pages are touched when the values come.
        memory = np.empty(num_groups * group_bytes, dtype=np.uint8).data
        wants = [want for stored in chunks for want in self._wants(tenant_tag, stored, memory)]
        results = await self._results(wants, timeout_s)
        misses = Counter(result.miss.value for result in results if result.miss is not None)
        layers = self._set.group_shape[0]
        whole = 0
        for index, stored in enumerate(chunks):
            if any(result.miss for result in results[index * layers : (index + 1) * layers]):
                break
            whole = stored.chunk.stop_group
        num_bytes = sum(wants[result.index].header.raw_bytes for result in results if result.miss is None)
        return FetchedGroups(whole, memory[: whole * group_bytes], num_bytes, misses)

    def _wants(self, tenant_tag: bytes, stored: StoredChunk, memory: memoryview) -> list[FrameWant]:
        assert self._set is not None
        chunk, group_bytes = stored.chunk, self._set.group_bytes
        layer_bytes = group_bytes // self._set.group_shape[0]
        return [
            FrameWant(
                header,
                [
                    memory[start : start + layer_bytes]
                    for group in range(chunk.first_group, chunk.stop_group)
                    for start in [group * group_bytes + layer * layer_bytes]
                ],
            )
            for layer, header in enumerate(self._set.headers(tenant_tag, stored.home, chunk))
        ]

    async def _results(self, wants: Sequence[FrameWant], timeout_s: float) -> list[FrameRead]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(arrived.set)
            except RuntimeError:
                # The event loop is closed: nobody waits any more.
                return

        # The reader's clock is time.monotonic, as the loop's is.
        fetch: FrameFetch = self._reader.fetch(wants, loop.time() + timeout_s, wake)
        results: list[FrameRead] = []
        try:
            while True:
                results += fetch.ready()
                if fetch.is_done:
                    return results
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
