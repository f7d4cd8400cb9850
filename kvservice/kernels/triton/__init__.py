"""CUDA kernels in Triton, one small file each: norms, rotation and KV writes, gating, attention, merging.

This side checks tensors and launches kernels; it knows nothing of models, scheduling or sampling. Importing this
package loads neither Triton nor a compiler; importing one of its modules does.

Triton compiles a kernel when it is first launched and keeps the result on disk. With its interpreter the same kernels
run on CPU tensors, slowly, without a compiler or a GPU: for tests. A process has either compiled kernels or interpreted
ones: the choice is made when the first module is imported.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import torch

OLDEST_CAPABILITY = (8, 0)
"""Compute capability from which Triton supports NVIDIA's GPUs; bf16 on the matrix units begins there too."""

_SWITCH = "TRITON_INTERPRET"


def is_installed() -> bool:
    """Whether Triton is there. It comes with torch's CUDA builds, and with `pip install 'kvservice[cuda]'`."""
    return importlib.util.find_spec("triton") is not None


def can_run(device: torch.device) -> bool:
    """Whether the kernels run on `device`."""
    if not is_installed():
        return False
    if device.type == "cuda":
        return not is_interpreted() and torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
    return device.type == "cpu" and is_interpreted()


def is_interpreted() -> bool:
    """Whether kernels are, or will be, run by Triton's interpreter on CPU tensors."""
    return os.environ.get(_SWITCH, "0").lower() in ("1", "true", "yes", "on", "y")


def use_interpreter() -> None:
    """From now on kernels are interpreted in this process.

    Raises:
        RuntimeError: compiled ones have been loaded already.
    """
    loaded = sorted(name for name in sys.modules if name.startswith(f"{__name__}."))
    if loaded and not is_interpreted():
        raise RuntimeError(f"{loaded[0]} is loaded for compiling: choose the interpreter before it is imported")
    os.environ[_SWITCH] = "1"
