"""Limits that a machine sets a process, changed while it runs: sizes of files, memory. Linux; knows no service."""

from __future__ import annotations

import resource
from pathlib import Path


def limit_files(pid: int, num_bytes: int | None) -> None:
    """No file of the process may grow beyond this: to it, the disk is full. None: as large as it likes."""
    _limit(pid, resource.RLIMIT_FSIZE, num_bytes)


def limit_memory(pid: int, more_bytes: int | None) -> None:
    """The process may map only so much more than it has now. None: as much as it likes."""
    _limit(pid, resource.RLIMIT_AS, None if more_bytes is None else _mapped_bytes(pid) + more_bytes)


def _limit(pid: int, kind: int, num_bytes: int | None) -> None:
    # The hard limit stays: what was taken can be given back.
    _, hard = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (hard if num_bytes is None else num_bytes, hard))


def _mapped_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmSize:"):
            return int(line.split()[1]) * 1024
    return 0
