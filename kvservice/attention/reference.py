"""Attention of one sequence over all its KV at once, with an explicit mask: the oracle of the tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attend_visible(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One softmax over the visible positions of each query and KV head.

    Args:
        q: `[m, h, d]`.
        k: `[kv, t, d]`.
        v: `[kv, t, d]`.
        visible: bool `[m, kv, t]`.

    Returns:
        fp32 `[m, h, d]`.
    """
    num_queries, num_heads, dim = q.shape
    num_kv = k.shape[0]
    queries = q.float().view(num_queries, num_kv, num_heads // num_kv, dim)
    scores = torch.einsum("mkgd,ktd->mkgt", queries, k.float()) / math.sqrt(dim)
    scores = scores.masked_fill(~visible.unsqueeze(2), -math.inf)
    return torch.einsum("mkgt,ktd->mkgd", scores.softmax(-1), v.float()).reshape(num_queries, num_heads, dim)
