"""Attention over one part, in plain torch, in fp32: slow, obvious, and the measure of every other kernel."""

from __future__ import annotations

import math

from torch import Tensor

from kvservice.kv.partial import AttnPartial


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> AttnPartial:
    """Softmax attention with its log-sum-exp.

    Args:
        q: `[kv, r, d]`; the `r` rows are queries times query heads of the KV head.
        k: `[kv, t, d]`.
        v: `[kv, t, d]`.
        scale: factor of the scores.
        mask: added to the scores, `[r, t]`; minus infinity hides a position. A row that sees nothing has
            out 0 and lse minus infinity.
    """
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask.float()
    lse = scores.logsumexp(-1)
    # The log-sum-exp of nothing, minus infinity, can't be taken from a score that is minus infinity too.
    out = (scores - lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1)).exp() @ v.float()
    return AttnPartial(out.to(q.dtype), lse)
