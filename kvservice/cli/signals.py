"""How a running service is told to end. Knows nothing of what ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable


class StopSignals:
    """SIGTERM and SIGINT of this process: the first asks for a drain, the second for an end at once.

    Args:
        on_second: called at the second signal, in the event loop.
    """

    def __init__(self, on_second: Callable[[], None]) -> None:
        self._on_second = on_second
        self._first = asyncio.Event()

    def install(self) -> None:
        """Begins to listen. Call it in the running event loop, before anything that takes long."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)

    def follow_stdin(self) -> None:
        """Takes the end of standard input for a signal: it ends when the parent does."""
        loop = asyncio.get_running_loop()

        def follow() -> None:
            while os.read(sys.stdin.fileno(), 4096):
                pass
            # The loop may have ended before the input.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self.stop)

        # In a thread, since a loop can't watch every kind of file. It ends with the process.
        threading.Thread(target=follow, name="stdin", daemon=True).start()

    def stop(self) -> None:
        """What a signal does."""
        if self._first.is_set():
            self._on_second()
        self._first.set()

    async def wait(self) -> None:
        """Returns at the first signal."""
        await self._first.wait()
