"""Partial attention, and how partial results become one softmax.

Each source of KV is a *part* that gives `(out, lse)`. Parts of one query partition the positions it may see, so their
merge by log-sum-exp equals one softmax over all of them (Milakov & Gimelshein, "Online normalizer calculation for
softmax", arXiv:1805.02867, applied to parts as in FlashAttention-2, arXiv:2307.08691, §3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvservice.errors import InternalError


@dataclass(frozen=True, slots=True)
class AttnPartial:
    """Attention over some positions.

    Attributes:
        out: `[kv, r, d]`, where the `r` rows are queries times query heads of the KV head.
        lse: fp32 `[kv, r]`, log of the sum of exponentiated scores.
    """

    out: Tensor
    lse: Tensor


def merge_partials(parts: Sequence[AttnPartial]) -> Tensor:
    """One softmax over the union of disjoint parts.

    Returns:
        `[kv, r, d]` in the dtype of the parts.
    """
    if len(parts) == 1:
        return parts[0].out
    weights = torch.stack([part.lse for part in parts]).softmax(0)
    merged = torch.zeros_like(parts[0].out, dtype=torch.float32)
    for part, weight in zip(parts, weights, strict=True):
        merged.addcmul_(part.out.float(), weight.unsqueeze(-1))
    return merged.to(parts[0].out.dtype)


@dataclass(frozen=True, slots=True)
class Span:
    """Positions `start` to `stop - 1`."""

    start: int
    stop: int


def check_partition(spans: Sequence[Span], num_visible: int) -> None:
    """Raises InternalError unless the spans cover the positions 0 to `num_visible - 1`, each exactly once."""
    expected = 0
    for span in sorted((s for s in spans if s.start != s.stop), key=lambda s: s.start):
        if span.start != expected or span.stop < span.start:
            raise InternalError(f"parts {list(spans)} are no partition of {num_visible} positions")
        expected = span.stop
    if expected != num_visible:
        raise InternalError(f"parts {list(spans)} are no partition of {num_visible} positions")
