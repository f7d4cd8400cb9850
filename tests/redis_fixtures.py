"""Real redis-server processes for tests: one of each role, started when first asked for, emptied before each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from kvservice.store.embedded import EmbeddedRedis, RedisRole

KV_TEST_BYTES = 256 << 20


@pytest.fixture(scope="session")
def state_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(RedisRole.STATE, data_dir=tmp_path_factory.mktemp("state")) as server:
        yield server


@pytest.fixture(scope="session")
def kv_server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(RedisRole.KV, maxmemory_bytes=KV_TEST_BYTES) as server:
        yield server


@pytest.fixture
def state_url(state_server: EmbeddedRedis) -> str:
    """URL of an empty Redis with the settings of the `state` role."""
    return emptied(state_server)


@pytest.fixture
def kv_url(kv_server: EmbeddedRedis) -> str:
    """URL of an empty Redis with the settings of the `kv` role."""
    return emptied(kv_server)


def emptied(server: EmbeddedRedis) -> str:
    with Redis.from_url(server.url) as client:
        client.flushall()
        client.config_resetstat()
    return server.url
