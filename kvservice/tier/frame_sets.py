"""What the frames of a model's groups look like, and what names them. Knows nothing of who writes or reads them.

    a group in host memory: rows `[64, 2, d]` ── cut into parts ──► part i of n groups: a frame, layer group i

Without sharing a row is a (layer, KV head), and a part is a layer. Sessions whose layers share distant keys have fewer
rows, in an order of their own (`SharedGroups`), and so as many parts as layers would have these rows.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import torch

from kvservice.errors import InternalError
from kvservice.tier.chunks import groups_per_chunk
from kvservice.tier.codecs import check_codec, expected_bytes
from kvservice.tier.header import FrameHeader, FrameRole
from kvservice.types import GROUP_TOKENS, SINK_TOKENS, RecipeSpec, SessionId

FINGERPRINT_BYTES = 16
PAYLOAD_VERSION = 1
"""Of what a payload's bytes mean. A frame's header may change without it."""


def kv_fingerprint(**facts: str | int | float) -> bytes:
    """Stands for all that shapes stored KV: `facts` of the model and tokenizer, and this service's own alignment."""
    ours = {"sink_tokens": SINK_TOKENS, "group_tokens": GROUP_TOKENS, "frame_format": PAYLOAD_VERSION}
    text = json.dumps({**facts, **ours}, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=FINGERPRINT_BYTES, person=b"kv1-fingerprint").digest()


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


@dataclass(frozen=True, slots=True)
class FrameSet:
    """How groups become frames: what names them, and what they look like.

    Attributes:
        fingerprint: made by `kv_fingerprint`.
        group_shape: of the whole KV of a group, `[layers, kv, 64, 2, d]`.
        dtype: of the KV, as torch names it.
        codec: one of `codecs.CODECS`.
        shared_rows: rows that are stored of a group where layers share keys; None: every (layer, KV head) has its own.

    Raises:
        ConfigError: there is no such codec.
    """

    fingerprint: bytes
    group_shape: tuple[int, int, int, int, int]
    dtype: torch.dtype
    codec: str = "raw"
    shared_rows: int | None = None

    def __post_init__(self) -> None:
        check_codec(self.codec)

    @property
    def group_bytes(self) -> int:
        """Raw bytes of what is stored of a group."""
        return self._num_rows * self._row_bytes

    @property
    def num_parts(self) -> int:
        """Frames of a chunk."""
        return -(-self._num_rows // self.group_shape[1])

    @property
    def part_bytes(self) -> int:
        """Raw bytes of a group in the largest of its frames."""
        return max(self._part_rows) * self._row_bytes

    @property
    def chunk_groups(self) -> int:
        """Groups of a full chunk."""
        shape = (1, max(self._part_rows), *self.group_shape[2:])
        return groups_per_chunk(expected_bytes(self.codec, FrameRole.KV, shape, self._dtype))

    @property
    def _num_rows(self) -> int:
        return self.shared_rows or prod(self.group_shape[:2])

    @property
    def _row_bytes(self) -> int:
        return prod(self.group_shape[2:]) * self.dtype.itemsize

    @property
    def _part_rows(self) -> list[int]:
        """Rows of each part: as many as KV heads, or, where that doesn't come out even, of some one fewer."""
        rows, parts = self._num_rows, self.num_parts
        return [stop - start for start, stop in pairwise(rows * part // parts for part in range(parts + 1))]

    @property
    def _dtype(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def parts_of(self, group: memoryview) -> list[memoryview]:
        """The memory of each part of a group's. No copy."""
        row_bytes = self._row_bytes
        ends = [0, *accumulate(rows * row_bytes for rows in self._part_rows)]
        return [group[start:stop] for start, stop in pairwise(ends)]

    def headers(self, tenant_tag: bytes, session_id: SessionId, chunk: Chunk) -> list[FrameHeader]:
        """The headers of a chunk's frames, one for each part."""
        start = SINK_TOKENS + chunk.first_group * GROUP_TOKENS
        stop = SINK_TOKENS + chunk.stop_group * GROUP_TOKENS
        return [
            FrameHeader(
                tenant_tag=tenant_tag,
                session_id=session_id,
                fingerprint=self.fingerprint,
                layer_group=part,
                role=FrameRole.KV,
                chunk_hash=chunk.name,
                start=start,
                stop=stop,
                shape=(chunk.stop_group - chunk.first_group, rows, *self.group_shape[2:]),
                dtype=self._dtype,
                codec=self.codec,
            )
            for part, rows in enumerate(self._part_rows)
        ]

    def window_headers(
        self, tenant_tag: bytes, session_id: SessionId, start: int, stop: int, name: bytes
    ) -> list[FrameHeader]:
        """The headers of a window's frames, a layer each: sinks, and tokens from `start` to `stop - 1`. Never lossy.

        A window has keys of every layer, whether they are shared behind it or not.
        """
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
        return prod(self.group_shape) * self.dtype.itemsize // GROUP_TOKENS * (SINK_TOKENS + num_tokens)


class FrameSets:
    """The frames of a worker's sessions, by how a session keeps its KV. For any thread, once it is told of a model.

    Args:
        whole: of sessions that share no keys.
        sharing: of those that do; None: there are none.
    """

    def __init__(self, whole: FrameSet | None = None, sharing: FrameSet | None = None) -> None:
        self._whole = whole
        self._sharing = sharing

    def describe(self, whole: FrameSet, sharing: FrameSet | None) -> None:
        """The model is loaded: these are its frames."""
        self._whole, self._sharing = whole, sharing

    @property
    def whole(self) -> FrameSet:
        """Of sessions that share no keys."""
        return _known(self._whole)

    def of(self, recipe: RecipeSpec) -> FrameSet:
        """Of the sessions of a recipe.

        Raises:
            InternalError: there are no such sessions here.
        """
        return _known(self._sharing if recipe.shares_keys else self._whole)

    @property
    def fingerprints(self) -> tuple[bytes, bytes]:
        """Of sessions that share no keys, and of those that do; empty where there are none."""
        return self._whole.fingerprint if self._whole else b"", self._sharing.fingerprint if self._sharing else b""


def _known(frame_set: FrameSet | None) -> FrameSet:
    if frame_set is None:
        raise InternalError("nobody said what the frames of such sessions look like")
    return frame_set
