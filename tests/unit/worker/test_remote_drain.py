"""Draining a worker from beside it, as its pod's hook does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from kvservice.config.identity import InternalTlsConfig
from kvservice.worker.remote_drain import drain_at
from tests.unit.cli.conftest import Ran, kvservice
from tests.unit.gateway.certificates import Authority
from tests.unit.worker.conftest import StartWorker

__all__ = ["kvservice"]


async def test_it_returns_once_the_running_call_has_ended_and_the_worker_stopped(start_worker: StartWorker) -> None:
    worker = await start_worker(step_by_step=True)
    gateway = await worker.connect()
    await gateway.generate("one", "ab", max_new_tokens=2)
    admission = asyncio.ensure_future(gateway.admission())
    while not admission.done():
        worker.engine.permits.release()
        await asyncio.sleep(0.001)
    drain = asyncio.create_task(drain_at(worker.server.address, None, None, 30.0))
    reader = asyncio.create_task(gateway.answer("one"))
    while not drain.done():
        worker.engine.permits.release()
        await asyncio.sleep(0.001)
    text, last = await reader
    assert (text, last.WhichOneof("event")) == ("ab", "done")
    assert await drain is True
    await asyncio.wait_for(worker.server.wait_stopped(), 1)


async def test_without_a_worker_there_is_nothing_to_drain() -> None:
    assert await drain_at("127.0.0.1:1", None, None, 1.0) is False


async def test_it_shows_a_certificate_of_the_service(start_worker: StartWorker, tmp_path: Path) -> None:
    authority = Authority(tmp_path)

    def tls(name: str, of: Authority) -> InternalTlsConfig:
        files = of.issue(name, "kvservice-worker")
        return InternalTlsConfig(cert=files.cert, key=files.key, ca=authority.ca)

    worker = await start_worker(tls=tls("worker", authority))
    stranger = Authority(tmp_path, "other")
    assert await drain_at(worker.server.address, tls("stranger", stranger), None, 1.0) is False
    assert await drain_at(worker.server.address, tls("worker", authority), 0.0, 30.0) is True


def test_the_command_needs_to_know_which_worker(kvservice: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVSERVICE_WORKER_HOST", raising=False)
    ran = kvservice("drain-worker")
    assert ran.code == 2
    assert "--address" in ran.flat_err


def test_where_no_worker_answers_the_hook_has_done_its_work(
    kvservice: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = tmp_path / "config.json"
    settings.write_text('{"worker": {"port": 1}, "gateway": {"grace_s": 1}}')
    monkeypatch.setenv("KVSERVICE_CONFIG", str(settings))
    monkeypatch.setenv("KVSERVICE_WORKER_HOST", "127.0.0.1")
    ran = kvservice("drain-worker")
    assert ran.code == 0
    assert "no worker answers at 127.0.0.1:1" in ran.flat_err
