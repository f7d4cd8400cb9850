"""How alike layers attend to distant tokens: Jensen-Shannon divergence of their distributions. Tensors in, tensors out.

Only the distant part counts, renormalised: the sinks take most of the attention in all layers, so everything would look
alike with them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entropy(p: Tensor) -> Tensor:
    """In bits, over the last dimension of distributions `[..., n]`; overwrites nothing."""
    tiny = torch.finfo(p.dtype).tiny
    return p.clamp_min(tiny).log2_().mul_(p).sum(-1).neg_()


def pairwise_js(p: Tensor) -> Tensor:
    """Jensen-Shannon divergence of every two layers, from 0 for equal distributions to 1 for disjoint ones.

    Args:
        p: fp32 `[l, r, n]`, distributions over `n` tokens, of `r` queries in each layer.

    Returns:
        `[l, l, r]`, symmetric, 0 on the diagonal. Needs twice the memory of `p` besides.
    """
    own = entropy(p)
    result = p.new_zeros(p.shape[0], *own.shape)
    for layer in range(p.shape[0] - 1):
        others = slice(layer + 1, None)
        mixed = (p[others] + p[layer]).mul_(0.5)
        # Rounding may leave a little less than nothing.
        js = (entropy(mixed) - 0.5 * (own[others] + own[layer])).clamp_(0.0, 1.0)
        result[layer, others] = js
        result[others, layer] = js
    return result


def distant_attention(q: Tensor, k: Tensor, distant: slice) -> tuple[Tensor, Tensor]:
    """How the last queries of a text attend to its distant tokens.

    Args:
        q: `[r, m, d]`, rotated queries of `r` heads that share the keys; of the text's last `m` tokens.
        k: `[t, d]`, rotated keys of the whole text.
        distant: a range of positions that all the queries see.

    Returns:
        fp32 distributions over the distant tokens `[r, m, n]`, and the share of all attention that they got `[r, m]`.
    """
    num_queries, num_tokens = q.shape[1], k.shape[0]
    scores = q.float() @ k.float().T / math.sqrt(q.shape[-1])
    unseen = torch.ones(num_queries, num_tokens, dtype=torch.bool, device=q.device).triu(num_tokens - num_queries + 1)
    total = scores.masked_fill(unseen, -math.inf).logsumexp(-1)
    far = scores[..., distant]
    return far.softmax(-1), (far.logsumexp(-1) - total).exp_().clamp_(max=1.0)
