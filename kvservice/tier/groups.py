"""From the engine's groups to frames: chunks of groups, one frame for each layer. Knows nothing of engines or Redis.

    groups of 64 ──► tail of the session: a chunk that isn't full yet ── full ──► a frame for each layer ──► WriteBehind
                                                                      └─ checkpoint ──► the same of what there is

A checkpoint's frames are replaced when the chunk has grown: by others under other names, so that whoever reads the old
ones meanwhile reads them whole. Without PoD a layer group is one layer with all its KV heads.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from kvservice.tier.chunks import chain, chunk_name, groups_per_chunk, window_end
from kvservice.tier.codecs import check_codec, expected_bytes
from kvservice.tier.header import FrameHeader, FrameRole
from kvservice.tier.writer import WriteBehind
from kvservice.types import GROUP_TOKENS, SINK_TOKENS, SessionId, TierStats

FINGERPRINT_BYTES = 16
PAYLOAD_VERSION = 1
"""Of what a payload's bytes mean. A frame's header may change without it."""

_Session = tuple[bytes, SessionId]

RECHECK_S = 1.0
"""How long a group from decoding waits for room at a time."""
MAX_TAIL_BYTES = 256 << 20
"""KV of chunks that aren't full. When there is more, the session that was longest without a group gives up its tail:
written as a checkpoint, and what follows there is a shorter chunk."""


def kv_fingerprint(**facts: str | int | float) -> bytes:
    """Stands for all that shapes stored KV: `facts` of the model and tokenizer, and this service's own alignment."""
    ours = {"sink_tokens": SINK_TOKENS, "group_tokens": GROUP_TOKENS, "frame_format": PAYLOAD_VERSION}
    text = json.dumps({**facts, **ours}, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=FINGERPRINT_BYTES, person=b"kv1-fingerprint").digest()


@dataclass(frozen=True, slots=True)
class FrameSet:
    """How the groups of a model become frames: what names them, and what they look like.

    Attributes:
        fingerprint: made by `kv_fingerprint`.
        group_shape: of the KV of one group, `[layers, kv, 64, 2, d]`.
        dtype: of the KV, as torch names it.
        codec: one of `codecs.CODECS`.
    """

    fingerprint: bytes
    group_shape: tuple[int, int, int, int, int]
    dtype: torch.dtype
    codec: str = "raw"

    @property
    def group_bytes(self) -> int:
        """Raw bytes of the KV of one group, all layers."""
        return prod(self.group_shape) * self.dtype.itemsize

    @property
    def chunk_groups(self) -> int:
        """Groups of a full chunk."""
        layer = self.group_shape[1:]
        return groups_per_chunk(expected_bytes(self.codec, FrameRole.KV, (1, *layer), self._dtype))

    @property
    def _dtype(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def headers(self, tenant_tag: bytes, session_id: SessionId, chunk: Chunk) -> list[FrameHeader]:
        """The headers of a chunk's frames, a layer each, in the order of layers."""
        start = SINK_TOKENS + chunk.first_group * GROUP_TOKENS
        stop = SINK_TOKENS + chunk.stop_group * GROUP_TOKENS
        return [
            FrameHeader(
                tenant_tag=tenant_tag,
                session_id=session_id,
                fingerprint=self.fingerprint,
                layer_group=layer,
                role=FrameRole.KV,
                chunk_hash=chunk.name,
                start=start,
                stop=stop,
                shape=(chunk.stop_group - chunk.first_group, *self.group_shape[1:]),
                dtype=self._dtype,
                codec=self.codec,
            )
            for layer in range(self.group_shape[0])
        ]

    def window_headers(
        self, tenant_tag: bytes, session_id: SessionId, start: int, stop: int, name: bytes
    ) -> list[FrameHeader]:
        """The headers of a window's frames, a layer each: sinks, and tokens from `start` to `stop - 1`. Never lossy."""
        layers, num_kv, _, _, head_dim = self.group_shape
        return [
            FrameHeader(
                tenant_tag=tenant_tag,
                session_id=session_id,
                fingerprint=self.fingerprint,
                layer_group=layer,
                role=FrameRole.WINDOW,
                chunk_hash=name,
                start=start,
                stop=stop,
                shape=(1, num_kv, SINK_TOKENS + stop - start, 2, head_dim),
                dtype=self._dtype,
            )
            for layer in range(layers)
        ]

    def window_bytes(self, num_tokens: int) -> int:
        """Raw bytes of the sinks and so many tokens, all layers."""
        return self.group_bytes // GROUP_TOKENS * (SINK_TOKENS + num_tokens)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Groups `[first_group, stop_group)` of a session, in frames under one name."""

    first_group: int
    stop_group: int
    name: bytes

    @property
    def start(self) -> int:
        """Its first token position."""
        return SINK_TOKENS + self.first_group * GROUP_TOKENS


def layer_memory(group: Tensor) -> list[memoryview]:
    """The memory of each layer of a contiguous group `[layers, ...]` on the CPU, to be read or written. No copy."""
    return [layer.view(torch.uint8).numpy().data.cast("B") for layer in group]


@dataclass(slots=True)
class _Tail:
    """Groups of a chunk that isn't full."""

    first_group: int
    groups: list[Tensor] = field(default_factory=list)
    ends: list[bytes] = field(default_factory=list)
    """The chain's hash of each group."""
    num_submitted: int = 0
    """Groups of the last checkpoint."""

    @property
    def stop_group(self) -> int:
        return self.first_group + len(self.groups)


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
        frame_set: how groups become frames.
        max_tail_bytes: see `MAX_TAIL_BYTES`.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        frames: WriteBehind,
        frame_set: FrameSet,
        *,
        max_tail_bytes: int = MAX_TAIL_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_codec(frame_set.codec)
        self._clock = clock
        self._frames = frames
        self._set = frame_set
        self._chunk_groups = frame_set.chunk_groups
        self._max_tail_groups = max(1, max_tail_bytes // frame_set.group_bytes)
        # That of the session longest without a group comes first.
        self._tails: OrderedDict[_Session, _Tail] = OrderedDict()
        self._num_tail_groups = 0
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
        self, tenant_tag: bytes, session_id: SessionId, first_group: int, token_ids: Sequence[int], groups: Tensor
    ) -> None:
        """Takes groups `[n, layers, kv, 64, 2, d]`, whose memory must not change any more.

        `token_ids` are all tokens up to the end of the last group. Full chunks are queued, what is left waits for more.
        Groups that don't follow on the session's last begin a shorter chunk, unless a chunk begins with them. Blocks
        while there is no room, which only groups that decoding filled can meet: before prefill the engine asks
        `has_room`. A tier that is away ends the wait.
        """
        session = (tenant_tag, session_id)
        ends = chain(tenant_tag, token_ids)
        tail = self._tail_before(session, first_group, ends)
        for index, group in enumerate(groups, start=first_group):
            tail.groups.append(group)
            tail.ends.append(ends[index])
            if (index + 1) % self._chunk_groups == 0:
                self._submit(session, tail)
                tail = _Tail(index + 1)
        # The rest must not keep all of `groups` in memory.
        kept = tail.stop_group - max(first_group, tail.first_group)
        tail.groups[len(tail.groups) - kept :] = [group.clone() for group in tail.groups[len(tail.groups) - kept :]]
        self._keep(session, tail)

    def begins_at(self, tenant_tag: bytes, session_id: SessionId, first_group: int) -> int:
        """From which group on `write` wants groups: from the start of a chunk, if what comes before isn't waiting here.

        So that chunks are the same for a session that was taken back, restored or forked.
        """
        tail = self._tails.get((tenant_tag, session_id))
        if tail is not None and tail.first_group < first_group <= tail.stop_group:
            return first_group
        return first_group // self._chunk_groups * self._chunk_groups

    def checkpoint(self, tenant_tag: bytes, session_id: SessionId) -> None:
        """Queues what there is of a session's last chunk, unless it was queued before. May block like `write`."""
        tail = self._tails.get((tenant_tag, session_id))
        if tail is not None and tail.num_submitted < len(tail.groups):
            self._submit((tenant_tag, session_id), tail)
            tail.num_submitted = len(tail.groups)

    def takes_window(self, num_tokens: int) -> bool:
        """Whether there is room for a window of so many tokens now."""
        return self._frames.has_room(self._set.window_bytes(num_tokens))

    def write_window(
        self, tenant_tag: bytes, session_id: SessionId, start: int, token_ids: Sequence[int], pairs: Tensor
    ) -> None:
        """Takes sinks and window `[layers, kv, n, 2, d]`, whose memory must not change any more; see `takes_window`."""
        ends = chain(tenant_tag, token_ids[:start])
        name = chunk_name(tenant_tag, window_end(tenant_tag, ends, start, token_ids), start, "raw")
        headers = self._set.window_headers(tenant_tag, session_id, start, len(token_ids), name)
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
        return (num_groups + self._chunk_groups - 1) * self._set.group_bytes

    def _tail_before(self, session: _Session, first_group: int, ends: Sequence[bytes]) -> _Tail:
        """Takes the session's tail, cut to what comes before `first_group` in the same text; an empty one if none."""
        tail = self._drop_tail(session)
        with self._lock:
            # What was written of these groups before may be of another text.
            if session in self._submitted:
                self._submitted[session] = [
                    one for one in self._submitted[session] if one.chunk.stop_group <= first_group
                ]
        if tail is None or not tail.first_group < first_group <= tail.stop_group:
            return _Tail(first_group)
        num_groups = first_group - tail.first_group
        if tail.ends[num_groups - 1] != ends[first_group - 1]:
            return _Tail(first_group)
        return _Tail(tail.first_group, tail.groups[:num_groups], tail.ends[:num_groups])

    def _drop_tail(self, session: _Session) -> _Tail | None:
        tail = self._tails.pop(session, None)
        self._num_tail_groups -= len(tail.groups) if tail is not None else 0
        return tail

    def _keep(self, session: _Session, tail: _Tail) -> None:
        if not tail.groups:
            return
        self._tails[session] = tail
        self._num_tail_groups += len(tail.groups)
        while self._num_tail_groups > self._max_tail_groups:
            oldest = next(iter(self._tails))
            self.checkpoint(*oldest)
            self._drop_tail(oldest)

    def _submit(self, session: _Session, tail: _Tail) -> None:
        """Queues the frames of a tail as it is."""
        name = chunk_name(session[0], tail.ends[-1], SINK_TOKENS + tail.first_group * GROUP_TOKENS, self._set.codec)
        chunk = Chunk(tail.first_group, tail.stop_group, name)
        headers = self._set.headers(*session, chunk)
        submitted = _Submitted(chunk, len(headers), self._clock() + self._frames.ttl_s)
        with self._lock:
            self._submitted.setdefault(session, []).append(submitted)
            self._submitted.move_to_end(session)
            self._forget_expired()
        pieces = [layer_memory(group) for group in tail.groups]
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
