"""Handing out numbered blocks. Knows nothing of what lies in them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.errors import InternalError


class BlockPool:
    """A free list of the blocks `first` to `num_blocks - 1`.

    Callers reserve in the ledger before they allocate, so running out is a fault of ours, not a state to handle.
    """

    def __init__(self, num_blocks: int, first: int = 0) -> None:
        self.num_blocks = num_blocks - first
        self._free = torch.arange(num_blocks - 1, first - 1, -1, dtype=torch.int64)
        self._num_free = self.num_blocks
        self._is_free = torch.ones(num_blocks, dtype=torch.bool)
        self._is_free[:first] = False

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self._num_free

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self._num_free

    def allocate(self, count: int) -> Tensor:
        """Takes `count` blocks.

        Returns:
            int64 `[count]` on the CPU.

        Raises:
            InternalError: fewer are free.
        """
        if count > self._num_free:
            raise InternalError(f"{count} blocks asked for, {self._num_free} of {self.num_blocks} free")
        start = self._num_free - count
        blocks = self._free[start : self._num_free].clone()
        self._num_free = start
        self._is_free[blocks] = False
        return blocks

    def free(self, blocks: Tensor) -> None:
        """Gives blocks back.

        Raises:
            InternalError: one of them is free already, or named twice.
        """
        blocks = blocks.reshape(-1)
        if bool(self._is_free[blocks].any()) or torch.unique(blocks).numel() != blocks.numel():
            raise InternalError("a block was freed twice")
        self._is_free[blocks] = True
        end = self._num_free + blocks.numel()
        self._free[self._num_free : end] = blocks
        self._num_free = end

    def check(self) -> None:
        """Raises InternalError unless the free list and the marks agree."""
        listed = self._free[: self._num_free]
        marked = torch.zeros_like(self._is_free)
        marked[listed] = True
        if not torch.equal(marked, self._is_free):
            raise InternalError("the free list and the marks of free blocks differ")
