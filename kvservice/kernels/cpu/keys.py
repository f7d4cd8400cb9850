"""Low-bit codes of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.kernels.cpu.runtime import DTYPES, HEAD_DIM_STEP, loaded


def encode_keys(keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Low-bit codes of keys, bit for bit those of `methods.key_index`, which says how they lie.

    Args:
        keys: `[n, 64, d]`, bf16 or fp32, d a multiple of 8. All tokens may be equally far apart in memory.
        bits: 1, 2, 4 or 8.

    Returns:
        Codes, uint8 `[n, 64 * d * bits / 8]`, and params, `[n, 2, d]` in the keys' dtype.
    """
    count, tokens, dim = keys.shape
    if tokens != 64 or dim % HEAD_DIM_STEP or bits not in (1, 2, 4, 8) or keys.dtype not in DTYPES:
        raise ValueError(f"{bits} bits of keys {keys.dtype} {tuple(keys.shape)}: must be 1, 2, 4 or 8 of [n, 64, 8 i]")
    stride = keys.stride(1)
    if keys.stride(2) != 1 or keys.stride(0) != tokens * stride:
        keys, stride = keys.contiguous(), dim
    codes = torch.empty(count, tokens * dim * bits // 8, dtype=torch.uint8)
    params = keys.new_empty(count, 2, dim)
    kind = DTYPES[keys.dtype]
    loaded().kv_encode_groups(keys.data_ptr(), stride, count, dim, bits, kind, codes.data_ptr(), params.data_ptr())
    return codes, params
