"""Worker processes of `serve --workers N`: started, watched, stopped. Knows nothing of what a worker does.

A child reads its settings from a file of mode 0600, so that no secret is on a command line, and drains when its
standard input ends, so that it doesn't outlive a parent that was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kvservice.cli.settings import Settings

logger = logging.getLogger(__name__)

STOP_MARGIN_S = 10.0
"""What a worker may take beyond its grace before it is killed."""


class WorkerProcesses:
    """The worker processes of one service. None is started again: one that ends by itself is reported.

    Args:
        settings: of each process, secrets included.
        grace_s: how long running calls may go on when a worker is stopped.
        command: of `kvservice`, that a process runs.
        num_workers: of all processes together; None: one in each.
    """

    def __init__(
        self, settings: Sequence[Settings], grace_s: float, *, command: str = "worker", num_workers: int | None = None
    ) -> None:
        self.num_workers = len(settings) if num_workers is None else num_workers
        self._command = command
        self._settings = settings
        self._grace_s = grace_s
        self._folder = tempfile.TemporaryDirectory(prefix="kvservice-workers-")
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._watches: list[asyncio.Task[None]] = []
        self._stopping = False
        self._codes: list[int] = []
        self._one_ended = asyncio.Condition()

    async def start(self) -> None:
        """Starts all of them; they load their models at the same time. Returns before they are ready."""
        for index, settings in enumerate(self._settings):
            name = f"worker-{index}"
            path = Path(self._folder.name) / f"{name}.json"
            _write_private(path, settings)
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "kvservice", self._command, "--config", str(path), "--stop-with-stdin"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                # Ctrl-C in a terminal must reach the parent alone, which then drains them in order.
                start_new_session=True,
            )
            self._children[name] = child
            self._watches.append(asyncio.create_task(self._watch(name, child), name=f"watch-{name}"))

    async def ended(self, num_workers: int) -> int:
        """Waits until the processes of that many have ended by themselves. The first exit code that isn't 0, else 0."""
        async with self._one_ended:
            await self._one_ended.wait_for(lambda: len(self._codes) >= min(num_workers, len(self._settings)))
        return next((code for code in self._codes if code), 0)

    async def stop(self) -> None:
        """Asks all to drain, and kills those that take too long, or all when it is cancelled."""
        self._stopping = True
        try:
            self._signal(signal.SIGTERM)
            if self._watches:
                await asyncio.wait(self._watches, timeout=self._grace_s + STOP_MARGIN_S)
        finally:
            self._signal(signal.SIGKILL)
            await asyncio.gather(*self._watches)
            self._folder.cleanup()

    def _signal(self, number: signal.Signals) -> None:
        for child in self._children.values():
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(number)

    async def _watch(self, name: str, child: asyncio.subprocess.Process) -> None:
        code = await child.wait()
        if self._stopping:
            return
        level = logging.ERROR if code else logging.INFO
        logger.log(level, "worker_ended", extra={"worker": name, "pid": child.pid, "exit_code": code})
        async with self._one_ended:
            self._codes.append(code)
            self._one_ended.notify_all()


def _write_private(path: Path, settings: Settings) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(settings, file)
