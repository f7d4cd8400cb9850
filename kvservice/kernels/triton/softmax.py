"""The step that all attention kernels share: one tile of tokens folded into a running softmax, in powers of two.

FlashAttention-2 (Dao, arXiv:2307.08691, §3.1). Knows nothing of where queries, keys and values lie.
"""

from __future__ import annotations

import math
from typing import Final

import triton
import triton.language as tl

LOG2_E: Final = math.log2(math.e)
"""Scores are multiplied by it, so that weights are powers of two, which the hardware has."""

LOWEST = tl.constexpr(-1e38)
"""The largest score of none: finite, so that a score of minus infinity weighs nothing beside it rather than NaN."""

LN_2 = tl.constexpr(math.log(2))


@triton.jit
def fold(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    seen: tl.tensor,
    scale: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    UPCAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The running softmax after one more tile.

    Args:
        q: `[rows, d]`.
        k: `[tokens, d]`; what isn't seen must be finite.
        v: likewise.
        seen: bool `[rows, tokens]`.
        scale: of the scores, times `LOG2_E`.
        peak: fp32 `[rows]`, the largest scaled score so far.
        total: fp32 `[rows]`, the sum of the weights.
        acc: fp32 `[rows, d]`, the weighted sum of the values.
        UPCAST: takes products in fp32.
    """
    if UPCAST:
        scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
    else:
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    scores = tl.where(seen, scores * scale, -float("inf"))
    highest = tl.maximum(peak, tl.max(scores, axis=1))
    weights = tl.exp2(scores - highest[:, None])
    decay = tl.exp2(peak - highest)
    total = total * decay + tl.sum(weights, axis=1)
    weights = weights.to(v.dtype)
    if UPCAST:
        product = tl.dot(weights.to(tl.float32), v.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(weights, v, input_precision="tf32x3")
    acc = acc * decay[:, None] + product
    return highest, total, acc


@triton.jit
def finish(peak: tl.tensor, total: tl.tensor, acc: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The attention `[rows, d]` and its log-sum-exp `[rows]`; 0 and minus infinity in rows that saw nothing."""
    is_any = total > 0
    lse = tl.where(is_any, (peak + tl.log2(tl.where(is_any, total, 1.0))) * LN_2, -float("inf"))
    return acc / tl.where(is_any, total, 1.0)[:, None], lse
