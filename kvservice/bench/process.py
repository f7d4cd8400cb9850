"""Memory of a process as the operating system sees it (/proc: Linux), and whether it drifts. Knows no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvservice.errors import InternalError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Resident bytes. `anonymous_bytes` leaves out files that are mapped, such as libraries."""

    rss_bytes: int
    anonymous_bytes: int


def read_memory() -> ProcessMemory:
    """What this process has resident now. A kernel that doesn't tell anonymous memory apart gives all for it."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon"):
            fields[name] = int(value.split()[0]) * 1024
    if "VmRSS" not in fields:
        raise InternalError("/proc/self/status has no VmRSS")
    return ProcessMemory(fields["VmRSS"], fields.get("RssAnon", fields["VmRSS"]))


def slope_mib_per_min(seconds: Sequence[float], num_bytes: Sequence[int]) -> float:
    """By how much bytes grow, least squares; 0 for less than three points."""
    if len(seconds) < 3:
        return 0.0
    slope, _ = np.polyfit(np.array(seconds) / 60.0, np.array(num_bytes) / MIB, 1)
    return float(slope)
