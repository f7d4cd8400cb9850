"""The library at work: its instruction set, its threads, memory for it, and what it takes."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvservice.kernels.cpu.library import ISAS, library

HEAD_DIM_STEP = 8
"""A head's numbers must be a multiple of it."""

DTYPES = {torch.bfloat16: 0, torch.float32: 1}


def isa() -> str:
    """The instruction set in use, one of `ISAS`; "none" where the kernels can't be used."""
    kernels = library()
    return "none" if kernels is None else kernels.kv_isa().decode()


def limit_isa(most: str) -> None:
    """Uses instruction sets up to `most` of `ISAS` from now on, for tests and tables. Packed matrices stay valid."""
    if most not in ISAS:
        raise ValueError(f"instruction set {most!r}: must be one of {', '.join(ISAS)}")
    if (kernels := library()) is not None:
        kernels.kv_limit_isa(most.encode())


def num_threads() -> int:
    """Threads that each call runs on, the caller's included."""
    return int(loaded().kv_num_threads())


def set_threads(num_threads: int) -> None:
    """Sets the number of threads, from 1 on. Blocks until the running call ends."""
    if num_threads < 1:
        raise ValueError(f"num_threads={num_threads}: must be at least 1")
    loaded().kv_set_threads(num_threads)


def set_waiting(spin_turns: int, yield_turns: int) -> None:
    """How long idle threads wait for the next call before they sleep: turns of spinning, then of yielding."""
    loaded().kv_set_waiting(spin_turns, yield_turns)


def empty_bytes(num_bytes: int) -> Tensor:
    """Uninitialised memory, uint8 `[num_bytes]`, from a 64-byte border, or in 2 MiB pages where that is worth it.

    Attention over blocks that lie anywhere in an arena of such pages took 15 to 40 % less time.
    """
    huge_page = 2 << 20
    alignment = 64 if num_bytes < huge_page else huge_page
    memory = torch.empty(num_bytes + alignment, dtype=torch.uint8)
    start = -memory.data_ptr() % alignment
    aligned = memory[start : start + num_bytes]
    if alignment == huge_page:
        loaded().kv_advise_huge(aligned.data_ptr(), num_bytes)
    return aligned


def loaded() -> ctypes.CDLL:
    """The library.

    Raises:
        RuntimeError: it isn't built, or the machine is too old for it.
    """
    kernels = library()
    if kernels is None or isa() == "none":
        raise RuntimeError("the CPU kernels can't be used here: build them with `make kernels`, or use torch")
    return kernels


def check(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> Tensor:
    """The tensor, if it is what kernels take.

    Raises:
        ValueError: it isn't.
    """
    if tensor.dtype is not dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        found = f"{tensor.dtype} {tuple(tensor.shape)}{'' if tensor.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"{name} is {found}: must be {dtype} {shape}, contiguous")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}: must be on the CPU")
    return tensor


def address_of(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers lie."""
    return None if tensor is None else tensor.data_ptr()
