"""The rendered settings of Redis, given to real servers: they start, and the service finds them fit for their roles."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from kvservice.store.blobs import RedisBlobs
from kvservice.store.embedded import find_redis_server
from kvservice.store.redis import RedisStateStore
from tests.deploy.chart import only

PASSWORD = "a-password-of-letters"


@contextmanager
def server(role: str, folder: Path) -> Iterator[str]:
    """A server started as the chart's pod starts it, but for its folder and port."""
    settings = only("cpu-trial", "ConfigMap", f"kv-kvservice-{role}")["data"]["redis.conf"]
    assert "dir /data" in settings
    assert "port 6379" in settings
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    conf = folder / "redis.conf"
    conf.write_text(settings.replace("dir /data", f"dir {folder}").replace("port 6379", f"port {port}"))
    command = [str(find_redis_server()), str(conf), "--requirepass", PASSWORD, "--bind", "127.0.0.1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        patience = Retry(ConstantBackoff(0.05), 100)
        with redis.Redis(port=port, password=PASSWORD, retry=patience) as client:
            assert client.ping()
        yield f"redis://:{PASSWORD}@127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(10)


async def test_state_is_durable(tmp_path: Path) -> None:
    with server("state", tmp_path) as url:
        store = RedisStateStore(url)
        await store.check()
        assert store.durable
        await store.aclose()


async def test_kv_is_fit_for_its_role(tmp_path: Path) -> None:
    with server("kv", tmp_path) as url:
        blobs = RedisBlobs(url)
        assert await blobs.check() == []
        await blobs.aclose()


@pytest.mark.parametrize("role", ["state", "gcs"])
def test_what_must_stay_is_never_evicted(role: str, tmp_path: Path) -> None:
    with server(role, tmp_path) as url:
        client = redis.Redis.from_url(url)
        found = {**client.config_get("maxmemory-policy"), **client.config_get("appendonly")}
        assert found == {"maxmemory-policy": "noeviction", "appendonly": "yes"}
        client.close()
