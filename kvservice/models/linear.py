"""A matrix of weights, its bias and its product. Knows nothing of layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROW_STEP = 32
_FEW_ROWS = 16
"""More rows than these are filled up to a multiple of `_ROW_STEP`: oneDNN keeps code for every number of rows that it
has met, 0.8 MB each at SmolLM2's widths, and takes 2 to 18 ms a matrix to make it."""

_PACK_ROWS = 64
"""Rows that the packed form is laid out for. Forms for 8 to 512 rows are equally fast at every number of rows."""


class Linear:
    """Multiplies rows by a [out, in] matrix and adds a bias [out], if there is one.

    On a CPU with bf16 support the weights are packed once into oneDNN's blocked form. Over the matrices of all 30
    layers of SmolLM2-135M that takes 29 ms instead of 39 (F.linear) for 1 row, 23 instead of 30 for 8, 32 instead of
    51 for 64. The plain tensor isn't kept.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.num_bytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        self._bias = bias
        self._is_packed = _packs(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS) if self._is_packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """[n, in] → [n, out], in x's dtype, which must be the weights'."""
        if self._is_packed:
            num_rows = x.shape[0]
            padding = -num_rows % _ROW_STEP if num_rows > _FEW_ROWS else 0
            padded = F.pad(x, (0, 0, 0, padding)) if padding else x
            out: Tensor = torch.ops.mkldnn._linear_pointwise(padded, self._weight, self._bias, "none", [], "")
            return out[:num_rows]
        return F.linear(x, self._weight, self._bias)


def _packs(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
