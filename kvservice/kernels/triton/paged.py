"""Attention over tokens in arena blocks, found through block tables. Knows nothing of layers or of what was rotated.

A program takes one KV head of one tile of query rows (see `tables`), and a share of the tokens that the tile sees, some
at a time. *Decode* cuts few rows' tokens into many shares, or the device would idle, and merges them (Flash-Decoding,
Dao et al., 2023); *prefill* has programs enough. What is loaded serves all query heads of a KV head's group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvservice.kernels.triton.checks import INTERPRETED, LEAST_PRODUCT, check, power_of_two, tokens_at_once
from kvservice.kernels.triton.merge import merge
from kvservice.kernels.triton.operands import ArenaLayer, Queries
from kvservice.kernels.triton.softmax import LOG2_E, LOWEST, finish, fold
from kvservice.kernels.triton.tables import RECORD_NUMBERS, StepTables, sequence_record
from kvservice.types import BLOCK_TOKENS

PREFILL_ROWS = 64
"""Query rows of a tile of prefill."""

MAX_SPLITS = 64
"""Shares that a row's tokens are cut into at most: merging must stay small beside attending."""


PROGRAMS_PER_PROCESSOR = 2
"""Programs of decode for each multiprocessor: while one waits for memory, the other may load."""


def programs_for(device: torch.device) -> int:
    """How many programs keep `device` busy."""
    if device.type != "cuda":
        return 8
    return PROGRAMS_PER_PROCESSOR * int(torch.cuda.get_device_properties(device).multi_processor_count)


class DecodeSpace:
    """Memory for the partial results of `decode`, allocated once.

    Args:
        num_heads: query heads.
        num_kv_heads: KV heads.
        head_dim: numbers of a head.
        device: of the memory.
        num_programs: enough to keep the device busy.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device, num_programs: int
    ) -> None:
        self._num_kv_heads = num_kv_heads
        self._num_programs = num_programs
        most = max(num_programs // num_kv_heads, 1)
        self._outs = torch.zeros(most * num_heads * head_dim, device=device)
        self._lses = torch.zeros(most * num_heads, device=device)

    def num_splits(self, num_rows: int) -> int:
        """How many shares the tokens of each of `num_rows` rows are cut into."""
        return max(1, min(MAX_SPLITS, self._num_programs // max(num_rows * self._num_kv_heads, 1)))

    def partials(self, num_rows: int, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Outs `[rows, splits, h, d]` and log-sum-exps `[rows, splits, h]`, fp32, with anything in them."""
        shape = (num_rows, self.num_splits(num_rows), num_heads)
        numbers = num_rows * shape[1] * num_heads
        return self._outs[: numbers * head_dim].view(*shape, head_dim), self._lses[:numbers].view(shape)


def decode(queries: Queries, kv: ArenaLayer, tables: StepTables, num_singles: int, space: DecodeSpace) -> None:
    """Attention of the sequences that have one query in the step. Rows of other sequences stay as they are.

    Args:
        queries: of the step.
        kv: of the layer.
        tables: of the step.
        num_singles: how many tiles of `tables.singles` are meant.
        space: for partial results.
    """
    if not num_singles:
        return
    splits = space.num_splits(num_singles)
    tiles = tables.singles[:num_singles]
    if splits == 1:
        _launch(queries, kv, tables, tiles, queries.out, queries.lse, splits=1, is_decode=True)
        return
    _, num_heads, dim = queries.q.shape
    outs, lses = space.partials(num_singles, num_heads, dim)
    _launch(queries, kv, tables, tiles, outs, lses, splits=splits, is_decode=True)
    merge(outs, lses, tables.rows_of_singles[:num_singles], queries.out, queries.lse)


def prefill(queries: Queries, kv: ArenaLayer, tables: StepTables, tiles: Tensor) -> None:
    """Causal attention of some sequences, each of any number of queries. Other rows stay as they are.

    Args:
        queries: of the step; each sees the tokens before it, and itself.
        kv: of the layer; has the step's own tokens already.
        tables: of the step.
        tiles: int64 `[tiles, 2]`, see `tables.tiles_of`, of `PREFILL_ROWS` rows.
    """
    if tiles.shape[0]:
        _launch(queries, kv, tables, tiles, queries.out, queries.lse, splits=1, is_decode=False)


def _launch(
    queries: Queries,
    kv: ArenaLayer,
    tables: StepTables,
    tiles: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    splits: int,
    is_decode: bool,
) -> None:
    queries.check()
    _, num_heads, dim = queries.q.shape
    kv.check(queries.q.dtype, dim)
    check(tiles, torch.int64, (tiles.shape[0], 2), "tiles")
    check(tables.records, torch.int64, (tables.records.shape[0], RECORD_NUMBERS), "records")
    group = num_heads // kv.num_kv_heads
    _attend[(tiles.shape[0], kv.num_kv_heads, splits)](
        queries.q,
        kv.arena,
        tables.records,
        tiles,
        kv.first_cell,
        queries.scale * LOG2_E,
        out,
        lse,
        HEADS=num_heads,
        KV_HEADS=kv.num_kv_heads,
        GROUP=group,
        DIM=dim,
        DIM_BLOCK=power_of_two(dim, LEAST_PRODUCT),
        ROWS=power_of_two(group, LEAST_PRODUCT) if is_decode else PREFILL_ROWS,
        TOKENS=tokens_at_once(queries.q),
        BLOCK_TOKENS=BLOCK_TOKENS,
        SPLITS=splits,
        UPCAST=INTERPRETED,
        num_warps=4,
        num_stages=3 if is_decode else 2,
    )


@triton.jit
def _attend(
    q: tl.tensor,
    arena: tl.tensor,
    records: tl.tensor,
    tiles: tl.tensor,
    first_cell: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    tile = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1)
    table, stride, resident, num_queries, first_row = sequence_record(records, sequence)

    local = first + tl.arange(0, ROWS)
    query = local // GROUP
    head = kv_head * GROUP + local % GROUP
    dim = tl.arange(0, DIM_BLOCK)
    is_row = query < num_queries
    inside = is_row[:, None] & (dim < DIM)[None, :]
    place = (first_row + query) * HEADS + head
    rows = tl.load(q + place[:, None] * DIM + dim[None, :], mask=inside, other=0.0)

    # What the tile's last query sees, cut into shares of whole tiles of tokens.
    num_visible = resident + tl.minimum(num_queries, (first + ROWS - 1) // GROUP + 1)
    share = tl.cdiv(tl.cdiv(num_visible, SPLITS), TOKENS) * TOKENS
    begin = split * share
    end = tl.minimum(begin + share, num_visible)

    keys = table + (first_cell + kv_head) * stride
    values = keys + KV_HEADS * stride
    peak = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
    for start in range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        is_token = token < end
        key_block = tl.load(keys + token // BLOCK_TOKENS, mask=is_token, other=0).to(tl.int64)
        value_block = tl.load(values + token // BLOCK_TOKENS, mask=is_token, other=0).to(tl.int64)
        within = (token % BLOCK_TOKENS)[:, None] * DIM + dim[None, :]
        # Blocks hold anything where nobody wrote: what isn't seen must be finite.
        held = is_token[:, None] & (dim < DIM)[None, :]
        k = tl.load(arena + key_block[:, None] * (BLOCK_TOKENS * DIM) + within, mask=held, other=0.0)
        v = tl.load(arena + value_block[:, None] * (BLOCK_TOKENS * DIM) + within, mask=held, other=0.0)
        seen = is_token[None, :] & (token[None, :] <= (resident + query)[:, None])
        peak, total, acc = fold(rows, k, v, seen, scale, peak, total, acc, UPCAST)

    attended, mass = finish(peak, total, acc)
    if SPLITS > 1:
        place = (tile * SPLITS + split) * HEADS + head
    tl.store(out + place[:, None] * DIM + dim[None, :], attended.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + place, mass, mask=is_row)
