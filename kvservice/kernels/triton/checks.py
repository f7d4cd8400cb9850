"""What every kernel asks of its tensors. Knows no kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.kernels.triton import can_run, is_interpreted

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Types of weights, activations and KV."""

LEAST_PRODUCT = 16
"""Each side of a matrix product has at least so many numbers, or the matrix units can't be used."""

_KEYS_BYTES = 16_384
"""Keys that are looked at together: several lots, with their values, must fit the memory that a program shares."""

INTERPRETED = is_interpreted()
"""The interpreter keeps bf16 as bits and can't multiply it: products are then taken in fp32, where bf16 is exact."""


def check(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> Tensor:
    """The tensor itself.

    Raises:
        ValueError: it has another type or shape, isn't contiguous, or lies where kernels can't reach it.
    """
    if tensor.dtype is not dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        found = f"{tensor.dtype} {tuple(tensor.shape)}{'' if tensor.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"{name} is {found}: must be {dtype} {shape}, contiguous")
    if tensor.device.type != ("cpu" if INTERPRETED else "cuda"):
        where = "on the CPU, since kernels are interpreted" if INTERPRETED else "on a CUDA device"
        raise ValueError(f"{name} is on {tensor.device}: must be {where}")
    return tensor


def check_device(device: torch.device) -> None:
    """Raises ValueError unless kernels run on `device`."""
    if not can_run(device):
        raise ValueError(
            f"device {device}: Triton's kernels need a CUDA device of compute capability 8.0 or later, "
            "or a CPU with TRITON_INTERPRET=1"
        )


def power_of_two(number: int, at_least: int = 1) -> int:
    """The least power of two that is not below either."""
    return 1 << (max(number, at_least) - 1).bit_length()


def tokens_at_once(q: Tensor) -> int:
    """Tokens whose keys and values attention looks at together, for queries `[n, h, d]`: 16, 32 or 64."""
    row_bytes = power_of_two(q.shape[2], LEAST_PRODUCT) * q.element_size()
    return min(64, power_of_two(_KEYS_BYTES // row_bytes, LEAST_PRODUCT))
