"""Low-bit copies of the distant keys, scored by every query."""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.compression.protocols import RECALL_INDEXES, Selection
from kvservice.types import GROUP_TOKENS


class KeyIndex:
    """Keys quantised per channel, asymmetrically, in groups of 64 tokens; scores are taken from the quantised keys.

    The quantiser is KIVI's for keys: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
    arXiv:2402.02750, §3. Deviates from the paper: the quantised keys only choose which tokens to recall; attention
    itself uses their exact KV. Groups are aligned to position 16 + 64k, whatever the prefill chunking.
    """

    paper = "Liu et al., KIVI, arXiv:2402.02750 (the quantiser of keys)"
    summary = "low-bit keys on the device choose the tokens to recall"

    def encode(self, keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """See `RecallIndex`. A byte holds the codes of tokens r, r + s, r + 2s … of one channel, s = 64 bits / 8."""
        num_groups, _, dim = keys.shape
        per_byte = 8 // bits
        zero = keys.amin(1, keepdim=True)
        # The scale is rounded to the stored dtype before it is used, so that decoding needs nothing else.
        scale = ((keys.amax(1, keepdim=True).float() - zero.float()) / (2**bits - 1)).clamp_(min=1e-6).to(keys.dtype)
        levels = ((keys.float() - zero.float()) / scale.float()).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
        strided = levels.view(num_groups, per_byte, GROUP_TOKENS // per_byte, dim)
        codes = strided[:, 0].clone()
        for place in range(1, per_byte):
            codes |= strided[:, place] << (bits * place)
        return codes.view(num_groups, -1), torch.cat([scale, zero], dim=1)

    def scores(self, ask: Selection) -> Tensor:
        """Scores of the decoded keys, `scale * q · (zero + step * code)`."""
        num_kv, num_groups, code_bytes = ask.codes.shape
        dim = ask.q.shape[-1]
        per_byte = GROUP_TOKENS * dim // code_bytes
        bits = 8 // per_byte
        packed = ask.codes.view(num_kv, num_groups, GROUP_TOKENS // per_byte, dim)
        levels = torch.stack([(packed >> (bits * place)) & (2**bits - 1) for place in range(per_byte)], dim=2)
        step, zero = ask.params[:, :, 0:1], ask.params[:, :, 1:2]
        keys = levels.view(num_kv, num_groups, GROUP_TOKENS, dim).to(ask.q.dtype).mul_(step).add_(zero)
        return (ask.q @ keys.view(num_kv, -1, dim).transpose(1, 2)).float().mul_(ask.scale)


RECALL_INDEXES.register("key_index")(KeyIndex())
