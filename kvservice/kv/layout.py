"""How KV lies in memory, on the device and in host memory. Knows nothing of who uses it.

Device: the arena is cut into *blocks* of 16 tokens of one *cell*, a cell being one (layer, K or V, KV head) of one
sequence. A sequence's block table has a row for each cell, and each (layer, KV head) may hold other tokens than the
next, and more or fewer of them: `kv.sequence` knows the position in every slot.

    cell = (layer * 2 + K or V) * num_kv_heads + kv_head

Host: a *group* of 64 tokens of all layers is one contiguous piece, `[layer, kv, token, K or V, d]`, so that K and V
of a recalled token are one row of memory, and a group is one frame of the tier below.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def cells_to_groups(self, cells: Tensor) -> Tensor:
        """Turns device blocks of whole groups into host groups.

        Args:
            cells: `[cells, 4 * n, 16, d]`, the blocks of `n` groups.

        Returns:
            `[n, layers, kv, 64, 2, d]`, contiguous.
        """
        n = cells.shape[1] // BLOCKS_PER_GROUP
        tokens = cells.reshape(self.num_layers, 2, self.num_kv_heads, n, GROUP_TOKENS, self.head_dim)
        return tokens.permute(3, 0, 2, 4, 1, 5).contiguous()

    def groups_to_cells(self, groups: Tensor) -> Tensor:
        """The inverse of `cells_to_groups`."""
        n = groups.shape[0]
        tokens = groups.permute(1, 4, 2, 0, 3, 5)
        return tokens.reshape(self.num_cells, n * BLOCKS_PER_GROUP, BLOCK_TOKENS, self.head_dim)
