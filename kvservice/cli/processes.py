"""Worker processes of `serve --workers N`: started, watched, stopped. Knows nothing of what a worker does.

A child reads its settings from a file of mode 0600, so that no secret is on a command line, and ends when its standard
input does, so that it never outlives a parent that was killed.
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
from collections.abc import Callable, Sequence
from pathlib import Path

from kvservice.cli.settings import Settings

logger = logging.getLogger(__name__)


class WorkerProcesses:
    """The worker processes of one service. None is started again: one that ends by itself is reported.

    Args:
        settings: the settings of each process, secrets included.
        on_death: called with a process's name and exit code when it ends without having been told to.
    """

    def __init__(self, settings: Sequence[Settings], on_death: Callable[[str, int], None]) -> None:
        self._settings = settings
        self._on_death = on_death
        self._folder = tempfile.TemporaryDirectory(prefix="kvservice-workers-")
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._watches: list[asyncio.Task[None]] = []
        self._stopping = False

    async def start(self) -> None:
        """Starts all of them; they load their models at the same time. Returns before they are ready."""
        for index, settings in enumerate(self._settings):
            name = f"worker-{index}"
            path = Path(self._folder.name) / f"{name}.json"
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump(settings, file)
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "kvservice", "worker", "--config", str(path), "--stop-with-stdin"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                # Ctrl-C in a terminal must reach the parent alone, which then drains them in order.
                start_new_session=True,
            )
            self._children[name] = child
            self._watches.append(asyncio.create_task(self._watch(name, child), name=f"watch-{name}"))

    async def stop(self, grace_s: float) -> None:
        """Asks all to drain, and kills those that haven't ended after `grace_s`."""
        self._stopping = True
        for child in self._children.values():
            if child.returncode is None:
                child.send_signal(signal.SIGTERM)
        if self._watches:
            _, late = await asyncio.wait(self._watches, timeout=grace_s)
            if late:
                self.kill()
                await asyncio.wait(late)
        self._folder.cleanup()

    def kill(self) -> None:
        """Ends all of them at once."""
        self._stopping = True
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                child.kill()

    async def _watch(self, name: str, child: asyncio.subprocess.Process) -> None:
        code = await child.wait()
        if not self._stopping:
            logger.error("worker_died", extra={"process": name, "pid": child.pid, "exit_code": code})
            self._on_death(name, code)
