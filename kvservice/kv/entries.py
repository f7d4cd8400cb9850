"""Growing lists of equal-sized byte records in arena blocks. Knows nothing of what the records mean."""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.kv.arena import Arena
from kvservice.kv.ledger import Owner


class PagedEntries:
    """One list of entries for each of `num_rows` rows; all rows have the same length.

    An entry is a whole number of *pieces*, and a block holds a whole number of them, so no piece crosses a block.

    Raises:
        ValueError: `entry_bytes` neither divides a block nor is a multiple of one.
    """

    def __init__(self, arena: Arena, owner: Owner, num_rows: int, entry_bytes: int) -> None:
        block_bytes = arena.layout.block_bytes
        self.entry_bytes = entry_bytes
        self._piece_bytes = min(entry_bytes, block_bytes)
        if entry_bytes and (block_bytes % self._piece_bytes or entry_bytes % self._piece_bytes):
            raise ValueError(f"entry_bytes={entry_bytes}: must divide or be a multiple of the block's {block_bytes}")
        self._pieces_per_block = block_bytes // self._piece_bytes if entry_bytes else 1
        self._pieces_per_entry = entry_bytes // self._piece_bytes if entry_bytes else 0
        self._arena = arena
        self._owner = owner
        self._length = 0
        self._table = torch.empty(num_rows, 0, dtype=torch.int32, device=arena.device)
        self._where: Tensor | None = None

    @property
    def table(self) -> Tensor:
        """Blocks of each row's entries, int32 `[num_rows, columns]`: several in one, or one in several, in order."""
        return self._table

    @property
    def num_bytes(self) -> int:
        """Arena bytes held, shared ones included."""
        return self._table.numel() * self._arena.layout.block_bytes

    def num_shared_from(self, length: int) -> int:
        """How many of its blocks that don't lie wholly before entry `length` somebody else holds too."""
        return self._arena.num_shared(self._table[:, length * self._pieces_per_entry // self._pieces_per_block :])

    def append(self, entries: Tensor) -> None:
        """Adds entries, uint8 `[num_rows, n, entry_bytes]`, in blocks that nobody else holds."""
        rows, count, _ = entries.shape
        start, self._length = self._length, self._length + count
        if not self.entry_bytes:
            return
        if start * self._pieces_per_entry % self._pieces_per_block:
            self._table[:, -1] = self._arena.own(self._owner, self._table[:, -1])
        missing = self._columns(self._length) - self._table.shape[1]
        if missing:
            blocks = self._arena.allocate(self._owner, missing * rows).view(rows, missing)
            self._table = torch.cat([self._table, blocks], dim=1)
        self._where = None
        where = self._locate(start)
        self._arena.pieces(self._piece_bytes)[where.reshape(-1)] = entries.reshape(-1, self._piece_bytes)

    def read(self, rows: slice) -> Tensor:
        """A copy of all entries of some rows, uint8 `[rows, length, entry_bytes]`."""
        num_rows = len(range(*rows.indices(self._table.shape[0])))
        if not self.entry_bytes:
            return self._arena.cells.new_empty(num_rows, self._length, 0, dtype=torch.uint8)
        if self._where is None:
            self._where = self._locate(0)
        where = self._where[rows].reshape(-1)
        pieces = self._arena.pieces(self._piece_bytes).index_select(0, where)
        return pieces.view(num_rows, self._length, self.entry_bytes)

    def truncate(self, length: int) -> None:
        """Forgets all entries from `length` on."""
        self._length = length
        columns = self._columns(length)
        if columns < self._table.shape[1]:
            self._arena.free(self._owner, self._table[:, columns:])
            self._table = self._table[:, :columns].contiguous()
        self._where = None

    def fork(self) -> PagedEntries:
        """The same entries once more, in shared blocks."""
        twin = PagedEntries(self._arena, self._owner, self._table.shape[0], self.entry_bytes)
        twin._length = self._length
        twin._table = self._table.clone()
        twin._where = self._where
        self._arena.share(self._owner, self._table)
        return twin

    def blocks(self) -> Tensor:
        """All blocks held, int32 `[n]`."""
        return self._table.reshape(-1)

    def move_to(self, blocks: Tensor) -> None:
        """From now on its entries are in other blocks, given in the order of `blocks()`; the old ones are forgotten."""
        self._table = blocks.view(self._table.shape)
        self._where = None

    def forget(self) -> None:
        """There are no entries. The blocks are somebody else's business."""
        self._length = 0
        self._table = self._table[:, :0]
        self._where = None

    def _columns(self, length: int) -> int:
        return -(-length * self._pieces_per_entry // self._pieces_per_block)

    def _locate(self, start: int) -> Tensor:
        """Where the pieces of all entries from `start` on lie, `[num_rows, pieces]`."""
        piece = torch.arange(
            start * self._pieces_per_entry, self._length * self._pieces_per_entry, device=self._arena.device
        )
        blocks = self._table[:, piece // self._pieces_per_block].long()
        return blocks * self._pieces_per_block + piece % self._pieces_per_block
