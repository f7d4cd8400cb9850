"""Low-bit copies of the distant keys, scored by every query."""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.compression.protocols import RECALL_INDEXES, Selection
from kvservice.kernels import cpu
from kvservice.types import GROUP_TOKENS

RUN_TOKENS = 16
QUAD_CHANNELS = 4
"""What an int8 product of the kernels takes at once: four channels of sixteen tokens, one after the other."""


class KeyIndex:
    """Keys quantised per channel, asymmetrically, in groups of 64 tokens; scores are taken from the quantised keys.

    The quantiser is KIVI's for keys: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
    arXiv:2402.02750, §3. Deviates from the paper: the quantised keys only choose which tokens to recall; attention
    itself uses their exact KV. Groups are aligned to position 16 + 64k, whatever the prefill chunking. The middle of a
    channel's range is kept rather than its minimum, so that scores are sums of small numbers and survive bf16.
    """

    paper = "Liu et al., KIVI, arXiv:2402.02750 (the quantiser of keys)"
    summary = "low-bit keys on the device choose the tokens to recall"
    is_key_index = True

    def encode(self, keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """See `RecallIndex`. A group's codes are `[d * bits / 8, 64]`, vectors of 64 bytes as the kernels take them.

        A vector has `8 / bits` fields, the first in the bytes' low bits. Fields, counted through all vectors, are
        ordered by four channels, and for each four by runs of 16 tokens; in a field, byte `4 * i + j` is token i of the
        run in channel j of the four.
        """
        if keys.device.type == "cpu" and cpu.isa() != "none" and keys.shape[2] % cpu.HEAD_DIM_STEP == 0:
            return cpu.encode_keys(keys, bits)
        return encode(keys, bits)

    def scores(self, ask: Selection) -> Tensor:
        """Scores of the decoded keys: `scale * (q · middle + (q * step) · level)`, levels counted from the middle."""
        num_kv, num_groups, code_bytes = ask.codes.shape
        rows, dim = ask.q.shape[1:]
        bits = 8 * code_bytes // (GROUP_TOKENS * dim)
        step, middle = ask.params.unbind(2)
        levels = _levels(ask.codes.view(num_kv * num_groups, code_bytes), bits, dim).to(ask.q.dtype)
        levels -= (2**bits - 1) / 2
        stepped = (ask.q.unsqueeze(1) * step.unsqueeze(2)).view(num_kv * num_groups, rows, dim)
        varying = torch.bmm(stepped, levels.transpose(1, 2)).view(num_kv, num_groups, rows, GROUP_TOKENS)
        constant = ask.q @ middle.transpose(1, 2)
        scores = varying.transpose(1, 2).float() + constant.unsqueeze(-1).float()
        return scores.mul_(ask.scale).reshape(num_kv, rows, -1)


def encode(keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """What `KeyIndex.encode` gives, by torch on any device."""
    low, high = keys.amin(1, keepdim=True).float(), keys.amax(1, keepdim=True).float()
    # Both are rounded to the stored dtype before they are used, so that decoding needs nothing else.
    step = ((high - low) / (2**bits - 1)).clamp_(min=1e-6).to(keys.dtype)
    middle = ((high + low) / 2).to(keys.dtype)
    # The middle lies between two levels.
    levels = ((keys.float() - middle.float()) * step.float().reciprocal()).floor_() + 2 ** (bits - 1)
    levels = levels.clamp_(0, 2**bits - 1).to(torch.uint8)
    fields = levels.view(keys.shape[0], -1, RUN_TOKENS, keys.shape[2] // QUAD_CHANNELS, QUAD_CHANNELS)
    fields = fields.permute(0, 3, 1, 2, 4).reshape(keys.shape[0], -1, 8 // bits, RUN_TOKENS * QUAD_CHANNELS)
    codes = (fields << _shifts(bits, keys.device)).sum(2, dtype=torch.uint8)
    return codes.view(keys.shape[0], -1), torch.cat([step, middle], dim=1)


def _levels(codes: Tensor, bits: int, dim: int) -> Tensor:
    """The levels that `encode` packed, uint8 `[n, 64, d]`."""
    fields = codes.view(codes.shape[0], -1, 1, RUN_TOKENS * QUAD_CHANNELS) >> _shifts(bits, codes.device)
    levels: Tensor = (fields & (2**bits - 1)).view(codes.shape[0], dim // QUAD_CHANNELS, -1, RUN_TOKENS, QUAD_CHANNELS)
    return levels.permute(0, 2, 3, 1, 4).reshape(codes.shape[0], GROUP_TOKENS, dim)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device).unsqueeze(1)


RECALL_INDEXES.register("key_index")(KeyIndex())
