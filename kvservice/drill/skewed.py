"""Runs `kvservice` by a wall clock that is as many seconds ahead as a file says: `skewed FILE ARGUMENTS...`.

For drills alone: clocks of machines jump, and a drill can't have that of its own machine do so. The steady clocks, by
which a process measures how long something takes, are left as they are. Knows nothing of what it runs.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import runpy
import struct
import sys
import threading
import time
import types
from pathlib import Path

FORMAT = struct.Struct("d")
PR_SET_NAME = 15
MAX_NAME_BYTES = 15


def write_skew(path: Path, ahead_s: float) -> None:
    """Sets the clocks of those that were started with `path`, at once. Makes the file if need be."""
    if not path.exists():
        path.write_bytes(bytes(FORMAT.size))
    with path.open("r+b") as file:
        file.write(FORMAT.pack(ahead_s))


def _leave_alone(*names: str) -> None:
    """gRPC compares Python's clock with that of its own core, which isn't moved: it keeps the machine's."""
    for name in names:
        importlib.import_module(name)
    unmoved = types.ModuleType("time")
    unmoved.__dict__.update(time.__dict__)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in names and getattr(module, "time", None) is time:
            vars(module)["time"] = unmoved


def _name_threads() -> None:
    """Python 3.14 does so by itself."""
    libc = ctypes.CDLL(None)
    run = threading.Thread.run

    def named(self: threading.Thread) -> None:
        libc.prctl(PR_SET_NAME, self.name.encode()[:MAX_NAME_BYTES], 0, 0, 0)
        run(self)

    threading.Thread.run = named  # type: ignore[method-assign]


def _main() -> None:
    path = sys.argv.pop(1)
    with Path(path).open("rb") as file:
        told = mmap.mmap(file.fileno(), FORMAT.size, access=mmap.ACCESS_READ)
    machine = time.time

    def skewed() -> float:
        return float(machine() + FORMAT.unpack_from(told)[0])

    _name_threads()
    _leave_alone("grpc", "grpc.aio")
    time.time = skewed
    runpy.run_module("kvservice", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
