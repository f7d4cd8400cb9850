"""Handing out numbered blocks, counted by reference. Knows nothing of what lies in them.

The books are kept in numpy: a step takes few blocks at a time, and torch costs ten times as much for so little.
"""

from __future__ import annotations

import numpy as np
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
        self._free = np.arange(num_blocks - 1, first - 1, -1, dtype=np.int32)
        self._num_free = self.num_blocks
        self._references = np.zeros(num_blocks, dtype=np.int32)

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
            int32 `[count]` on the CPU, rising where they lie one behind the other: so they are read fastest.

        Raises:
            InternalError: fewer are free.
        """
        if count > self._num_free:
            raise InternalError(f"{count} blocks asked for, {self._num_free} of {self.num_blocks} free")
        start = self._num_free - count
        blocks = self._free[start : self._num_free][::-1].copy()
        self._num_free = start
        self._references[blocks] = 1
        return torch.from_numpy(blocks)

    def share(self, blocks: Tensor) -> None:
        """Adds a holder to each of some blocks, which somebody holds."""
        self._references[_numbers(blocks)] += 1

    def shared(self, blocks: Tensor) -> Tensor:
        """Which of some blocks have more than one holder: bool, shaped as `blocks`."""
        return torch.from_numpy(self._references[_numbers(blocks)] > 1).view(blocks.shape)

    def free(self, blocks: Tensor) -> int:
        """Gives blocks back.

        Returns:
            How many of them somebody else still holds.

        Raises:
            InternalError: nobody holds one of them, or one is named twice.
        """
        numbers = _numbers(blocks)
        holders = self._references[numbers]
        if numbers.size and (holders.min() < 1 or np.unique(numbers).size != numbers.size):
            raise InternalError("a block was freed twice")
        self._references[numbers] = holders - 1
        ended = numbers[holders == 1]
        end = self._num_free + ended.size
        self._free[self._num_free : end] = ended[::-1]
        self._num_free = end
        return int(numbers.size - ended.size)

    def check(self, holders: Tensor | None = None) -> None:
        """Raises InternalError when the free list is damaged.

        Args:
            holders: the blocks of everyone who holds some, one after the other: then each must be counted as often.
        """
        listed = self._free[: self._num_free]
        marked = np.zeros(self._references.shape, dtype=bool)
        marked[listed] = True
        marked[: self._first] = True
        # As many are marked as are listed, if none is listed twice.
        if not np.array_equal(marked, self._references == 0) or np.count_nonzero(marked) != listed.size + self._first:
            raise InternalError("the free list and the counts of holders differ")
        if holders is None:
            return
        counted = np.bincount(_numbers(holders), minlength=self._references.size)
        if not np.array_equal(counted, self._references):
            wrong = int((counted != self._references).nonzero()[0][0])
            raise InternalError(f"block {wrong} is counted {self._references[wrong]} times and held {counted[wrong]}")


def _numbers(blocks: Tensor) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    flat: np.ndarray[tuple[int], np.dtype[np.int32]] = blocks.reshape(-1).numpy()
    return flat
