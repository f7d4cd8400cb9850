from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from kvservice.client import LocalService
from kvservice.errors import Unavailable


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a script stand in for `python -m kvservice`."""

    def make(body: str) -> None:
        script = tmp_path / "python"
        script.write_text(f"#!{sys.executable}\nimport os, signal, sys, time\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return make


READY = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("loading", flush=True)
print(" ".join(sys.argv[1:]), file=sys.stderr, flush=True)
print("ready: 127.0.0.1:4711", flush=True)
signal.pause()
"""


async def test_the_address_is_known_once_it_is_ready_and_it_ends_with_the_block(command) -> None:
    command(READY)
    async with LocalService(["--recipe", "dense"]) as service:
        assert service.address == "127.0.0.1:4711"
        pid = service.pid
        os.kill(pid, 0)
    assert service.last_lines == ["-m kvservice serve --recipe dense --port 0"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert await service.stop() == 0


async def test_a_service_that_fails_to_start_shows_the_end_of_its_stderr(command) -> None:
    command("print('port 1 is busy', file=sys.stderr); sys.exit(2)")
    with pytest.raises(Unavailable, match=r"exit code 2; the end of its stderr:\nport 1 is busy"):
        await LocalService().start()


async def test_a_service_that_is_not_ready_in_time_is_stopped(command) -> None:
    command("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('x', flush=True); signal.pause()")
    service = LocalService(start_timeout_s=0.3)
    with pytest.raises(Unavailable, match=r"wasn't ready within 0.3 s"):
        await service.start()
    with pytest.raises(ProcessLookupError):
        os.kill(service.pid, 0)


async def test_a_service_that_ignores_sigterm_is_killed(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvservice.client.local.STOP_TIMEOUT_S", 0.2)
    command(READY.replace("lambda *_: sys.exit(0)", "signal.SIG_IGN"))
    async with LocalService() as service:
        pass
    assert await service.stop() == -signal.SIGKILL
