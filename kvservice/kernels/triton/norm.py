"""A layer's result added to the residual stream, and the RMS norm of the sum. Knows nothing of what the rows are.

The same in torch:

    x += delta
    out = F.rms_norm(x, (hidden,), weight.float(), eps).to(out.dtype)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvservice.kernels.triton.checks import check, power_of_two

MAX_HIDDEN = 32_768
"""A row is one program's, in registers."""


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    """Adds to the residual stream and norms it, in one pass over it.

    Args:
        x: fp32 `[n, hidden]`, changed in place.
        delta: `[n, hidden]` in out's type, added to x; None: nothing is.
        weight: fp32 `[hidden]`.
        eps: added to the mean square.
        out: `[n, hidden]`, gets the norm.
    """
    rows, hidden = x.shape
    if hidden > MAX_HIDDEN:
        raise ValueError(f"hidden size {hidden:,}: at most {MAX_HIDDEN:,}")
    check(x, torch.float32, (rows, hidden), "x")
    check(weight, torch.float32, (hidden,), "weight")
    check(out, out.dtype, (rows, hidden), "out")
    if delta is not None:
        check(delta, out.dtype, (rows, hidden), "delta")
    if rows:
        block = power_of_two(hidden)
        warps = min(max(block // 512, 1), 16)
        _add_rms_norm[(rows,)](
            x,
            out if delta is None else delta,
            weight,
            eps,
            out,
            hidden,
            BLOCK=block,
            ADDS=delta is not None,
            num_warps=warps,
        )


@triton.jit
def _add_rms_norm(
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    eps: tl.tensor,
    out: tl.tensor,
    hidden: tl.tensor,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
) -> None:
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    at = tl.program_id(0).to(tl.int64) * hidden + column
    row = tl.load(x + at, mask=inside, other=0.0)
    if ADDS:
        row += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + at, row, mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(row * row, axis=0) / hidden + eps)
    weights = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + at, (row * scale * weights).to(out.dtype.element_ty), mask=inside)
