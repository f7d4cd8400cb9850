"""Memory that kernels read fastest. Knows nothing of what lies in it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.kernels import cpu


def device_memory(num_bytes: int, device: torch.device) -> Tensor:
    """Uninitialised memory, uint8 `[num_bytes]`: on a CPU with the C++ kernels, in large pages."""
    if device.type == "cpu" and cpu.isa() != "none":
        return cpu.empty_bytes(num_bytes)
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)
