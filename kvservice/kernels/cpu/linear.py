"""Products with packed matrices."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvservice.kernels.cpu.library import KvLinear
from kvservice.kernels.cpu.runtime import DTYPES, address_of, check, empty_bytes, loaded


class PackedLinear:
    """A [out, in] matrix in the kernels' own order, with its products.

    Args:
        weight: `[out, in]`, bf16 or fp32; not kept. Of a gated pair `[2 * out, in]`: gate rows, then up rows.
        bias: `[out]`, or None.
        is_gated: the product is `silu(gate) * up`.

    Attributes:
        num_bytes: of the packed weights.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, is_gated: bool = False) -> None:
        if weight.dtype not in DTYPES:
            raise ValueError(f"weights are {weight.dtype}: must be torch.bfloat16 or torch.float32")
        if is_gated and bias is not None:
            raise ValueError("a gated pair takes no bias")
        rows, self.in_features = weight.shape
        self.out_features = rows // 2 if is_gated else rows
        self.dtype = weight.dtype
        weight = check(weight.contiguous(), self.dtype, (rows, self.in_features), "weight")
        kernels, sizes = loaded(), (self.out_features, self.in_features, DTYPES[self.dtype], int(is_gated))
        self.num_bytes = int(kernels.kv_packed_bytes(*sizes))
        # Each row of 64 bytes is read as one vector or tile row, which is fastest when none crosses a cache line.
        self._packed = empty_bytes(self.num_bytes)
        kernels.kv_pack(weight.data_ptr(), *sizes, self._packed.data_ptr())
        self._bias = None if bias is None else bias.float().contiguous()
        self.record = KvLinear(
            packed=self._packed.data_ptr(),
            bias=address_of(self._bias),
            in_features=self.in_features,
            out_features=self.out_features,
            dtype=DTYPES[self.dtype],
            is_gated=int(is_gated),
        )

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """`[n, in]` in the weights' dtype to `[n, out]` in `out_dtype` (x's if None)."""
        check(x, self.dtype, (x.shape[0], self.in_features), "x")
        out = torch.empty(x.shape[0], self.out_features, dtype=out_dtype or x.dtype)
        loaded().kv_linear(
            ctypes.byref(self.record),
            x.data_ptr(),
            self.in_features,
            x.shape[0],
            out.data_ptr(),
            self.out_features,
            DTYPES[out.dtype],
        )
        return out

    def of_normed(self, x: Tensor, norm: Tensor, eps: float, rows: Tensor) -> Tensor:
        """The product of some normed rows, in fp32: the head of a model.

        Args:
            x: fp32 `[n, in]`.
            norm: fp32 `[in]`.
            eps: of the norm.
            rows: int64 `[r]`, which rows of x.

        Returns:
            fp32 `[r, out]`.
        """
        check(x, torch.float32, (x.shape[0], self.in_features), "x")
        check(norm, torch.float32, (self.in_features,), "norm")
        check(rows, torch.int64, (rows.shape[0],), "rows")
        out = torch.empty(rows.shape[0], self.out_features)
        loaded().kv_norm_linear(
            ctypes.byref(self.record),
            norm.data_ptr(),
            eps,
            x.data_ptr(),
            rows.data_ptr(),
            rows.shape[0],
            out.data_ptr(),
        )
        return out
