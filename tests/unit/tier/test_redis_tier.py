"""The Redis tier's own ways: its index, its faults, its time limits."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest
from redis import Redis

from kvservice.errors import ConfigError, Unavailable
from kvservice.tier.base import open_tier
from kvservice.tier.header import FrameRole, chunk_hash, frame_key
from kvservice.tier.redis import RedisTier, redacted
from kvservice.types import SessionId

TAG = bytes(range(16))
SESSION = SessionId("s")


def key(number: int) -> bytes:
    return frame_key(TAG, SESSION, bytes(32), 0, FrameRole.KV, chunk_hash(TAG, b"", [number]))


async def reason_of(tier: RedisTier) -> str:
    try:
        with pytest.raises(Unavailable) as caught:
            await tier.put_many([(key(1), b"x" * 100)], 60)
        return caught.value.reason
    finally:
        await tier.aclose()


async def test_every_key_it_writes_has_a_time_to_live(kv_url):
    tier = RedisTier(kv_url)
    await tier.put_many([(key(1), b"x")], 60)
    await tier.aclose()
    with Redis.from_url(kv_url) as client:
        assert len(client.keys()) == 2
        assert all(0 < client.pttl(name) <= 60_000 for name in client.scan_iter())


async def test_frames_whose_index_was_lost_are_deleted_all_the_same(kv_url):
    tier = RedisTier(kv_url)
    await tier.put_many([(key(i), b"x") for i in range(3)], 60)
    with Redis.from_url(kv_url) as client:
        client.delete(*client.keys("kv1i:*"))
        assert await tier.delete_session(TAG, SESSION) == 3
        assert client.dbsize() == 0
    await tier.aclose()


async def test_frames_missing_from_the_index_after_an_eviction_are_deleted_all_the_same(kv_url):
    async with contextlib.aclosing(RedisTier(kv_url)) as tier:
        await tier.put_many([(key(i), b"x" * 100_000) for i in range(50)], 60)
        with Redis.from_url(kv_url) as client:
            room = client.config_get("maxmemory")["maxmemory"]
            client.config_set("maxmemory", client.info("memory")["used_memory"] - 1_000_000)
            client.config_set("maxmemory", room)
            assert client.info("stats")["evicted_keys"] > 0
            # Whether or not the index was among them, the next put begins a new one.
            for index in client.keys("kv1i:*"):
                client.delete(index)
            await tier.put_many([(key(99), b"x")], 60)
            assert 1 < await tier.delete_session(TAG, SESSION) < 51
            assert client.keys("kv1*") == []


async def test_refused_connection_is_named(unused_tcp_port):
    assert await reason_of(RedisTier(f"redis://127.0.0.1:{unused_tcp_port}")) == "connection"


async def test_wrong_password_is_named(kv_url):
    address = kv_url.split("@")[1]
    assert await reason_of(RedisTier(f"redis://:wrong@{address}")) == "auth"
    assert await reason_of(RedisTier(f"redis://{address}")) == "auth"


async def test_server_that_never_answers_costs_one_time_limit():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tier = RedisTier(f"redis://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.05)
        async with asyncio.timeout(5):
            assert await reason_of(tier) == "timeout"


async def test_full_server_that_may_not_evict_is_named(kv_url):
    with Redis.from_url(kv_url) as client:
        before = client.config_get("maxmemory*")
        client.config_set("maxmemory", 1)
        client.config_set("maxmemory-policy", "noeviction")
        try:
            assert await reason_of(RedisTier(kv_url)) == "oom"
        finally:
            for name in ("maxmemory", "maxmemory-policy"):
                client.config_set(name, before[name])


async def test_replica_is_named(kv_url, unused_tcp_port):
    with Redis.from_url(kv_url) as client:
        client.replicaof("127.0.0.1", unused_tcp_port)
        try:
            assert await reason_of(RedisTier(kv_url)) == "readonly"
        finally:
            client.replicaof("NO", "ONE")


async def test_message_of_a_fault_names_the_server_and_no_password(kv_url):
    secret = "hunter2hunter2"
    tier = RedisTier(f"redis://:{secret}@{kv_url.split('@')[1]}")
    with pytest.raises(Unavailable) as caught:
        await tier.get_many([key(1)])
    await tier.aclose()
    assert secret not in caught.value.message
    assert kv_url.split("@")[1] in caught.value.message


def test_redacted_url_has_neither_user_nor_password_nor_options():
    assert redacted("rediss://me:secret@example.com:6380/2?password=x") == "rediss://example.com:6380/2"


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "127.0.0.1:6379", ""])
def test_url_with_an_unknown_scheme_is_refused_with_those_known(url):
    with pytest.raises(ConfigError, match=r"known are redis, redis[+]cluster, redis[+]sentinel, rediss"):
        open_tier(url)


def test_malformed_url_is_refused():
    with pytest.raises(ConfigError, match="Redis URL"):
        open_tier("redis://127.0.0.1:port/0")


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://127.0.0.1:1",
        "redis+sentinel:///main",
        "redis+sentinel://h:port/main",
        "redis+sentinel://h/main?what=1",
    ],
)
def test_malformed_sentinel_url_is_refused(url):
    with pytest.raises(ConfigError, match="the form is redis"):
        open_tier(url)
