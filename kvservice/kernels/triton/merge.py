"""Partial attention over disjoint tokens made one softmax, as `kv.partial.merge_with_lse` does in torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvservice.kernels.triton.checks import check, power_of_two


def merge(outs: Tensor, lses: Tensor, rows: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merges the parts of some rows.

    Args:
        outs: `[r, parts, h, d]`. Whatever stands where a part saw nothing is ignored.
        lses: fp32 `[r, parts, h]`, minus infinity where a part saw nothing.
        rows: int64 `[r]`, where each merged row goes.
        out: `[n, h, d]`; rows that aren't named stay as they are.
        lse: fp32 `[n, h]`, likewise.
    """
    count, parts, num_heads, dim = outs.shape
    check(outs, outs.dtype, (count, parts, num_heads, dim), "outs")
    check(lses, torch.float32, (count, parts, num_heads), "lses")
    check(rows, torch.int64, (count,), "rows")
    check(out, out.dtype, (out.shape[0], num_heads, dim), "out")
    check(lse, torch.float32, (out.shape[0], num_heads), "lse")
    if count:
        _merge[(count, num_heads)](
            outs,
            lses,
            rows,
            out,
            lse,
            parts,
            HEADS=num_heads,
            DIM=dim,
            DIM_BLOCK=power_of_two(dim),
            PARTS_BLOCK=power_of_two(parts),
        )


@triton.jit
def _merge(
    outs: tl.tensor,
    lses: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    parts: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    part = tl.arange(0, PARTS_BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    place = (at * parts + part) * HEADS + head
    each = tl.load(lses + place, mask=part < parts, other=-float("inf"))
    saw = each > -float("inf")
    highest = tl.max(each, axis=0)
    # Where nothing was seen, minus infinity can't be taken from itself.
    highest = tl.where(highest > -float("inf"), highest, 0.0)
    weight = tl.exp(each - highest)
    total = tl.sum(weight, axis=0)
    partial = tl.load(outs + place[:, None] * DIM + dim[None, :], mask=saw[:, None] & (dim < DIM)[None, :], other=0.0)
    divisor = tl.where(total > 0, total, 1.0)
    merged = tl.sum(partial.to(tl.float32) * weight[:, None], axis=0) / divisor
    target = tl.load(rows + at) * HEADS + head
    tl.store(out + target * DIM + dim, merged.to(out.dtype.element_ty), mask=dim < DIM)
    tl.store(lse + target, tl.where(total > 0, highest + tl.log(divisor), -float("inf")))
