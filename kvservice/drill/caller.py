"""One call on a service, as a process of its own that may be killed or frozen: `caller ADDRESS CALL SESSION REQUEST`.

The key comes by standard input, and the call begins with it. Says on standard output when it is ready. What the call
gives is of no interest here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys

from kvservice.client import Client
from kvservice.drill.calls import CALL_S, READY, Call, carry_out


class CallerProcess:
    """Starts one, and does to it what befalls clients."""

    def __init__(self, address: str, key: str, call: Call, session: str, request_id: str) -> None:
        self._arguments = (address, call.value, session, request_id)
        self._key = key
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Waits until it is ready to call."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "kvservice.drill.caller"),
            *self._arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert self._process.stdout is not None
        await self._process.stdout.readline()

    def call(self) -> None:
        """Has it call."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._key}\n".encode())

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing if it has ended."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    async def ended(self) -> None:
        """Waits until its call is through, however that ends, or has taken too long."""
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CALL_S):
                    await self._process.wait()

    async def end(self) -> None:
        """Kills it, if it still runs."""
        self.send_signal(signal.SIGKILL)
        if self._process is not None:
            await self._process.communicate()


async def _main() -> None:
    address, call, session, request_id = sys.argv[1:]
    os.write(sys.stdout.fileno(), READY)
    key = (await asyncio.to_thread(sys.stdin.readline)).strip()
    async with Client(address, key) as client:
        await carry_out(client, Call(call), session, request_id)


if __name__ == "__main__":
    asyncio.run(_main())
