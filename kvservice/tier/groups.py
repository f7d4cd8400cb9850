"""From the engine's groups to frames: one value for each group of 64 tokens. Knows nothing of engines or Redis."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from kvservice.tier.wire import FORMAT_VERSION, FrameHeader, FrameRole, chunk_hash
from kvservice.tier.writer import WriteBehind
from kvservice.types import GROUP_TOKENS, SINK_TOKENS, SessionId, TierStats

FINGERPRINT_BYTES = 16

RECHECK_S = 1.0
"""How long a group from decoding waits for room at a time."""


def kv_fingerprint(**facts: str | int | float) -> bytes:
    """Stands for all that shapes stored KV: `facts` of the model and tokenizer, and this service's own alignment."""
    ours = {"sink_tokens": SINK_TOKENS, "group_tokens": GROUP_TOKENS, "frame_format": FORMAT_VERSION}
    text = json.dumps({**facts, **ours}, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=FINGERPRINT_BYTES, person=b"kv1-fingerprint").digest()


class GroupFrames:
    """Hands each group to a `WriteBehind` as one frame. For one thread, the engine's.

    Args:
        frames: started, and closed, by the caller.
        fingerprint: made by `kv_fingerprint`.
        group_bytes: of the KV of one group.
    """

    def __init__(self, frames: WriteBehind, fingerprint: bytes, group_bytes: int) -> None:
        self._frames = frames
        self._fingerprint = fingerprint
        self._group_bytes = group_bytes

    def has_room(self, num_groups: int) -> bool:
        """Whether that many groups can be taken now."""
        return self._frames.has_room(num_groups * self._group_bytes)

    def wait_for_room(self, num_groups: int, timeout_s: float) -> None:
        """Blocks until there is room, at most `timeout_s`."""
        self._frames.wait_for_room(num_groups * self._group_bytes, timeout_s)

    def write(
        self, tenant_tag: bytes, session_id: SessionId, first_group: int, token_ids: Sequence[int], groups: Tensor
    ) -> None:
        """Queues groups `[n, layers, kv, 64, 2, d]`, whose memory must not change any more.

        `token_ids` are all tokens up to the end of the last group. Blocks while there is no room, which only groups
        that decoding filled can meet: before prefill the engine asks `has_room`. A tier that is away ends the wait.
        """
        hashes = _group_hashes(tenant_tag, token_ids, first_group)
        for index, (name, group) in enumerate(zip(hashes, groups, strict=True), start=first_group):
            start = SINK_TOKENS + index * GROUP_TOKENS
            header = FrameHeader(
                tenant_tag=tenant_tag,
                session_id=session_id,
                fingerprint=self._fingerprint,
                layer_group=0,
                role=FrameRole.KV,
                chunk_hash=name,
                start=start,
                stop=start + GROUP_TOKENS,
                shape=tuple(group.shape),
                dtype=str(group.dtype).removeprefix("torch."),
            )
            while not self._frames.submit(header, _memory(group)):
                self._frames.wait_for_room(self._group_bytes, RECHECK_S)

    def delete(self, tenant_tag: bytes, session_id: SessionId) -> None:
        """Deletes all frames of a session, in time."""
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


def _group_hashes(tenant_tag: bytes, token_ids: Sequence[int], first_group: int) -> list[bytes]:
    """A hash for each group from `first_group` on, each standing for all tokens up to the group's end."""
    name = chunk_hash(tenant_tag, b"", token_ids[:SINK_TOKENS])
    names = []
    for start in range(SINK_TOKENS, len(token_ids), GROUP_TOKENS):
        name = chunk_hash(tenant_tag, name, token_ids[start : start + GROUP_TOKENS])
        names.append(name)
    return names[first_group:]


def _memory(group: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return group.view(torch.uint8).numpy().data.cast("B")
