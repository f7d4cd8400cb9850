"""How KV lies in memory, on the device and in host memory. Knows nothing of who uses it.

Device: the arena is cut into *blocks* of 16 tokens of one *cell*, a cell being one (layer, K or V, KV head) of one
sequence. A sequence's block table has a row for each cell, and each (layer, KV head) may hold other tokens than the
next, and more or fewer of them: `kv.sequence` knows the position in every slot.

    cell = (layer * 2 + K or V) * num_kv_heads + kv_head

Host: a *group* of 64 tokens of all layers is one contiguous piece, `[layer, kv, token, K or V, d]`, so that K and V
of a recalled token are one row of memory, and a group is one frame of the tier below. Where layers share keys, a group
is `[pair, token, side, d]`: see `SharedGroups`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvservice.types import BLOCK_TOKENS, GROUP_TOKENS, ModelShape

BLOCKS_PER_GROUP = GROUP_TOKENS // BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The sizes that every tensor of KV is made of."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    keys_rotated: bool = True
    """Whether keys are stored after rotation by their position. Recorded in stored frames, by the fingerprint."""

    @classmethod
    def of(cls, shape: ModelShape, dtype: torch.dtype) -> KVLayout:
        """The layout of a model's KV in `dtype`.

        Raises:
            ValueError: `shape.dtype_bytes` is another width than `dtype`'s, so byte arithmetic would be wrong.
        """
        if shape.dtype_bytes != dtype.itemsize:
            raise ValueError(f"shape.dtype_bytes={shape.dtype_bytes}, but {dtype} has {dtype.itemsize}")
        return cls(shape.num_layers, shape.num_kv_heads, shape.head_dim, dtype)

    @property
    def num_cells(self) -> int:
        """Cells of a sequence."""
        return 2 * self.num_layers * self.num_kv_heads

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return BLOCK_TOKENS * self.head_dim * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of K and V of one token in one layer and KV head."""
        return 2 * self.head_dim * self.dtype.itemsize

    @property
    def group_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of a host group: `[layers, kv, 64, 2, d]`."""
        return (self.num_layers, self.num_kv_heads, GROUP_TOKENS, 2, self.head_dim)

    @property
    def group_bytes(self) -> int:
        """Bytes of a host group."""
        return self.num_layers * self.num_kv_heads * GROUP_TOKENS * self.row_bytes

    def group_slots(self, blocks: Tensor) -> Tensor:
        """Arena slots of whole groups, in the order that host groups have.

        Args:
            blocks: `[cells, 4 * n]`, of `n` groups.

        Returns:
            int64 `[n, layers, kv, 64, 2]`, contiguous.
        """
        cells = (self.num_layers, 2, self.num_kv_heads, -1, BLOCKS_PER_GROUP)
        first = (blocks.long() * BLOCK_TOKENS).reshape(cells).permute(3, 0, 2, 4, 1).unsqueeze(4)
        slots = first + torch.arange(BLOCK_TOKENS, device=blocks.device).view(-1, 1)
        return slots.flatten(3, 4)

    def groups_to_cells(self, groups: Tensor) -> Tensor:
        """The inverse of `cells_to_groups`."""
        n = groups.shape[0]
        tokens = groups.permute(1, 4, 2, 0, 3, 5)
        return tokens.reshape(self.num_cells, n * BLOCKS_PER_GROUP, BLOCK_TOKENS, self.head_dim)


class GroupLayout(Protocol):
    """How groups lie in host memory, as rows of numbers.

    Attributes:
        shape: of a group.
        row_numbers: numbers of a row. A token's K and V are one row after the other, or one row together.
        rows_per_token: rows from one token of a cell to the next.
        row_offsets: int64 `[layers, kv, rows]`, the rows of token 0 of each (layer, KV head), counted from the group's
            start, that hold its K and V one behind the other.
    """

    shape: tuple[int, ...]
    row_numbers: int
    rows_per_token: int
    row_offsets: Tensor

    @property
    def group_bytes(self) -> int:
        """Bytes of a group."""
        ...

    def pack(self, groups: Tensor) -> Tensor:
        """From whole groups `[n, layers, kv, 64, 2, d]` to what is stored of them, `[n, *shape]`, contiguous."""
        ...


class WholeGroups:
    """Everything is stored, as `[layer, kv, token, K or V, d]`."""

    rows_per_token = 1

    def __init__(self, layout: KVLayout) -> None:
        cells = layout.num_layers * layout.num_kv_heads
        self.shape: tuple[int, ...] = layout.group_shape
        self.row_numbers = 2 * layout.head_dim
        self.row_offsets = (torch.arange(cells) * GROUP_TOKENS).view(layout.num_layers, layout.num_kv_heads, 1)
        self.group_bytes = layout.group_bytes

    def pack(self, groups: Tensor) -> Tensor:
        """See `GroupLayout`: as they are."""
        return groups


class SharedGroups:
    """Every value is stored, and of keys those of anchors: the others attend to their anchor's.

    A group is `[pair, token, side, d]`. An anchor's K and V are the sides of one pair, as in `WholeGroups`; behind
    those lie the values of the others, two to a pair. So all tokens of a cell are equally far apart. Of an odd number
    of others the last side is left empty.

    Args:
        layout: of whole KV.
        anchors: `[kv][l]`, the layer whose keys a (layer, KV head) attends to.

    Attributes:
        key_layers: int64 `[layers, kv]`, `anchors`.
        own: int64 `[cells with keys]`, the (layer, KV head)s that are their own anchors, `layer * num_kv + kv_head`.
        followers: int64 `[cells without]`, the others.
    """

    rows_per_token = 2

    def __init__(self, layout: KVLayout, anchors: Sequence[Sequence[int]]) -> None:
        num_layers, num_kv, dim = layout.num_layers, layout.num_kv_heads, layout.head_dim
        self.key_layers = torch.tensor(anchors).t().contiguous()
        if self.key_layers.shape != (num_layers, num_kv):
            raise ValueError(f"anchors are {tuple(self.key_layers.shape)}: the KV has {num_layers} x {num_kv}")
        is_own = (self.key_layers == torch.arange(num_layers).unsqueeze(1)).flatten()
        self.own, self.followers = is_own.nonzero()[:, 0], (~is_own).nonzero()[:, 0]
        num_pairs = self.own.numel() + -(-self.followers.numel() // 2)
        self.shape: tuple[int, ...] = (num_pairs, GROUP_TOKENS, 2, dim)
        self.row_numbers = dim
        self.group_bytes = num_pairs * GROUP_TOKENS * layout.row_bytes
        sides = torch.empty(2, num_layers * num_kv, dtype=torch.int64)  # K, V; 2 * pair + side
        sides[0, self.own] = 2 * torch.arange(self.own.numel())
        sides[0] = sides[0].view(num_layers, num_kv).gather(0, self.key_layers).flatten()
        sides[1, self.own] = sides[0, self.own] + 1
        sides[1, self.followers] = 2 * self.own.numel() + torch.arange(self.followers.numel())
        rows = sides // 2 * (2 * GROUP_TOKENS) + sides % 2
        self.row_offsets = rows.t().contiguous().view(num_layers, num_kv, 2)
        self._layout = layout

    @property
    def dropped_bytes(self) -> int:
        """Bytes of a group's keys that aren't stored."""
        return self.followers.numel() * GROUP_TOKENS * self._layout.row_bytes // 2

    def pack(self, groups: Tensor) -> Tensor:
        """See `GroupLayout`."""
        cells = groups.flatten(1, 2)
        num_own = self.own.numel()
        packed = groups.new_zeros(groups.shape[0], *self.shape)
        packed[:, :num_own] = cells[:, self.own]
        for side in range(2):
            values = cells[:, self.followers[side::2], :, 1]
            packed[:, num_own : num_own + values.shape[1], :, side] = values
        return packed

    def dropped_keys(self, groups: Tensor) -> Tensor:
        """What `pack` leaves out of whole groups: keys, `[n, followers, 64, d]`."""
        return groups.flatten(1, 2)[:, self.followers, :, 0]

    def unpack(self, packed: Tensor, dropped_keys: Tensor | None = None) -> Tensor:
        """Whole groups again: the inverse of `pack` and `dropped_keys`. Without these, zeros are in their place."""
        layout, num_own = self._layout, self.own.numel()
        cells = packed.new_empty(
            packed.shape[0], layout.num_layers * layout.num_kv_heads, GROUP_TOKENS, 2, layout.head_dim
        )
        cells[:, self.own] = packed[:, :num_own]
        sides = packed[:, num_own:].permute(0, 1, 3, 2, 4).flatten(1, 2)  # [n, 2 * pairs, 64, d]
        cells[:, self.followers, :, 1] = sides[:, : self.followers.numel()]
        cells[:, self.followers, :, 0] = 0.0 if dropped_keys is None else dropped_keys
        return cells.view(packed.shape[0], *layout.group_shape)
