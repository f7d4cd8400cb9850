"""Which distant tokens a query recalls. Pure functions of scores."""

from __future__ import annotations

import torch
from torch import Tensor


def select(scores: Tensor, proximal_lse: Tensor, num_queries: int, budget: int) -> Tensor:
    """The tokens with the most attention mass over the query heads of a KV head.

    A head's mass is weighed against what it attends to in sinks and window, so a head that looks nearby has little
    say: mass = exp(score - log(sum over distant + sum over proximal)).

    Args:
        scores: `[kv, num_queries * group, t]`.
        proximal_lse: `[kv, num_queries * group]`.
        num_queries: queries; each selects for itself.
        budget: tokens for each KV head and query.

    Returns:
        int64 `[kv, num_queries, min(budget, t)]`, in no order.
    """
    num_kv, rows, total = scores.shape
    norm = torch.logaddexp(scores.logsumexp(-1), proximal_lse)
    mass = (scores - norm.unsqueeze(-1)).exp_().view(num_kv, num_queries, rows // num_queries, total).sum(2)
    return mass.topk(min(budget, total), dim=-1, sorted=False).indices
