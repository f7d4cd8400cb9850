"""Handing out numbered blocks, counted by reference. Knows nothing of what lies in them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.errors import InternalError


class BlockPool:
    """The blocks `first` to `num_blocks - 1`. A block is free again when everyone who holds it has given it back.

    Callers reserve in the ledger before they allocate, so running out is a fault of ours, not a state to handle.
    """

    def __init__(self, num_blocks: int, first: int = 0) -> None:
        self.num_blocks = num_blocks - first
        self._first = first
        self._free = torch.arange(num_blocks - 1, first - 1, -1, dtype=torch.int32)
        self._num_free = self.num_blocks
        self._references = torch.zeros(num_blocks, dtype=torch.int32)

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
            int32 `[count]` on the CPU.

        Raises:
            InternalError: fewer are free.
        """
        if count > self._num_free:
            raise InternalError(f"{count} blocks asked for, {self._num_free} of {self.num_blocks} free")
        start = self._num_free - count
        blocks = self._free[start : self._num_free].clone()
        self._num_free = start
        self._references[blocks] = 1
        return blocks

    def share(self, blocks: Tensor) -> None:
        """Adds a holder to each of some blocks, which somebody holds."""
        self._references[blocks.reshape(-1)] += 1

    def shared(self, blocks: Tensor) -> Tensor:
        """Which of some blocks have more than one holder: bool, shaped as `blocks`."""
        return self._references[blocks.reshape(-1)].view(blocks.shape) > 1

    def free(self, blocks: Tensor) -> int:
        """Gives blocks back.

        Returns:
            How many of them somebody else still holds.

        Raises:
            InternalError: nobody holds one of them, or one is named twice.
        """
        blocks = blocks.reshape(-1)
        holders = self._references[blocks]
        if blocks.numel() and (int(holders.min()) < 1 or torch.unique(blocks).numel() != blocks.numel()):
            raise InternalError("a block was freed twice")
        self._references[blocks] = holders - 1
        ended = blocks[holders == 1]
        end = self._num_free + ended.numel()
        self._free[self._num_free : end] = ended
        self._num_free = end
        return blocks.numel() - ended.numel()

    def check(self, holders: Tensor | None = None) -> None:
        """Raises InternalError when the free list is damaged.

        Args:
            holders: the blocks of everyone who holds some, one after the other: then each must be counted as often.
        """
        listed = self._free[: self._num_free]
        marked = torch.zeros(self._references.shape, dtype=torch.bool)
        marked[listed] = True
        marked[: self._first] = True
        if not torch.equal(marked, self._references == 0) or torch.unique(listed).numel() != listed.numel():
            raise InternalError("the free list and the counts of holders differ")
        if holders is None:
            return
        counted = torch.bincount(holders.reshape(-1), minlength=self._references.numel())
        if not torch.equal(counted, self._references.long()):
            wrong = int((counted != self._references).nonzero()[0])
            raise InternalError(f"block {wrong} is counted {self._references[wrong]} times and held {counted[wrong]}")
