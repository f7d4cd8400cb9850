"""The gate of a layer's second half. The same in torch: `F.silu(gate) * up`, in fp32. Knows nothing of layers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvservice.kernels.triton.checks import check

_BLOCK = 1024


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """Half of a row gates the other half.

    Args:
        gate_up: `[n, 2 * width]`: gates, then what they gate.
        out: `[n, width]` in the same type.
    """
    rows, width = out.shape
    check(gate_up, out.dtype, (rows, 2 * width), "gate_up")
    check(out, out.dtype, (rows, width), "out")
    if rows:
        _silu_mul[(rows, triton.cdiv(width, _BLOCK))](gate_up, out, width, BLOCK=_BLOCK)


@triton.jit
def _silu_mul(gate_up: tl.tensor, out: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = gate_up + row * 2 * width + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + column, gated.to(out.dtype.element_ty), mask=inside)
