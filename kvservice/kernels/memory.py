"""Memory that kernels read fastest, and how the process gives the rest back. Knows nothing of what lies in it."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvservice.kernels import cpu

BIG_BLOCK_BYTES = 1 << 20

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def give_back_big_blocks() -> None:
    """From now on, blocks of 1 MiB and more go back to the system as soon as they are freed. For the whole process.

    glibc raises that limit up to 32 MiB as such blocks are freed, and cuts the next ones out of its heap. A step's
    buffers differ in size, so the heap got holes that nothing fitted into: in a mixed load it grew by tens of MiB in
    minutes while what was in use stayed the same. Elsewhere than on glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, BIG_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * BIG_BLOCK_BYTES)


def device_memory(num_bytes: int, device: torch.device) -> Tensor:
    """Uninitialised memory, uint8 `[num_bytes]`: on a CPU with the C++ kernels, in large pages."""
    if device.type == "cpu" and cpu.isa() != "none":
        return cpu.empty_bytes(num_bytes)
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)
