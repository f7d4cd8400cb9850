"""Redis-servers that may be killed, and started again with what they held or without. Knows nothing of the service.

Unlike the servers that the service starts for itself (`store.embedded`), these keep their folder, their port and their
password while they are down, and may be configured in any way.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvservice.errors import KVServiceError, Unavailable
from kvservice.store.embedded import LAUNCHER, find_redis_server
from kvservice.tier.redis import FAULTS, connect

START_TIMEOUT_S = 30.0
POLL_S = 0.02
COMMAND_TIMEOUT_S = 5.0

SENTINEL_NAME = "kv"

STATE_SETTINGS = ("maxmemory-policy noeviction", "appendonly yes", "appendfsync always")
KV_SETTINGS = ("maxmemory 512mb", "maxmemory-policy allkeys-lru", "appendonly no")


class DrillServer:
    """One redis-server on a loopback port.

    Args:
        name: for messages.
        folder: where it keeps its data; made if missing.
        settings: lines of its configuration, beside address, port, password and folder.
        password: unset: one of its own; empty: none.
        port: 0: any free one.
    """

    def __init__(
        self, name: str, folder: Path, settings: Sequence[str], *, password: str | None = None, port: int = 0
    ) -> None:
        self.name = name
        self.port = port or free_port()
        self.password = secrets.token_urlsafe(16) if password is None else password
        self._folder = folder
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process; 0 while there is none."""
        return self._process.pid if self._process is not None else 0

    def url(self, port: int | None = None) -> str:
        """Where it listens, or where a proxy before it does."""
        return f"redis://:{self.password}@127.0.0.1:{port or self.port}/0"

    async def start(self) -> None:
        """Starts it, and waits until it answers and has loaded its data. Nothing if it runs.

        Raises:
            Unavailable: it doesn't.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self._launch()
        give_up = asyncio.get_running_loop().time() + START_TIMEOUT_S
        while not await self._answers():
            if asyncio.get_running_loop().time() > give_up:
                self.kill()
                raise Unavailable(f"redis-server {self.name} doesn't answer", reason="redis_start")
            await asyncio.sleep(POLL_S)

    async def command(self, *words: str | int) -> Any:  # noqa: ANN401 -- as its client's
        """The answer to one command, straight from the server.

        Raises:
            Unavailable: the server refused it, or can't be reached.
        """
        client = connect(self.url(), timeout_s=COMMAND_TIMEOUT_S, max_connections=1)
        try:
            return await client.execute_command(*words)  # type: ignore[no-untyped-call]
        except FAULTS as error:
            raise Unavailable(f"redis-server {self.name}: {words[0]}: {error}", reason="refused") from error
        finally:
            await client.aclose()

    def longest_file(self) -> int:
        """Bytes of the longest of its files: with an AOF, of that."""
        return max(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())

    def kill(self, *, lose_data: bool = False) -> None:
        """Ends it by SIGKILL. With `lose_data` it starts empty."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        if lose_data:
            shutil.rmtree(self._folder, ignore_errors=True)

    def freeze(self) -> None:
        """Stops it in its tracks: connections stay, nothing is answered."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets it go on."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def _launch(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        settings = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"requirepass {self.password}",
            f"masterauth {self.password}",
            f'dir "{self._folder.absolute()}"',
            'save ""',
            *self._settings,
        ]
        # A session of its own: Ctrl-C is for the drill, which stops it then.
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), str(find_redis_server())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        stdin = self._process.stdin
        assert stdin is not None
        with stdin:
            stdin.write("\n".join([*settings, ""]).encode())

    async def _answers(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise Unavailable(f"redis-server {self.name} ended with {self._process.returncode}", reason="redis_start")
        try:
            return bool(await self.command("PING"))
        except KVServiceError:
            return False


class DrillSentinel(DrillServer):
    """A sentinel of one primary, which alone decides that it is down. Given up after half a second of silence.

    Args:
        folder: of its configuration, which it rewrites.
        primary: what it watches, by the name `kv`.
    """

    def __init__(self, folder: Path, primary: DrillServer) -> None:
        super().__init__("sentinel", folder, (), password="")
        self._primary = primary

    def sentinel_url(self) -> str:
        """For a client of the primary, whichever it is."""
        return f"redis+sentinel://:{self._primary.password}@127.0.0.1:{self.port}/{SENTINEL_NAME}"

    async def primary_port(self) -> int:
        """Of the server that is the primary now."""
        found = await self.command("SENTINEL GET-MASTER-ADDR-BY-NAME", SENTINEL_NAME)
        return int(found[1])

    def _launch(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        settings = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"sentinel monitor {SENTINEL_NAME} 127.0.0.1 {self._primary.port} 1",
            f"sentinel auth-pass {SENTINEL_NAME} {self._primary.password}",
            f"sentinel down-after-milliseconds {SENTINEL_NAME} 500",
            f"sentinel failover-timeout {SENTINEL_NAME} 5000",
        ]
        path = self._folder / "sentinel.conf"
        # For the owner's eyes only: it has the primary's password.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write("\n".join([*settings, ""]))
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(find_redis_server()), str(path), "--sentinel"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
