"""One thread of a process stops, while the others go on: the one that writes frames.

By ptrace, as a debugger would do it: a signal stops a whole process. Killing a thread alone can't be done.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from kvservice.drill.deployment import Deployment
from kvservice.drill.faults import Fault
from kvservice.drill.processes import PROCESS
from kvservice.errors import Unavailable

MOVER = "kv-write-behind"
SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17
WAIT_ALL = 0x40000000
"""__WALL: waits for threads too."""


class StoppedThreads:
    """Stops threads of all workers by their name, and lets them go on. All calls come from one thread: its tracer."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stopped: list[int] = []

    async def stop(self, deployment: Deployment) -> None:
        """In every worker.

        Raises:
            Unavailable: a worker has no such thread, or it may not be traced.
        """
        for worker in deployment.workers:
            thread = thread_named(deployment.processes[worker].pid, self._name)
            self._stopped.append(thread)
            _stop(thread)

    async def go_on(self, deployment: Deployment) -> None:
        """Where they were."""
        del deployment
        stopped, self._stopped = self._stopped, []
        for thread in stopped:
            _ptrace(DETACH, thread)


def thread_named(pid: int, name: str) -> int:
    """The id of a process's thread.

    Raises:
        Unavailable: it has none of this name.
    """
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().strip() == name:
            return int(task.name)
    raise Unavailable(f"process {pid} has no thread {name!r}", reason="no_thread")


def _stop(thread: int) -> None:
    _ptrace(SEIZE, thread)
    _ptrace(INTERRUPT, thread)
    os.waitpid(thread, WAIT_ALL)


def _ptrace(request: int, thread: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(ctypes.c_long(request), ctypes.c_long(thread), ctypes.c_void_p(0), ctypes.c_void_p(0)):
        error = os.strerror(ctypes.get_errno())
        raise Unavailable(f"a thread of a worker can't be stopped: ptrace: {error}", reason="ptrace")


def thread_faults() -> tuple[Fault, ...]:
    """Each with threads of its own."""
    movers = StoppedThreads(MOVER)
    return (Fault("mover threads stopped", PROCESS, movers.stop, movers.go_on),)
