"""Groups of 64 tokens from host memory to the device, and attention over what was staged.

Knows nothing of which tokens are staged, or why. A group is `[layers, kv, 64, K or V, d]`; staged tokens lie as
`[kv, tokens, K or V, d]`. Groups are read where they are, in page-locked host memory, which a CUDA device reaches by
the host's own addresses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvservice.kernels.triton.checks import INTERPRETED, LEAST_PRODUCT, check, power_of_two, tokens_at_once
from kvservice.kernels.triton.operands import Queries
from kvservice.kernels.triton.paged import PREFILL_ROWS
from kvservice.kernels.triton.softmax import LN_2, LOG2_E, LOWEST, finish, fold
from kvservice.kernels.triton.tables import RECORD_NUMBERS, StepTables, sequence_record
from kvservice.types import GROUP_TOKENS

_WORDS_AT_ONCE = 1024


def stage(addresses: Tensor, layer: int, staged: Tensor) -> None:
    """Copies one layer of some groups, one after the other.

    Args:
        addresses: int64 `[n]`, of the groups.
        layer: which.
        staged: `[kv, at least 64 * n, 2, d]`.
    """
    num_kv, room, _, dim = staged.shape
    count = addresses.shape[0]
    if count * GROUP_TOKENS > room:
        raise ValueError(f"{count} groups of {GROUP_TOKENS} tokens: there is room for {room} tokens")
    check(addresses, torch.int64, (count,), "addresses")
    check(staged, staged.dtype, (num_kv, room, 2, dim), "staged")
    # Copied as numbers of 8 bytes, whatever they stand for.
    row_words, rest = divmod(2 * dim * staged.element_size(), 8)
    if rest:
        raise ValueError(f"head_dim={dim} in {staged.dtype}: K and V of a token must be a multiple of 8 bytes")
    words = GROUP_TOKENS * row_words
    if count:
        _stage[(count, num_kv)](
            addresses,
            staged.view(torch.int64),
            layer * num_kv * words,
            room * row_words,
            WORDS=words,
            AT_ONCE=_WORDS_AT_ONCE,
        )


@triton.jit
def _stage(
    addresses: tl.tensor,
    staged: tl.tensor,
    layer_words: tl.tensor,
    head_words: tl.tensor,
    WORDS: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    group = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    source = tl.load(addresses + group).to(tl.pointer_type(tl.int64)) + layer_words + head * WORDS
    target = staged + head * head_words + group * WORDS
    for start in range(0, WORDS, AT_ONCE):
        word = start + tl.arange(0, AT_ONCE)
        tl.store(target + word, tl.load(source + word, mask=word < WORDS), mask=word < WORDS)


def attend_staged(queries: Queries, staged: Tensor, spans: Tensor, tables: StepTables, tiles: Tensor) -> None:
    """Adds staged tokens, all of which the queries see, to the attention that `queries` already has.

    Args:
        queries: of the step, with out and lse of other tokens; rows outside the tiles stay as they are.
        staged: `[kv, tokens, 2, d]`.
        spans: int64 `[n, 2]`, the first staged token of each sequence, and how many it has, maybe none.
        tables: of the step.
        tiles: int64 `[tiles, 2]`, see `tables.tiles_of`, of `PREFILL_ROWS` rows.
    """
    queries.check()
    _, num_heads, dim = queries.q.shape
    num_kv, room = staged.shape[:2]
    check(staged, queries.q.dtype, (num_kv, room, 2, dim), "staged")
    check(spans, torch.int64, (spans.shape[0], 2), "spans")
    check(tiles, torch.int64, (tiles.shape[0], 2), "tiles")
    check(tables.records, torch.int64, (tables.records.shape[0], RECORD_NUMBERS), "records")
    if tiles.shape[0]:
        _attend_staged[(tiles.shape[0], num_kv)](
            queries.q,
            staged,
            spans,
            tables.records,
            tiles,
            room,
            queries.scale * LOG2_E,
            queries.out,
            queries.lse,
            HEADS=num_heads,
            GROUP=num_heads // num_kv,
            DIM=dim,
            DIM_BLOCK=power_of_two(dim, LEAST_PRODUCT),
            ROWS=PREFILL_ROWS,
            TOKENS=tokens_at_once(queries.q),
            UPCAST=INTERPRETED,
            num_warps=4,
            num_stages=2,
        )


@triton.jit
def _attend_staged(
    q: tl.tensor,
    staged: tl.tensor,
    spans: tl.tensor,
    records: tl.tensor,
    tiles: tl.tensor,
    room: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    tile = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    sequence = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1)
    _, _, _, num_queries, first_row = sequence_record(records, sequence)
    first_token = tl.load(spans + 2 * sequence)
    num_tokens = tl.load(spans + 2 * sequence + 1)

    local = first + tl.arange(0, ROWS)
    query = local // GROUP
    dim = tl.arange(0, DIM_BLOCK)
    is_row = query < num_queries
    inside = is_row[:, None] & (dim < DIM)[None, :]
    place = (first_row + query) * HEADS + kv_head * GROUP + local % GROUP
    rows = tl.load(q + place[:, None] * DIM + dim[None, :], mask=inside, other=0.0)

    # What the rows already have is as good as one token of that score and value.
    mass = tl.load(lse + place, mask=is_row, other=-float("inf"))
    saw = mass > -float("inf")
    peak = tl.where(saw, mass / LN_2, LOWEST)
    total = tl.where(saw, 1.0, 0.0)
    acc = tl.load(out + place[:, None] * DIM + dim[None, :], mask=inside & saw[:, None], other=0.0).to(tl.float32)
    source = staged + (kv_head * room + first_token) * (2 * DIM)
    for start in range(0, num_tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        held = (token < num_tokens)[:, None] & (dim < DIM)[None, :]
        at = source + token[:, None] * (2 * DIM) + dim[None, :]
        k = tl.load(at, mask=held, other=0.0)
        v = tl.load(at + DIM, mask=held, other=0.0)
        seen = is_row[:, None] & (token < num_tokens)[None, :]
        peak, total, acc = fold(rows, k, v, seen, scale, peak, total, acc, UPCAST)

    attended, mass = finish(peak, total, acc)
    tl.store(out + place[:, None] * DIM + dim[None, :], attended.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + place, mass, mask=is_row)
