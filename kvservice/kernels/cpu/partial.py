"""Merging attention over parts of a sequence."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kvservice.kernels.cpu.runtime import DTYPES, check, loaded


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """Merges partial attention over disjoint tokens into the first, `outs[0]` and `lses[0]`.

    Args:
        outs: `[..., d]` each. Whatever stands in rows that saw nothing is ignored.
        lses: fp32 `[...]` each; minus infinity in rows that saw nothing.
    """
    first = outs[0]
    for out, lse in zip(outs, lses, strict=True):
        check(out, first.dtype, tuple(first.shape), "out")
        check(lse, torch.float32, tuple(first.shape[:-1]), "lse")
    count = len(outs)
    loaded().kv_merge(
        (ctypes.c_void_p * count)(*[out.data_ptr() for out in outs]),
        (ctypes.c_void_p * count)(*[lse.data_ptr() for lse in lses]),
        count,
        lses[0].numel(),
        first.shape[-1],
        DTYPES[first.dtype],
    )
