"""What attention kernels take: queries with room for their results, and a layer's place in the arena."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvservice.kernels.triton.checks import FLOATS, check
from kvservice.types import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Queries:
    """Rotated queries and where attention's results for them go.

    Attributes:
        q: `[n, h, d]`.
        scale: of the scores.
        out: `[n, h, d]`, as q.
        lse: fp32 `[n, h]`, minus infinity, with out 0, in rows that saw nothing.
    """

    q: Tensor
    scale: float
    out: Tensor
    lse: Tensor

    def check(self) -> None:
        """Raises ValueError unless the tensors fit together."""
        if self.q.dtype not in FLOATS:
            raise ValueError(f"q is {self.q.dtype}: must be one of {', '.join(map(str, FLOATS))}")
        shape = (self.q.shape[0], self.q.shape[1], self.q.shape[2])
        check(self.q, self.q.dtype, shape, "q")
        check(self.out, self.q.dtype, shape, "out")
        check(self.lse, torch.float32, shape[:2], "lse")
        if self.scale <= 0:
            raise ValueError(f"scale={self.scale}: must be above 0")


@dataclass(frozen=True, slots=True)
class ArenaLayer:
    """One layer's keys and values in the arena.

    Attributes:
        arena: `[blocks, 16, d]`, of all layers.
        layer: which.
        num_kv_heads: cells of its keys, and of its values.
    """

    arena: Tensor
    layer: int
    num_kv_heads: int

    @property
    def first_cell(self) -> int:
        """The row of block tables with the keys of the first head; those of the others follow, then the values'."""
        return 2 * self.layer * self.num_kv_heads

    def check(self, dtype: torch.dtype, head_dim: int) -> None:
        """Raises ValueError unless the arena holds heads of `head_dim` numbers in `dtype`."""
        check(self.arena, dtype, (self.arena.shape[0], BLOCK_TOKENS, head_dim), "arena")
