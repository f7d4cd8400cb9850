"""A step's rows in blocks of one size, so that a row's bits don't depend on its company. Knows nothing of models.

A matrix product chooses its way by the number of rows: alone and among others a row gets other roundings. Computed
always in blocks of one size, it gets the same ones, whatever else the step holds and wherever in the block it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

DETERMINISTIC_ROWS: Final = 32
"""Rows of a block in deterministic mode. A compromise: a row that decodes alone costs as much as a whole block, and
prefill reads all weights once a block. Blocks of 32 rows also begin at whole cache lines, whatever the width: some
libraries choose their way by alignment too."""


def map_rows(function: Callable[..., tuple[Tensor, ...]], row_block: int | None, *rows: Tensor) -> tuple[Tensor, ...]:
    """`function(*rows)`, computed on blocks of `row_block` rows if that is given.

    Args:
        function: row i of each of its results depends on row i of its arguments only.
        row_block: rows of each block; the last one is filled with zeros. None: one block of all rows.
        rows: [n, ...] each.

    Returns:
        [n, ...] each.
    """
    if row_block is None:
        return function(*rows)
    num_rows = rows[0].shape[0]
    # At least one block: without rows the results still have their widths.
    starts = range(0, max(num_rows, 1), row_block)
    blocks = [function(*(_block(tensor, start, row_block) for tensor in rows)) for start in starts]
    return tuple(torch.cat(parts)[:num_rows] for parts in zip(*blocks, strict=True))


def _block(rows: Tensor, start: int, num_rows: int) -> Tensor:
    # A copy even of a whole block: its layout and alignment must not be the caller's.
    block = rows.new_zeros(num_rows, *rows.shape[1:])
    found = rows[start : start + num_rows]
    block[: found.shape[0]] = found
    return block
