"""Turns groups that leave the device into frames. Knows nothing of engines or of where frames are kept.

Each group of 64 tokens, all layers, K and V, is one frame. Its key holds a hash of all tokens up to its end, so a
session that goes back and takes another turn writes other keys, and the same text of a tenant the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from kvservice.kv.layout import KVLayout
from kvservice.tier.wire import FrameHeader, FrameRole, chunk_hash
from kvservice.tier.writer import WriteBehind
from kvservice.types import GROUP_TOKENS, SINK_TOKENS, SessionId


def fingerprint(model_digest: str, layout: KVLayout) -> bytes:
    """16 bytes that differ wherever stored KV would: weights, dtype, shape of a group, alignment of groups."""
    parts = f"{model_digest}:{layout.dtype}:{layout.group_shape}:{SINK_TOKENS}:{GROUP_TOKENS}"
    return hashlib.blake2b(parts.encode(), digest_size=16, person=b"kv1-fingerprint").digest()


class GroupPublisher:
    """Writes groups behind the engine: its `GroupWriter`.

    Args:
        writer: started; the caller closes it.
        fingerprint: as `fingerprint` makes it.
        layout: of the groups.
    """

    def __init__(self, writer: WriteBehind, fingerprint: bytes, layout: KVLayout) -> None:
        self._writer = writer
        self._fingerprint = fingerprint
        self._layout = layout

    def has_room(self, num_groups: int) -> bool:
        """Whether that many groups can be taken now. While not, prefill waits."""
        return self._writer.has_room(num_groups * self._layout.group_bytes)

    def wait_for_room(self, num_groups: int, timeout_s: float) -> None:
        """Blocks until there is room, at most `timeout_s`."""
        self._writer.wait_for_room(num_groups * self._layout.group_bytes, timeout_s)

    def write(
        self, tenant_tag: bytes, session_id: SessionId, first_group: int, token_ids: Sequence[int], groups: Tensor
    ) -> None:
        """Takes groups `[n, layers, kv, 64, 2, d]`; the tensor is the writer's from then on.

        Args:
            tenant_tag: stands for the tenant in keys.
            session_id: the session.
            first_group: number of the first group.
            token_ids: all tokens of the session up to the end of the last group: they name the content.
            groups: the KV.
        """
        first = SINK_TOKENS + first_group * GROUP_TOKENS
        content = chunk_hash(tenant_tag, b"", token_ids[:SINK_TOKENS])
        for start in range(SINK_TOKENS, first, GROUP_TOKENS):
            content = chunk_hash(tenant_tag, content, token_ids[start : start + GROUP_TOKENS])
        for number, group in enumerate(groups):
            start = first + number * GROUP_TOKENS
            stop = start + GROUP_TOKENS
            content = chunk_hash(tenant_tag, content, token_ids[start:stop])
            header = FrameHeader(
                tenant_tag=tenant_tag,
                session_id=session_id,
                fingerprint=self._fingerprint,
                layer_group=0,
                role=FrameRole.KV,
                chunk_hash=content,
                start=start,
                stop=stop,
                shape=tuple(group.shape),
                dtype=str(group.dtype).removeprefix("torch."),
            )
            # Decoding adds a group now and then although prefill leaves it room; it may wait for that one.
            while not self._writer.submit(header, memoryview(group.view(torch.uint8).view(-1).numpy())):
                self._writer.wait_for_room(self._layout.group_bytes, timeout_s=1.0)

    def delete(self, tenant_tag: bytes, session_id: SessionId) -> None:
        """Deletes all blobs of a session."""
        self._writer.delete_session(tenant_tag, session_id)

    def bytes_of(self, tenant_tag: bytes, session_id: SessionId) -> int:
        """Bytes written for a session and not deleted."""
        return self._writer.bytes_of(tenant_tag, session_id)

    def total_bytes(self) -> int:
        """Bytes written and not deleted."""
        return self._writer.stats().stored_bytes
