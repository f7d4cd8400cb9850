"""Low-bit copies of the distant keys, scored by every query."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvservice.compression.protocols import RECALL_INDEXES, Selection
from kvservice.types import GROUP_TOKENS

CONTAINERS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""Number types by width: all numbers that one byte of codes decodes to are looked up as one of these."""


class KeyIndex:
    """Keys quantised per channel, asymmetrically, in groups of 64 tokens; scores are taken from the quantised keys.

    The quantiser is KIVI's for keys: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
    arXiv:2402.02750, §3. Deviates from the paper: the quantised keys only choose which tokens to recall; attention
    itself uses their exact KV. Groups are aligned to position 16 + 64k, whatever the prefill chunking. The middle of a
    channel's range is kept rather than its minimum, so that scores are sums of small numbers and survive bf16.
    """

    paper = "Liu et al., KIVI, arXiv:2402.02750 (the quantiser of keys)"
    summary = "low-bit keys on the device choose the tokens to recall"

    def encode(self, keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """See `RecallIndex`. A byte holds neighbouring channels of one token, the first in its low bits."""
        low, high = keys.amin(1, keepdim=True).float(), keys.amax(1, keepdim=True).float()
        # Both are rounded to the stored dtype before they are used, so that decoding needs nothing else.
        step = ((high - low) / (2**bits - 1)).clamp_(min=1e-6).to(keys.dtype)
        middle = ((high + low) / 2).to(keys.dtype)
        levels = (keys.float() - middle.float()) / step.float() + (2**bits - 1) / 2
        levels = levels.round_().clamp_(0, 2**bits - 1).to(torch.uint8)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=keys.device)
        codes = (levels.view(*keys.shape[:2], -1, 8 // bits) << shifts).sum(-1, dtype=torch.uint8)
        return codes.view(keys.shape[0], -1), torch.cat([step, middle], dim=1)

    def scores(self, ask: Selection) -> Tensor:
        """Scores of the decoded keys: `scale * (q · middle + (q * step) · level)`, the last by look-up."""
        num_kv, num_groups, code_bytes = ask.codes.shape
        rows, dim = ask.q.shape[1:]
        bits = 8 * code_bytes // (GROUP_TOKENS * dim)
        step, middle = ask.params.unbind(2)
        table = _levels(bits, ask.q.dtype, ask.q.device)
        levels = table.index_select(0, ask.codes.view(-1).int()).view(ask.q.dtype)
        levels = levels.view(num_kv * num_groups, GROUP_TOKENS, dim)
        stepped = (ask.q.unsqueeze(1) * step.unsqueeze(2)).view(num_kv * num_groups, rows, dim)
        varying = torch.bmm(stepped, levels.transpose(1, 2)).view(num_kv, num_groups, rows, GROUP_TOKENS)
        constant = ask.q @ middle.transpose(1, 2)
        scores = varying.transpose(1, 2).float() + constant.unsqueeze(-1).float()
        return scores.mul_(ask.scale).reshape(num_kv, rows, -1)


@functools.cache
def _levels(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each byte of codes decodes to, counted in steps from the middle: `[256]`, numbers packed in containers."""
    codes = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(0, 8, bits, device=device)
    levels = ((codes & (2**bits - 1)).float() - (2**bits - 1) / 2).to(dtype).contiguous()
    container = CONTAINERS[levels.shape[1] * dtype.itemsize]
    packed: Tensor = levels.view(container).view(-1)
    return packed


RECALL_INDEXES.register("key_index")(KeyIndex())
