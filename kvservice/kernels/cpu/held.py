"""Attention of one query over what each KV head of a sequence holds, with its weights."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from kvservice.kernels.cpu.library import KvHeld
from kvservice.kernels.cpu.runtime import DTYPES, address_of, check, loaded

PACKED_TOKENS = 32
"""Of a packed group."""


@dataclass(frozen=True, slots=True)
class PackedPart:
    """Tokens of a layer that are kept in few bits, in groups of 32. A number is `middle + step * (level - half)`.

    Attributes:
        codes: uint8 `[kv, groups, 2, 32 * d * bits / 8]`, of keys, then of values. Field f of byte i of a token is the
            level of number `f * d * bits / 8 + i`; the first field has the low bits.
        key_params: `[kv, groups, 2, d]`, step and middle of each number of a group's keys.
        value_params: `[kv, groups, 2, 32]`, step and middle of each token's values.
        bits: 2, 4 or 8.
    """

    codes: Tensor
    key_params: Tensor
    value_params: Tensor
    bits: int


@dataclass(frozen=True, slots=True)
class HeldPart:
    """What the KV heads of a layer hold: packed tokens, and behind them those of the arena.

    Attributes:
        arena: `[blocks, 16, d]`.
        table: int32 `[2 * kv, columns]`, blocks of keys, then of values; rows may lie further apart.
        width: at least the most slots of a head.
        packed: if there are some.
        moves: int64 `[kv, width]`, positions by which a slot's key is rotated on before it is used; None: none is.
        turns: fp32 `[2, positions, d / 2]`, cosines and sines of that.
    """

    arena: Tensor
    table: Tensor
    width: int
    packed: PackedPart | None = None
    moves: Tensor | None = None
    turns: Tensor | None = None


def attend_held(q: Tensor, part: HeldPart, visible: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one query.

    Args:
        q: `[kv, g, d]`, in the dtype of the arena.
        part: what there is.
        visible: int32 `[kv]`, how many of its leading slots each head's query sees, at least one.
        scale: of the scores.

    Returns:
        `[kv, g, d]`; the logits, fp32 `[kv, g, width]`, minus infinity where the query sees nothing; and their softmax.
    """
    num_kv, group, dim = q.shape
    q = check(q.contiguous(), part.arena.dtype, (num_kv, group, dim), "q")
    check(visible, torch.int32, (num_kv,), "visible")
    if part.table.stride(1) != 1 or part.table.dtype is not torch.int32 or part.table.shape[0] != 2 * num_kv:
        raise ValueError(
            f"table is {part.table.dtype} {tuple(part.table.shape)}: must be int32 [{2 * num_kv}, columns]"
        )
    if part.moves is not None:
        check(part.moves, torch.int64, (num_kv, part.width), "moves")
    logits = torch.empty(num_kv, group, part.width)
    weights, out = torch.empty_like(logits), torch.empty_like(q)
    turns, packed = part.turns, part.packed
    record = KvHeld(
        queries=q.data_ptr(),
        arena=part.arena.data_ptr(),
        table=part.table.data_ptr(),
        table_stride=part.table.stride(0),
        visible=visible.data_ptr(),
        moves=address_of(part.moves),
        cos=None if turns is None else turns[0].data_ptr(),
        sin=None if turns is None else turns[1].data_ptr(),
        codes=None if packed is None else packed.codes.data_ptr(),
        key_params=None if packed is None else packed.key_params.data_ptr(),
        value_params=None if packed is None else packed.value_params.data_ptr(),
        logits=logits.data_ptr(),
        weights=weights.data_ptr(),
        out=out.data_ptr(),
        scale=scale,
        num_kv=num_kv,
        group=group,
        head_dim=dim,
        width=part.width,
        num_groups=0 if packed is None else packed.codes.shape[1],
        bits=8 if packed is None else packed.bits,
        dtype=DTYPES[q.dtype],
    )
    loaded().kv_attend_held(ctypes.byref(record))
    return out, logits, weights
