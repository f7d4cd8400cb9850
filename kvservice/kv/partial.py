"""Partial attention, and how partial results become one softmax.

Each source of KV is a *part* that gives `(out, lse)`. Parts of one query partition the positions it may see, so their
merge by log-sum-exp equals one softmax over all of them (Milakov & Gimelshein, "Online normalizer calculation for
softmax", arXiv:1805.02867, applied to parts as in FlashAttention-2, arXiv:2307.08691, §3.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttnPartial:
    """Attention over some positions.

    Attributes:
        out: `[kv, r, d]`, where the `r` rows are queries times query heads of the KV head.
        lse: fp32 `[kv, r]`, log of the sum of exponentiated scores; minus infinity, with out 0, where a row saw
            nothing.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def of_nothing(cls, q: Tensor) -> AttnPartial:
        """Attention of rows `q` over no positions."""
        return cls(torch.zeros_like(q), torch.full(q.shape[:2], -math.inf, dtype=torch.float32, device=q.device))


def merge_with_lse(parts: Sequence[AttnPartial]) -> AttnPartial:
    """One softmax over the union of disjoint parts, itself a part. A row may have seen nothing of some, or of all."""
    if len(parts) == 1:
        return parts[0]
    each = torch.stack([part.lse for part in parts])
    lse = each.logsumexp(0)
    # A row that saw nothing of any part has lse -inf, and each of its weights is exp(-inf - 0) = 0.
    weights = (each - lse.masked_fill(lse == -math.inf, 0)).exp_()
    merged = torch.zeros_like(parts[0].out, dtype=torch.float32)
    for part, weight in zip(parts, weights, strict=True):
        merged.addcmul_(part.out.float(), weight.unsqueeze(-1))
    return AttnPartial(merged.to(parts[0].out.dtype), lse)


def merge_partials(parts: Sequence[AttnPartial]) -> Tensor:
    """As `merge_with_lse`, without the log-sum-exp.

    Returns:
        `[kv, r, d]` in the dtype of the parts.
    """
    return merge_with_lse(parts).out
