"""Rotation of queries and keys by their positions, and the write of keys and values into arena blocks.

Each row's heads, maybe RMS-normed one by one, turn number i of a head with number `i + d / 2`:

    low, high = low * cos - high * sin, high * cos + low * sin

Queries go to a buffer, keys and values where the sequences' block tables say. Knows nothing of attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvservice.kernels.triton.checks import check, power_of_two
from kvservice.kernels.triton.operands import ArenaLayer
from kvservice.kernels.triton.tables import StepTables, sequence_record
from kvservice.types import BLOCK_TOKENS

_HEADS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Rotation:
    """How far each position turns each pair of numbers of a head.

    Attributes:
        cos: fp32 `[max_positions, d / 2]`.
        sin: as cos.
    """

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """The norms of queries and keys before rotation.

    Attributes:
        query: fp32 `[d]`.
        key: fp32 `[d]`.
        eps: added to the mean square.
    """

    query: Tensor
    key: Tensor
    eps: float


def rotate_and_store(
    qkv: Tensor,
    positions: Tensor,
    rotation: Rotation,
    norms: HeadNorms | None,
    tables: StepTables,
    kv: ArenaLayer,
    q: Tensor,
) -> None:
    """Fills `q`, and writes keys and values of the step's tokens into the arena.

    Args:
        qkv: `[n, (h + 2 kv) * d]`: heads of queries, keys, values.
        positions: int64 `[n]`, each below `max_positions`.
        rotation: of all positions.
        norms: of queries and keys, if they are normed.
        tables: of the step.
        kv: where keys and values go.
        q: `[n, h, d]`, gets the queries.
    """
    rows, num_heads, dim = q.shape
    if dim % 2:
        raise ValueError(f"head_dim={dim}: must be even")
    heads = num_heads + 2 * kv.num_kv_heads
    check(qkv, q.dtype, (rows, heads * dim), "qkv")
    check(q, q.dtype, (rows, num_heads, dim), "q")
    check(positions, torch.int64, (rows,), "positions")
    check(tables.sequence_of_row, torch.int64, (rows,), "sequence_of_row")
    kv.check(q.dtype, dim)
    for name, angles in (("cos", rotation.cos), ("sin", rotation.sin)):
        check(angles, torch.float32, (rotation.cos.shape[0], dim // 2), name)
    if norms is not None:
        check(norms.query, torch.float32, (dim,), "the queries' norm")
        check(norms.key, torch.float32, (dim,), "the keys' norm")
    if rows:
        _rotate_and_store[(rows, triton.cdiv(heads, _HEADS_AT_ONCE))](
            qkv,
            positions,
            rotation.cos,
            rotation.sin,
            rotation.cos if norms is None else norms.query,
            rotation.cos if norms is None else norms.key,
            0.0 if norms is None else norms.eps,
            tables.records,
            tables.sequence_of_row,
            kv.first_cell,
            q,
            kv.arena,
            HEADS=num_heads,
            KV_HEADS=kv.num_kv_heads,
            DIM=dim,
            BLOCK=power_of_two(dim // 2),
            HEADS_AT_ONCE=_HEADS_AT_ONCE,
            NORMS=norms is not None,
            BLOCK_TOKENS=BLOCK_TOKENS,
        )


@triton.jit
def _rotate_and_store(
    qkv: tl.tensor,
    positions: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    eps: tl.tensor,
    records: tl.tensor,
    sequence_of_row: tl.tensor,
    first_cell: tl.tensor,
    q: tl.tensor,
    arena: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    NORMS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE)
    pair = tl.arange(0, BLOCK)
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (pair < DIM // 2)[None, :]
    is_query = (head < HEADS)[:, None]
    is_value = (head >= HEADS + KV_HEADS)[:, None]
    source = qkv + row * (HEADS + 2 * KV_HEADS) * DIM + head[:, None] * DIM + pair[None, :]
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    if NORMS:
        factor = 1.0 / tl.sqrt(tl.sum(low * low + high * high, axis=1) / DIM + eps)[:, None]
        weight = tl.where(is_query, query_norm + pair[None, :], key_norm + pair[None, :])
        low = tl.where(is_value, low, low * factor * tl.load(weight, mask=inside, other=0.0))
        high = tl.where(is_value, high, high * factor * tl.load(weight + DIM // 2, mask=inside, other=0.0))

    turn = tl.load(positions + row) * (DIM // 2) + pair
    c = tl.load(cos + turn, mask=pair < DIM // 2, other=1.0)[None, :]
    s = tl.load(sin + turn, mask=pair < DIM // 2, other=0.0)[None, :]
    turned_low = tl.where(is_value, low, low * c - high * s).to(q.dtype.element_ty)
    turned_high = tl.where(is_value, high, high * c + low * s).to(q.dtype.element_ty)
    queries = q + row * HEADS * DIM + head[:, None] * DIM + pair[None, :]
    tl.store(queries, turned_low, mask=inside & is_query)
    tl.store(queries + DIM // 2, turned_high, mask=inside & is_query)

    table, stride, resident, num_queries, first_row = sequence_record(records, tl.load(sequence_of_row + row))
    token = resident + row - first_row
    # Rows of empty sequences have no place in the arena.
    is_stored = inside & (head >= HEADS)[:, None] & (row - first_row < num_queries)
    cell = first_cell + head - HEADS
    at = table + cell * stride + token // BLOCK_TOKENS
    has_place = (head >= HEADS) & (head < HEADS + 2 * KV_HEADS) & (row - first_row < num_queries)
    block = tl.load(at, mask=has_place, other=0).to(tl.int64)
    slot = (block * BLOCK_TOKENS + token % BLOCK_TOKENS)[:, None] * DIM + pair[None, :]
    tl.store(arena + slot, turned_low, mask=is_stored)
    tl.store(arena + slot + DIM // 2, turned_high, mask=is_stored)
