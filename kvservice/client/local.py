"""A whole service as a child process, for demo, bench and tests. Knows the command line, nothing of what it starts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from kvservice.errors import Unavailable

READY = "ready: "
"""What `kvservice serve` prints before its address once it serves."""

STOP_TIMEOUT_S = 40.0
"""`serve` lets running calls end for its grace of 30 s."""

_KEPT_LINES = 40


class LocalService:
    """`kvservice serve` with `arguments`, on a free port unless one is named; the address once it is ready.

    Use as `async with LocalService(["--recipe", "recall"]) as service:`. With another `command` it is that one, which
    must say when it is ready: `gateway` or `worker`. What was stopped or killed may be started again. With another
    `module`, whose arguments come first, that one runs it.
    """

    def __init__(
        self,
        arguments: Sequence[str] = (),
        *,
        command: str = "serve",
        port: int = 0,
        start_timeout_s: float = 300.0,
        module: Sequence[str] = ("kvservice",),
    ) -> None:
        self.address = ""
        self._command = [sys.executable, "-m", *module, command, *arguments, "--port", str(port)]
        self._start_timeout_s = start_timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._ready: asyncio.Future[str] | None = None

    @property
    def pid(self) -> int:
        """The process's id; 0 before it was started."""
        return self._process.pid if self._process is not None else 0

    @property
    def is_running(self) -> bool:
        """Whether it was started and hasn't ended."""
        return self._process is not None and self._process.returncode is None

    @property
    def last_lines(self) -> list[str]:
        """The end of what it wrote to stderr."""
        return list(self._last_lines)

    async def start(self) -> str:
        """Starts it and waits until it serves; gives the address.

        Raises:
            Unavailable: it ended, or took too long; the message has the end of its stderr.
        """
        # A session of its own, so that its own children can be ended with it.
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self._ready = asyncio.get_running_loop().create_future()
        self._readers = [
            asyncio.create_task(self._read_stdout(self._process)),
            asyncio.create_task(self._read_stderr(self._process)),
        ]
        try:
            async with asyncio.timeout(self._start_timeout_s):
                self.address = await self._ready
        except BaseException as error:
            await self.stop()
            if isinstance(error, TimeoutError):
                raise self._failed(f"wasn't ready within {self._start_timeout_s:g} s") from None
            if isinstance(error, EOFError):
                raise self._failed(f"ended with exit code {self._process.returncode}") from None
            raise
        return self.address

    def send_signal(self, number: signal.Signals) -> None:
        """Sends the process a signal: SIGSTOP and SIGCONT, for who wants to see what others make of it."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    async def kill(self) -> None:
        """Ends the process at once, without a chance to clean up."""
        self.send_signal(signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()
            await asyncio.gather(*self._readers)

    async def stop(self) -> int:
        """Has it drain (SIGTERM); kills it when that takes too long. Gives its exit code; may be called again."""
        process = self._process
        if process is None:
            return 0
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        await asyncio.gather(*self._readers)
        return await process.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _read_stdout(self, process: asyncio.subprocess.Process) -> None:
        # Read to the end: a full pipe would stop the service.
        async for line in _opened(process.stdout):
            text = line.decode(errors="replace").strip()
            if text.startswith(READY) and self._ready is not None and not self._ready.done():
                self._ready.set_result(text.removeprefix(READY).strip())
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(EOFError())

    async def _read_stderr(self, process: asyncio.subprocess.Process) -> None:
        async for line in _opened(process.stderr):
            self._last_lines.append(line.decode(errors="replace").rstrip())

    def _failed(self, how: str) -> Unavailable:
        end = "\n".join(self._last_lines) or "(nothing)"
        return Unavailable(f"{' '.join(self._command)} {how}; the end of its stderr:\n{end}")


def _opened(pipe: asyncio.StreamReader | None) -> asyncio.StreamReader:
    if pipe is None:
        raise AssertionError("the process was started with pipes")
    return pipe
