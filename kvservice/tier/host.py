"""The host-memory tier: groups of 64 tokens, and rows gathered out of them. Knows nothing of sessions or Redis.

A group's memory may also hold the raw blocks of a sequence that was swapped out: see `tier.swap`.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

from kvservice.kv.blocks import BlockPool
from kvservice.kv.layout import BLOCKS_PER_GROUP, GroupLayout, KVLayout, WholeGroups
from kvservice.kv.ledger import Ledger, Owner
from kvservice.types import BLOCK_TOKENS


class HostTier:
    """A bounded segment of host memory that holds groups by number.

    The segment is one allocation; the operating system commits its pages as they are first written. Where it can, in
    huge ones: rows are recalled from all over the segment, and looking up a small page takes about as long as its row.

    Args:
        pin: page-lock the segment, so that a CUDA device copies from it at full speed.
        groups: what is stored of a group, and how; None: everything.
        gives_back: freed groups' pages go back to the system, for two segments that share one bound. Not with `pin`.

    Attributes:
        groups: how groups lie in it.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_groups: int,
        ledger: Ledger,
        *,
        pin: bool,
        groups: GroupLayout | None = None,
        gives_back: bool = False,
    ) -> None:
        self.groups = groups or WholeGroups(layout)
        self._layout = layout
        self._ledger = ledger
        self._gives_back = gives_back
        self._pages = None if pin or not num_groups else _pages(num_groups * self.groups.group_bytes)
        if self._pages is None:
            self._groups = torch.empty(num_groups, *self.groups.shape, dtype=layout.dtype, pin_memory=pin)
        else:
            memory = torch.frombuffer(self._pages, dtype=torch.uint8)
            self._groups = memory.view(layout.dtype).view(num_groups, *self.groups.shape)
        self._rows = self._groups.view(-1, self.groups.row_numbers)
        self._rows_per_group = self.group_bytes // (self.groups.row_numbers * layout.dtype.itemsize)
        self._pool = BlockPool(num_groups)

    def store(self, groups: Tensor) -> list[int]:
        """Copies groups as `groups.pack` gives them, which are on the CPU, in and returns their numbers."""
        numbers = self.allocate(groups.shape[0])
        # One by one: each is a plain copy of memory, which indexing by a list isn't.
        for number, group in zip(numbers, groups, strict=True):
            self._groups[number].copy_(group)
        return numbers

    def allocate(self, count: int) -> list[int]:
        """Takes `count` groups, whatever is in them, and returns their numbers."""
        numbers: list[int] = self._pool.allocate(count).tolist()
        self._ledger.add(Owner.HOST, count * self.group_bytes)
        return numbers

    def load(self, numbers: list[int]) -> Tensor:
        """A copy of groups, `[n, *groups.shape]`."""
        return self._groups[torch.tensor(numbers, dtype=torch.int64)]

    def share(self, numbers: list[int]) -> None:
        """Adds a holder to groups."""
        self._pool.share(torch.tensor(numbers, dtype=torch.int64))
        self._ledger.share(Owner.HOST, len(numbers) * self.group_bytes)

    def num_shared(self, numbers: list[int]) -> int:
        """How many of some groups have more than one holder."""
        return int(self._pool.shared(torch.tensor(numbers, dtype=torch.int64)).sum())

    def free(self, numbers: list[int]) -> None:
        """Gives groups back."""
        if numbers:
            given = torch.tensor(numbers, dtype=torch.int64)
            if self._gives_back:
                self._give_back(given[~self._pool.shared(given)].tolist())
            still_held = self._pool.free(given)
            self._ledger.share(Owner.HOST, -still_held * self.group_bytes)
            self._ledger.add(Owner.HOST, -(len(numbers) - still_held) * self.group_bytes)

    def charge(self, num_bytes: int) -> None:
        """Counts host memory that the caller takes elsewhere (or, negative, gives back), reserved as groups are."""
        self._ledger.add(Owner.HOST, num_bytes)

    @property
    def group_bytes(self) -> int:
        """Of one group."""
        return self.groups.group_bytes

    @property
    def blocks_per_group(self) -> int:
        """Device blocks that fit into the memory of a group."""
        return self._layout.num_cells * BLOCKS_PER_GROUP

    def as_blocks(self, number: int) -> Tensor:
        """The memory of a group as device blocks, `[blocks_per_group, 16, d]`."""
        return self._groups[number].view(-1, BLOCK_TOKENS, self._layout.head_dim)

    def addresses(self, numbers: list[int]) -> Tensor:
        """Where groups lie in memory, int64 `[n]`."""
        return torch.tensor(numbers, dtype=torch.int64) * self.group_bytes + self._groups.data_ptr()

    def first_rows(self, numbers: list[int]) -> Tensor:
        """The row that each group begins with, int64 `[n]`. Where its tokens lie from there, `groups` says."""
        return torch.tensor(numbers, dtype=torch.int64) * self._rows_per_group

    def gather(self, rows: Tensor, out: Tensor) -> None:
        """Copies rows into device memory: the only way from host KV to the device.

        Args:
            rows: int64 `[n]` on the CPU.
            out: `[n, groups.row_numbers]`, contiguous, on the device.
        """
        if out.device.type == "cpu":
            torch.index_select(self._rows, 0, rows, out=out)
        else:
            staged = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
            torch.index_select(self._rows, 0, rows, out=staged)
            out.copy_(staged)

    def check(self, holders: list[int]) -> None:
        """Raises InternalError unless each group is counted as often as it is in `holders`."""
        self._pool.check(torch.tensor(holders, dtype=torch.int64))

    def _give_back(self, numbers: list[int]) -> None:
        """Lets the system have the pages that lie wholly in some groups."""
        assert self._pages is not None
        for number in numbers:
            first = -(-number * self.group_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (number + 1) * self.group_bytes // mmap.PAGESIZE * mmap.PAGESIZE - first
            if length > 0:
                self._pages.madvise(mmap.MADV_DONTNEED, first, length)


def _pages(num_bytes: int) -> mmap.mmap:
    # Private: pages of a shared mapping stay with the system when they are given back, and are never huge.
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # only advice: a system without such pages does without
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
