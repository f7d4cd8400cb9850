"""The gateway's image, built as `k8s/images/build.sh` builds it, and run: it lacks torch and ray, and serves.

Needs root, buildah and debootstrap, which CI installs, and Python 3.11, which the image has; a base and wheels are
kept below `build/` from run to run.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kvservice.client import Client
from kvservice.models.tiny import write_tiny_checkpoint
from kvservice.store.embedded import EmbeddedRedis, RedisRole
from tests.deploy.chart import CHART, ROOT

CACHE = ROOT / "build" / "images"
KEY = "a key of the operator"
BUILD_S = 900.0
READY_S = 120.0
PYTHON = sys.executable if sys.version_info[:2] == (3, 11) else shutil.which("python3.11")
"""Fetches the image's wheels."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        os.geteuid() != 0 or not (PYTHON and shutil.which("buildah") and shutil.which("debootstrap")),
        reason="needs root, Python 3.11, buildah and debootstrap: apt-get install buildah debootstrap",
    ),
]


def buildah(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BUILDAH, *arguments], capture_output=True, text=True, check=False, timeout=BUILD_S, **options
    )


BUILDAH = ["buildah", "--storage-driver", "vfs", "--root", str(CACHE / "storage"), "--runroot", str(CACHE / "run")]
"""As build.sh calls it."""


@pytest.fixture(scope="module")
def container() -> Iterator[str]:
    """A container of the image, built now."""
    built = subprocess.run(
        [str(ROOT / "k8s" / "images" / "build.sh"), "gateway"],
        capture_output=True,
        text=True,
        check=False,
        timeout=BUILD_S,
        env={**os.environ, "PYTHON": PYTHON or "", "KVSERVICE_IMAGE_CACHE": str(CACHE)},
    )
    assert built.returncode == 0, built.stderr[-4000:]
    made = buildah("from", "--pull-never", built.stdout.splitlines()[-1])
    assert made.returncode == 0, made.stderr
    name = made.stdout.strip()
    yield name
    buildah("rm", name)


def inside(container: str, *command: str, mount: Path | None = None, **environment: str) -> list[str]:
    """The command line that runs something in the container, on this machine's network."""
    volumes = ["--volume", f"{mount}:/etc/kvservice:ro"] if mount is not None else []
    variables = [argument for name, value in environment.items() for argument in ("--env", f"{name}={value}")]
    return [*BUILDAH, "run", "--isolation", "chroot", *volumes, *variables, container, "--", *command]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=READY_S)


def test_it_has_neither_torch_nor_ray_and_runs_as_nobody_special(container: str) -> None:
    asked = run(
        inside(
            container,
            *("python", "-c"),
            "import importlib.util as u, os; print(os.getuid(), [n for n in "
            "('torch', 'ray', 'transformers', 'triton') if u.find_spec(n)])",
        )
    )
    assert asked.stdout.strip() == "10001 []", asked.stderr


def test_its_commands_need_nothing_more(container: str) -> None:
    for command in (("--help",), ("gateway", "--help"), ("chat", "--help"), ("config", "schema"), ("stats", "--help")):
        asked = run(inside(container, "kvservice", *command))
        assert asked.returncode == 0, asked.stderr


def test_it_answers_health_and_a_generation_by_a_worker_outside(container: str, tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "tiny")
    with ExitStack() as stack:
        state = stack.enter_context(EmbeddedRedis(RedisRole.STATE, data_dir=tmp_path / "state"))
        mount = tmp_path / "etc"
        (mount / "test").mkdir(parents=True)
        shutil.copy(CHART / "files" / "check.py", mount / "test")
        key = {"sha256": hashlib.sha256(KEY.encode()).hexdigest(), "tenant": "platform", "role": "operator"}
        (mount / "api-keys.json").write_text(json.dumps({"keys": [key]}))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config = {"gateway": {"port": port, "health_port": 0}, "api_keys": "/etc/kvservice/api-keys.json"}
        (mount / "config.json").write_text(json.dumps(config))
        worker = [sys.executable, "-m", "kvservice", "worker", "--model", str(model), "--dtype", "fp32"]
        stack.enter_context(ready([*worker, "--kv-bytes", "16MiB", "--state-url", state.url], tmp_path / "worker.log"))
        gateway = inside(
            container,
            *("kvservice", "gateway", "--config", "/etc/kvservice/config.json"),
            mount=mount,
            KVSERVICE_SECRET="s" * 32,
            KVSERVICE_STATE_URL=state.url,
        )
        stack.enter_context(ready(gateway, tmp_path / "gateway.log"))
        address = f"127.0.0.1:{port}"
        asyncio.run(wait_for_models(address))
        checked = run(
            inside(container, "python", "/etc/kvservice/test/check.py", address, mount=mount, KVSERVICE_API_KEY=KEY)
        )
        assert (checked.returncode, checked.stdout) == (0, "tiny: 8 tokens\n"), checked.stderr


@contextmanager
def ready(command: list[str], log: Path) -> Iterator[None]:
    """A process that has said that it is ready; ended with SIGTERM, by its whole group."""
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready: "), log.read_text()
        yield
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)
        process.stdout.close()


async def wait_for_models(address: str) -> None:
    deadline = time.monotonic() + READY_S
    async with Client(address, KEY) as client:
        while not await client.list_models():
            assert time.monotonic() < deadline, "no worker was found"
            await asyncio.sleep(0.2)
