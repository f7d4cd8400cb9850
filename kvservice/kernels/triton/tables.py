"""The figures of a step that kernels read on the device. Knows no kernel, and nothing of what sequences are for.

A *tile* is a run of a sequence's query rows: its row `i * group + j` is query i in head j of a KV head's group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

RECORD_NUMBERS = 5
"""Address of the block table, its row stride, resident tokens, queries, first row."""

_NUMBERS = RECORD_NUMBERS + 4


class StepShare(Protocol):
    """One sequence's share of a step, as `cpu.StepSequence` has it."""

    @property
    def table(self) -> Tensor:
        """int32 `[cells, columns]` on the device; the second stride is 1. Covers the step's tokens too."""

    @property
    def num_resident(self) -> int:
        """Tokens in the arena before the step."""

    @property
    def num_queries(self) -> int:
        """Tokens of the step."""

    @property
    def first_row(self) -> int:
        """Of its tokens among the step's rows."""


@dataclass(frozen=True, slots=True)
class StepTables:
    """What lies on the device for up to n rows, in one piece of memory.

    Attributes:
        records: int64 `[n, 5]`, of each sequence; zeros behind the last.
        sequence_of_row: int64 `[n]`.
        singles: int64 `[n, 2]`, a tile for each sequence with one query or none, in front.
        rows_of_singles: int64 `[n]`, the rows of those queries.
    """

    records: Tensor
    sequence_of_row: Tensor
    singles: Tensor
    rows_of_singles: Tensor

    @classmethod
    def over(cls, numbers: Tensor) -> StepTables:
        """The tables in numbers that `step_numbers` made."""
        n = numbers.numel() // _NUMBERS
        records, rows, singles, at = torch.split(numbers, [RECORD_NUMBERS * n, n, 2 * n, n])
        return cls(records.view(n, RECORD_NUMBERS), rows, singles.view(n, 2), at)


def table_numbers(num_rows: int) -> int:
    """How many numbers the tables of a step take."""
    return num_rows * _NUMBERS


def step_numbers(sequences: Sequence[StepShare], num_rows: int) -> Tensor:
    """The numbers of a step, int64 on the CPU, for `StepTables.over`.

    Args:
        sequences: in the order of their rows, leaving none out.
        num_rows: of the step. More than the sequences have only if each has one query: the others are then rows of
            empty sequences, which write nothing to the arena.

    Raises:
        ValueError: the sequences don't make up the rows, or a table is of another kind or too short.
    """
    numbers = torch.zeros(table_numbers(num_rows), dtype=torch.int64)
    tables = StepTables.over(numbers)
    each = [(s.table.data_ptr(), s.table.stride(0), s.num_resident, s.num_queries, s.first_row) for s in sequences]
    records = torch.tensor(each, dtype=torch.int64).view(-1, RECORD_NUMBERS)
    counts, first_rows = records[:, 3], records[:, 4]
    used, count = int(counts.sum()), len(each)
    fits = used == num_rows or (used == count and count < num_rows)
    if not fits or bool((counts < 1).any()) or not torch.equal(counts.cumsum(0) - counts, first_rows):
        raise ValueError(
            f"sequences of {counts.tolist()} rows from {first_rows.tolist()}: don't make up {num_rows} rows in order"
        )
    for sequence in sequences:
        _check_table(sequence)
    tables.records[:count] = records
    tables.sequence_of_row[:used] = torch.arange(count).repeat_interleave(counts)
    tables.sequence_of_row[used:] = torch.arange(used, num_rows)
    single = torch.cat([(counts == 1).nonzero()[:, 0], torch.arange(used, num_rows)])
    tables.singles[: single.numel(), 0] = single
    tables.rows_of_singles[: single.numel()] = torch.cat([first_rows, torch.arange(used, num_rows)])[single]
    return numbers


def tiles_of(counts: Tensor, which: Tensor, group_size: int, tile_rows: int) -> Tensor:
    """Tiles of some sequences, int64 `[tiles, 2]` on the CPU: the sequence, and the tile's first row in it.

    Args:
        counts: int64 `[n]`, queries of every sequence.
        which: int64 `[m]`, the sequences.
        group_size: query heads of a KV head.
        tile_rows: rows of a tile.
    """
    num_tiles = -(-counts[which] * group_size // tile_rows)
    begin = num_tiles.cumsum(0) - num_tiles
    within = torch.arange(int(num_tiles.sum())) - begin.repeat_interleave(num_tiles)
    return torch.stack([which.repeat_interleave(num_tiles), within * tile_rows], 1)


def _check_table(sequence: StepShare) -> None:
    table = sequence.table
    columns = -(-(sequence.num_resident + sequence.num_queries) // 16)
    if table.dtype is not torch.int32 or table.shape[1] < columns or (columns > 1 and table.stride(1) != 1):
        found = f"{table.dtype} {tuple(table.shape)}, strides {table.stride()}"
        raise ValueError(f"table is {found}: must be torch.int32 (cells, {columns} or more), the second stride 1")


@triton.jit
def sequence_record(
    records: tl.tensor, sequence: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Block table, its row stride, resident tokens, queries and first row of a sequence."""
    at = records + sequence * 5
    table = tl.load(at).to(tl.pointer_type(tl.int32))
    return table, tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
