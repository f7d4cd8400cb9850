"""From the engine's groups to frames: chunks of groups, one frame for each part. Knows nothing of engines or Redis.

    groups of 64 ──► tail of the session: a chunk that isn't full yet ── full ──► a frame for each part ──► WriteBehind
                                                                      └─ checkpoint ──► the same of what there is

A checkpoint's frames are replaced when the chunk has grown: by others under other names, so that whoever reads the old
ones meanwhile reads them whole. What the parts of a group are, `frame_sets` says.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvservice.tier.chunks import chain, chunk_name, window_end
from kvservice.tier.frame_sets import Chunk, FrameSet, FrameSets
from kvservice.tier.writer import WriteBehind
from kvservice.types import GROUP_TOKENS, SINK_TOKENS, RecipeSpec, SessionId, TierStats

_Session = tuple[bytes, SessionId]

RECHECK_S = 1.0
"""How long a group from decoding waits for room at a time."""
MAX_TAIL_BYTES = 256 << 20
"""KV of chunks that aren't full. When there is more, the session that was longest without a group gives up its tail:
written as a checkpoint, and what follows there is a shorter chunk."""


def group_memory(group: Tensor) -> memoryview:
    """The memory of a contiguous group on the CPU, to be read or written. No copy."""
    return group.view(torch.uint8).numpy().data.cast("B")


def layer_memory(group: Tensor) -> list[memoryview]:
    """That of each layer of a group `[layers, ...]`."""
    return [group_memory(layer) for layer in group]


@dataclass(slots=True)
class _Tail:
    """Groups of a chunk that isn't full."""

    frame_set: FrameSet
    first_group: int
    groups: list[Tensor] = field(default_factory=list)
    ends: list[bytes] = field(default_factory=list)
    """The chain's hash of each group."""
    num_submitted: int = 0
    """Groups of the last checkpoint."""

    @property
    def stop_group(self) -> int:
        return self.first_group + len(self.groups)

    @property
    def num_bytes(self) -> int:
        return len(self.groups) * self.frame_set.group_bytes


@dataclass(slots=True)
class _Submitted:
    chunk: Chunk
    left: int
    """Frames not written: 0 in the end, unless one was given up."""
    expires_at: float


class GroupFrames:
    """Hands groups to a `WriteBehind` as frames. For one thread, the engine's; `chunks_of` for any.

    Args:
        frames: started, and closed, by the caller.
        frame_sets: how groups become frames.
        max_tail_bytes: see `MAX_TAIL_BYTES`.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        frames: WriteBehind,
        frame_sets: FrameSets,
        *,
        max_tail_bytes: int = MAX_TAIL_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._frames = frames
        self._sets = frame_sets
        self._max_tail_bytes = max_tail_bytes
        # That of the session longest without a group comes first.
        self._tails: OrderedDict[_Session, _Tail] = OrderedDict()
        self._tail_bytes = 0
        # The mover thread counts down in it.
        self._lock = threading.Lock()
        self._submitted: OrderedDict[_Session, list[_Submitted]] = OrderedDict()

    @property
    def stores(self) -> bool:
        """It does."""
        return True

    def has_room(self, num_groups: int) -> bool:
        """Whether that many groups can be taken now, and the tail that they may complete."""
        return self._frames.has_room(self._room_for(num_groups))

    def wait_for_room(self, num_groups: int, timeout_s: float) -> None:
        """Blocks until there is room, at most `timeout_s`."""
        self._frames.wait_for_room(self._room_for(num_groups), timeout_s)

    def write(
        self,
        tenant_tag: bytes,
        session_id: SessionId,
        recipe: RecipeSpec,
        first_group: int,
        token_ids: Sequence[int],
        groups: Tensor,
    ) -> None:
        """Takes groups as they lie in host memory, `[n, ...]`, which must not change any more.

        `token_ids` are all tokens up to the end of the last group. Full chunks are queued, what is left waits for more.
        Groups that don't follow on the session's last begin a shorter chunk, unless a chunk begins with them. Blocks
        while there is no room, which only groups that decoding filled can meet: before prefill the engine asks
        `has_room`. A tier that is away ends the wait.
        """
        session = (tenant_tag, session_id)
        ends = chain(tenant_tag, token_ids)
        frame_set = self._sets.of(recipe)
        chunk_groups = frame_set.chunk_groups
        tail = self._tail_before(session, frame_set, first_group, ends)
        for index, group in enumerate(groups, start=first_group):
            tail.groups.append(group)
            tail.ends.append(ends[index])
            if (index + 1) % chunk_groups == 0:
                self._submit(session, tail)
                tail = _Tail(frame_set, index + 1)
        # The rest must not keep all of `groups` in memory.
        kept = tail.stop_group - max(first_group, tail.first_group)
        tail.groups[len(tail.groups) - kept :] = [group.clone() for group in tail.groups[len(tail.groups) - kept :]]
        self._keep(session, tail)

    def begins_at(self, tenant_tag: bytes, session_id: SessionId, recipe: RecipeSpec, first_group: int) -> int:
        """From which group on `write` wants groups: from the start of a chunk, if what comes before isn't waiting here.

        So that chunks are the same for a session that was taken back, restored or forked.
        """
        tail = self._tails.get((tenant_tag, session_id))
        if tail is not None and tail.first_group < first_group <= tail.stop_group:
            return first_group
        chunk_groups = self._sets.of(recipe).chunk_groups
        return first_group // chunk_groups * chunk_groups

    def checkpoint(self, tenant_tag: bytes, session_id: SessionId) -> None:
        """Queues what there is of a session's last chunk, unless it was queued before. May block like `write`."""
        tail = self._tails.get((tenant_tag, session_id))
        if tail is not None and tail.num_submitted < len(tail.groups):
            self._submit((tenant_tag, session_id), tail)
            tail.num_submitted = len(tail.groups)

    def takes_window(self, num_tokens: int) -> bool:
        """Whether there is room for a window of so many tokens now."""
        return self._frames.has_room(self._sets.whole.window_bytes(num_tokens))

    def write_window(
        self,
        tenant_tag: bytes,
        session_id: SessionId,
        recipe: RecipeSpec,
        start: int,
        token_ids: Sequence[int],
        pairs: Tensor,
    ) -> None:
        """Takes sinks and window `[layers, kv, n, 2, d]`, whose memory must not change any more; see `takes_window`."""
        ends = chain(tenant_tag, token_ids[:start])
        name = chunk_name(tenant_tag, window_end(tenant_tag, ends, start, token_ids), start, "raw")
        headers = self._sets.of(recipe).window_headers(tenant_tag, session_id, start, len(token_ids), name)
        for header, payload in zip(headers, layer_memory(pairs), strict=True):
            # The room that was asked for; what others have taken of it meanwhile this goes without.
            self._frames.submit(header, payload)

    def chunks_of(self, tenant_tag: bytes, session_id: SessionId) -> list[Chunk]:
        """What this writer has put into the tier: chunks that follow one another, from group 0 to the first gap."""
        with self._lock:
            written = {
                one.chunk.first_group: one.chunk
                for one in sorted(self._submitted.get((tenant_tag, session_id), ()), key=_stop_of)
                if one.left == 0
            }
        chunks: list[Chunk] = []
        while (following := written.get(chunks[-1].stop_group if chunks else 0)) is not None:
            chunks.append(following)
        return chunks

    def forget(self, session_id: SessionId) -> None:
        """Drops what waits for more of a session's groups; what of it was queued is written."""
        for session in [each for each in self._tails if each[1] == session_id]:
            self._drop_tail(session)

    def delete(self, tenant_tag: bytes, session_id: SessionId) -> None:
        """Deletes all frames of a session, in time."""
        session = (tenant_tag, session_id)
        self._drop_tail(session)
        with self._lock:
            self._submitted.pop(session, None)
        self._frames.delete_session(tenant_tag, session_id)

    def bytes_of(self, tenant_tag: bytes, session_id: SessionId) -> int:
        """Bytes of a session's frames that were written and not deleted."""
        return self._frames.bytes_of(tenant_tag, session_id)

    def stats(self) -> TierStats:
        """What has been written, and what has not."""
        stats = self._frames.stats()
        return TierStats(
            connected=stats.connected,
            written_frames=stats.written_frames,
            written_bytes=stats.written_bytes,
            stored_bytes=stats.stored_bytes,
            pending_frames=stats.pending_frames,
            failures=stats.failures,
        )

    def _room_for(self, num_groups: int) -> int:
        # Those of sessions that share keys are smaller.
        return (num_groups + self._sets.whole.chunk_groups - 1) * self._sets.whole.group_bytes

    def _tail_before(self, session: _Session, frame_set: FrameSet, first_group: int, ends: Sequence[bytes]) -> _Tail:
        """Takes the session's tail, cut to what comes before `first_group` in the same text; an empty one if none."""
        tail = self._drop_tail(session)
        with self._lock:
            # What was written of these groups before may be of another text.
            if session in self._submitted:
                self._submitted[session] = [
                    one for one in self._submitted[session] if one.chunk.stop_group <= first_group
                ]
        if tail is None or not tail.first_group < first_group <= tail.stop_group or tail.frame_set != frame_set:
            return _Tail(frame_set, first_group)
        num_groups = first_group - tail.first_group
        if tail.ends[num_groups - 1] != ends[first_group - 1]:
            return _Tail(frame_set, first_group)
        return _Tail(frame_set, tail.first_group, tail.groups[:num_groups], tail.ends[:num_groups])

    def _drop_tail(self, session: _Session) -> _Tail | None:
        tail = self._tails.pop(session, None)
        self._tail_bytes -= tail.num_bytes if tail is not None else 0
        return tail

    def _keep(self, session: _Session, tail: _Tail) -> None:
        if not tail.groups:
            return
        self._tails[session] = tail
        self._tail_bytes += tail.num_bytes
        while self._tail_bytes > self._max_tail_bytes:
            oldest = next(iter(self._tails))
            self.checkpoint(*oldest)
            self._drop_tail(oldest)

    def _submit(self, session: _Session, tail: _Tail) -> None:
        """Queues the frames of a tail as it is."""
        frame_set = tail.frame_set
        name = chunk_name(session[0], tail.ends[-1], SINK_TOKENS + tail.first_group * GROUP_TOKENS, frame_set.codec)
        chunk = Chunk(tail.first_group, tail.stop_group, name)
        headers = frame_set.headers(*session, chunk)
        submitted = _Submitted(chunk, len(headers), self._clock() + self._frames.ttl_s)
        with self._lock:
            self._submitted.setdefault(session, []).append(submitted)
            self._submitted.move_to_end(session)
            self._forget_expired()
        pieces = [frame_set.parts_of(group_memory(group)) for group in tail.groups]
        for header, payload in zip(headers, zip(*pieces, strict=True), strict=True):
            while not self._frames.submit(header, payload, lambda written: self._count_down(submitted, written)):
                self._frames.wait_for_room(header.raw_bytes, RECHECK_S)

    def _forget_expired(self) -> None:
        while self._submitted:
            session, oldest = next(iter(self._submitted.items()))
            if oldest and oldest[-1].expires_at > self._clock():
                return
            del self._submitted[session]

    def _count_down(self, submitted: _Submitted, written: bool) -> None:
        with self._lock:
            submitted.left -= written


def _stop_of(submitted: _Submitted) -> int:
    return submitted.chunk.stop_group
