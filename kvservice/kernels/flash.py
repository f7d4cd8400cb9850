"""Attention over one part by torch's own flash kernels, which return the log-sum-exp that merging needs.

torch's public `scaled_dot_product_attention` keeps the log-sum-exp to itself, so this calls the operator below it. The
operator is private to torch; the tests compare it with `reference` on every torch release that we support.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvservice.kernels import reference
from kvservice.kv.partial import AttnPartial, merge_with_lse


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> AttnPartial:
    """As `reference.attend`, on the CPU by torch's flash kernel; other devices use the reference for now."""
    if q.device.type != "cpu":
        return reference.attend(q, k, v, scale, mask)
    if k.shape[1] == 0:
        # The operator divides by the number of tokens.
        return AttnPartial.of_nothing(q)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        attn_mask=None if mask is None else mask.to(q.dtype)[None, None],
        scale=scale,
    )
    lse = lse[0]
    if mask is not None:
        # The operator says 0 for a row that sees nothing, as if it saw one token.
        lse = lse.masked_fill(mask.amax(-1) == -math.inf, -math.inf)
    return AttnPartial(out[0], lse)


class FlashAttention:
    """See `PartAttention`: a partial for each part, merged when asked. The fast one; its bits depend on the cuts."""

    def __init__(self, q: Tensor, scale: float) -> None:
        self._q = q
        self._scale = scale
        self._parts: list[AttnPartial] = []

    def add(self, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        """See `PartAttention`."""
        self._parts.append(attend(self._q, k, v, self._scale, mask))

    def result(self) -> AttnPartial:
        """See `PartAttention`."""
        return merge_with_lse(self._parts) if self._parts else AttnPartial.of_nothing(self._q)
