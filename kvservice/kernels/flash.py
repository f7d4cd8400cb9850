"""Attention over one part by torch's own flash kernels, which return the log-sum-exp that merging needs.

torch's public `scaled_dot_product_attention` keeps the log-sum-exp to itself, so this calls the operator below it. The
operator is private to torch; the tests compare it with `reference` on every torch release that we support.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.kernels import reference
from kvservice.kv.partial import AttnPartial


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> AttnPartial:
    """As `reference.attend`, on the CPU by torch's flash kernel; other devices use the reference for now."""
    if q.device.type != "cpu":
        return reference.attend(q, k, v, scale, mask)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        attn_mask=None if mask is None else mask.to(q.dtype)[None, None],
        scale=scale,
    )
    return AttnPartial(out[0], lse[0])
