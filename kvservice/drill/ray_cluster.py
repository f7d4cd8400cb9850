"""A Ray cluster of two nodes on this machine whose head may be killed, and started again. Knows nothing of the service.

    head: gcs, Serve's controller, no worker ──► Redis: what a head must know after a restart
    node: the replicas

As the chart has it: the head runs no worker, and what it knows is in a Redis of its own. Ray itself is run by its
commands; nothing here imports it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kvservice.drill.servers import DrillServer, free_port
from kvservice.errors import Unavailable

GCS_SETTINGS = ("appendonly no",)
START_S = 120.0
POLL_S = 0.1
LAST_LINES_BYTES = 2000
OBJECT_STORE_BYTES = 80_000_000
"""Nothing of ours is kept there; Ray wants this much."""
NODE_CPUS = 8
READY = b"ready: "
REPLICA = b"ray::ServeReplica"
"""What Ray calls a replica's process."""


class DrillRay:
    """Use: `start`, `deploy`, then `kill_head` and `start_head` as often as wanted, `aclose` in the end.

    Args:
        folder: of settings, logs and the gcs's Redis.
        environment: variables of all of Ray's processes, replicas among them.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        # Ray listens for this machine's other addresses too.
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        # As on Kubernetes: nodes wait so long for a head, before they end with all that they run.
        patience = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        self._environment = {**environment, **token, **patience}
        self._gcs = DrillServer("gcs", folder / "gcs", GCS_SETTINGS)
        self._port = free_port()
        # The names of sockets in it are long, and may not be longer than a hundred bytes.
        self._sockets = tempfile.mkdtemp(prefix="kvs-")
        self._head: asyncio.subprocess.Process | None = None
        self._node: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        """Of the head."""
        return f"127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Head and node.

        Raises:
            Unavailable: one of them doesn't start.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        await self._gcs.start()
        await self.start_head()
        self._node = await self._run("node", "--address", self.address, f"--num-cpus={NODE_CPUS}")

    async def start_head(self) -> None:
        """Starts the head, and waits until it takes connections.

        Raises:
            Unavailable: it doesn't.
        """
        # By this a head knows that another one runs, though it doesn't any more.
        (Path(self._sockets) / "ray_current_cluster").unlink(missing_ok=True)
        self._head = await self._run(
            "head",
            *("--head", f"--port={self._port}", "--num-cpus=0", "--include-dashboard=false"),
            *(f"--ray-client-server-port={free_port()}", f"--redis-password={self._gcs.password}"),
        )
        async with asyncio.timeout(START_S):
            while not _listens(self._port):
                if self._head.returncode is not None:
                    raise Unavailable(f"Ray's head ended: {self._last_words('head')}", reason="ray_start")
                await asyncio.sleep(POLL_S)

    def kill_head(self) -> None:
        """All processes of the head at once: gcs, raylet, Serve's controller."""
        if self._head is not None:
            _kill(self._head.pid)

    def kill_replica(self) -> None:
        """One worker.

        Raises:
            Unavailable: there is none.
        """
        assert self._node is not None
        for pid in descendants(self._node.pid):
            if (Path("/proc") / str(pid) / "cmdline").read_bytes().startswith(REPLICA):
                os.kill(pid, signal.SIGKILL)
                return
        raise Unavailable("Ray's node runs no replica", reason="ray")

    async def deploy(self, settings: Path) -> None:
        """Deploys the workers of a settings file, and leaves them there without the process that did it.

        Raises:
            Unavailable: they don't start.
        """
        words = ("-m", "kvservice", "ray", "--config", str(settings))
        process = await self._spawn("deploy", words, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_S):
                async for line in process.stdout:
                    if line.startswith(READY):
                        return
        except TimeoutError:
            raise Unavailable(f"not deployed in {START_S:g} s", reason="ray_start") from None
        finally:
            # Stopped, it would take the workers down.
            _kill(process.pid)
            await process.wait()
        raise Unavailable(f"not deployed: {self._last_words('deploy')}", reason="ray_start")

    async def aclose(self) -> None:
        """Ends all of it."""
        for process in (self._node, self._head):
            if process is not None:
                _kill(process.pid)
                await process.wait()
        self._gcs.kill()
        shutil.rmtree(self._sockets, ignore_errors=True)

    async def _run(self, name: str, *arguments: str) -> asyncio.subprocess.Process:
        words = (
            *("-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            *(f"--temp-dir={self._sockets}", "--node-ip-address=127.0.0.1"),
            # Two nodes share this machine's ports.
            *("--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={OBJECT_STORE_BYTES}"),
            *arguments,
        )
        return await self._spawn(name, words)

    async def _spawn(self, name: str, words: Sequence[str], stdout: int | None = None) -> asyncio.subprocess.Process:
        with (self._folder / f"ray-{name}.log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log if stdout is None else stdout,
                stderr=log,
                env={**os.environ, **self._environment, "RAY_REDIS_ADDRESS": f"127.0.0.1:{self._gcs.port}"},
                start_new_session=True,
            )

    def _last_words(self, name: str) -> str:
        return (self._folder / f"ray-{name}.log").read_text(errors="replace")[-LAST_LINES_BYTES:]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def descendants(pid: int) -> Iterator[int]:
    """A process and all that it started, and they (/proc: Linux)."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                # The name, in parentheses, may have anything in it.
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for each in found:
        yield each
        found += children.get(each, [])


def _kill(pid: int) -> None:
    """A process and all that it started."""
    for each in list(descendants(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
