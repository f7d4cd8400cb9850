"""The Redis store's own ways: durability, damage, faults, leftovers."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time

import pytest
from redis import Redis

from kvservice.errors import ConfigError, InternalError, Unavailable
from kvservice.store import open_state_store
from kvservice.store.base import SessionRecord
from kvservice.store.embedded import EmbeddedRedis, RedisRole
from kvservice.store.memory import MemoryStateStore
from kvservice.store.redis import RedisStateStore, split_replicas
from kvservice.types import OnMiss, PromptFormat, SessionId, TenantId

TENANT = TenantId("ann")
PATIENCE_S = 20.0


def record(session_id: str) -> SessionRecord:
    now = time.time()
    return SessionRecord(
        session_id=SessionId(session_id),
        tenant=TENANT,
        model="m",
        recipe="recall",
        prompt_format=PromptFormat.RAW,
        on_miss=OnMiss.RECOMPUTE,
        ttl_s=100,
        created_at=now,
        expires_at=now + 100,
        token_ids=(1, 2, 3),
    )


@pytest.fixture
async def store(state_url):
    opened = await open_state_store(state_url)
    yield opened
    await opened.aclose()


@pytest.fixture
def server(state_url):
    with Redis.from_url(state_url, decode_responses=False) as client:
        yield client


async def reason_of(store: RedisStateStore) -> str:
    try:
        with pytest.raises(Unavailable) as caught:
            await store.create_session(record("s"))
        return caught.value.reason
    finally:
        await store.aclose()


async def test_no_url_is_the_store_in_memory():
    opened = await open_state_store(None)
    assert isinstance(opened, MemoryStateStore)
    assert not opened.durable


async def test_tokens_are_durable_on_a_server_that_fsyncs_always(store):
    assert store.durable
    assert (await store.create_session(record("s"))).durable_tokens == 3
    assert (await store.get_session(SessionId("s"))).durable_tokens == 3


@pytest.mark.parametrize(
    ("setting", "value", "back"),
    [("appendfsync", "everysec", "always"), ("no-appendfsync-on-rewrite", "yes", "no"), ("appendonly", "no", "yes")],
)
async def test_tokens_stop_being_durable_when_the_server_stops_to_fsync(store, server, setting, value, back):
    kept = await store.create_session(record("s"))
    server.config_set(setting, value)
    try:
        assert (await store.update_session(kept)).durable_tokens == 0
        assert not store.durable
    finally:
        server.config_set(setting, back)
    assert (await store.get_session(SessionId("s"))).durable_tokens == 3


async def test_server_of_the_other_role_is_not_durable(kv_url):
    opened = RedisStateStore(kv_url)
    assert (await opened.create_session(record("s"))).durable_tokens == 0
    await opened.aclose()


async def test_server_that_will_not_tell_its_settings_is_not_durable(state_url, server):
    server.acl_setuser("guest", enabled=True, nopass=True, keys=["*"], categories=["+@all"], commands=["-config"])
    try:
        opened = await open_state_store(f"redis://guest:x@{state_url.split('@')[1]}")
        assert (await opened.create_session(record("s"))).durable_tokens == 0
        await opened.aclose()
    finally:
        server.acl_deluser("guest")


async def test_durable_session_survives_a_killed_server(tmp_path):
    with EmbeddedRedis(RedisRole.STATE, data_dir=tmp_path) as first:
        before = await open_state_store(first.url)
        kept = await before.create_session(record("s"))
        os.kill(first.pid, signal.SIGKILL)
        await before.aclose()
    assert kept.durable_tokens == 3
    with EmbeddedRedis(RedisRole.STATE, data_dir=tmp_path) as second:
        after = await open_state_store(second.url)
        assert await after.get_session(SessionId("s")) == kept
        await after.aclose()


async def test_store_recovers_by_itself_when_its_server_comes_back(tmp_path):
    server = EmbeddedRedis(RedisRole.STATE, data_dir=tmp_path)
    opened = await open_state_store(server.start())
    try:
        kept = await opened.create_session(record("s"))
        server.stop()
        with pytest.raises(Unavailable) as caught:
            await opened.get_session(SessionId("s"))
        assert caught.value.reason == "state_connection"
        server.start()
        assert await opened.get_session(SessionId("s")) == kept
    finally:
        await opened.aclose()
        server.stop()


@pytest.mark.parametrize(
    "damage",
    [{"tokens": b"\x01\x02\x03"}, {"num_tokens": 2}, {"format": 9}, {"on_miss": "perhaps"}, {"expires_at": "soon"}],
)
async def test_damaged_record_is_an_error_and_hides_no_other(store, server, damage):
    await store.create_session(record("a"))
    whole = await store.create_session(record("b"))
    server.hset("kvs:{session:a}:record", mapping=damage)
    with pytest.raises(InternalError, match="record of session 'a' is illegible"):
        await store.get_session(SessionId("a"))
    assert await store.list_sessions(TENANT, after="", limit=10) == [whole]
    assert await store.expired_sessions(time.time() + 1000, 10) == [whole]
    assert await store.delete_session(SessionId("a"))


async def test_record_lacking_a_field_is_an_error(store, server):
    await store.create_session(record("a"))
    server.hdel("kvs:{session:a}:record", "tokens")
    with pytest.raises(InternalError, match="illegible"):
        await store.get_session(SessionId("a"))


async def test_names_without_a_record_are_cleared_away(store, server):
    await store.create_session(record("a"))
    server.delete("kvs:{session:a}:record")
    assert await store.list_sessions(TENANT, after="", limit=10) == []
    assert await store.expired_sessions(time.time() + 1000, 10) == []
    assert server.keys("kvs:*") == []


async def test_deleted_session_leaves_no_key(store, server):
    await store.create_session(record("a"))
    await store.delete_session(SessionId("a"))
    assert server.keys("*") == []


async def test_record_that_nobody_sweeps_goes_in_the_end(store, server):
    await store.create_session(record("a"))
    assert 0 < server.ttl("kvs:{session:a}:record") <= 100 + 86_400


async def test_id_with_awkward_characters_stays_in_its_own_keys(store, server):
    await store.create_session(record("a"))
    assert await store.get_session(SessionId("a}:lock")) is None
    assert await store.lock_session(SessionId("a}:record"), "x", 10)
    assert await store.get_session(SessionId("a")) is not None


async def test_refused_connection_is_said_at_the_start(unused_tcp_port):
    with pytest.raises(Unavailable, match=f"127.0.0.1:{unused_tcp_port} can't be reached"):
        await open_state_store(f"redis://127.0.0.1:{unused_tcp_port}")


async def test_wrong_password_is_an_error_of_the_settings(state_url):
    with pytest.raises(ConfigError, match="refused the password"):
        await open_state_store(f"redis://:wrong@{state_url.split('@')[1]}")


@pytest.mark.parametrize("url", ["http://127.0.0.1", "127.0.0.1:6379", "redis://127.0.0.1:port"])
async def test_malformed_url_is_an_error_of_the_settings(url):
    with pytest.raises(ConfigError, match="Redis URL"):
        await open_state_store(url)


async def test_server_that_never_answers_costs_one_time_limit():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = RedisStateStore(f"redis://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.05)
        async with asyncio.timeout(5):
            assert await reason_of(store) == "state_timeout"


async def test_full_server_is_named(state_url, server):
    server.config_set("maxmemory", 1)
    try:
        assert await reason_of(RedisStateStore(state_url)) == "state_oom"
    finally:
        server.config_set("maxmemory", 0)


async def test_replica_is_named(state_url, server, unused_tcp_port):
    server.replicaof("127.0.0.1", unused_tcp_port)
    try:
        assert await reason_of(RedisStateStore(state_url)) == "state_readonly"
    finally:
        server.replicaof("NO", "ONE")


async def test_with_replicas_a_record_is_durable_once_they_have_it(state_url):
    login, _, address = state_url.partition("@")
    with EmbeddedRedis(RedisRole.STATE) as replica, Redis.from_url(replica.url) as client:
        opened = RedisStateStore(f"{state_url}?wait_replicas=1")
        try:
            assert (await opened.create_session(record("before"))).durable_tokens == 0
            client.config_set("masterauth", login.rpartition(":")[2])
            client.replicaof(*address.partition("/")[0].split(":"))
            async with asyncio.timeout(PATIENCE_S):
                while (await opened.get_session(SessionId("before"))).durable_tokens == 0:
                    await asyncio.sleep(0.05)
            assert (await opened.create_session(record("after"))).durable_tokens == 3
            assert client.exists("kvs:{session:after}:record")
            client.replicaof("NO", "ONE")
            kept = await opened.get_session(SessionId("after"))
            assert (await opened.update_session(kept)).durable_tokens == 0
            assert not opened.durable
        finally:
            await opened.aclose()


@pytest.mark.parametrize("option", ["wait_replicas=x", "wait_replicas=1&wait_replicas=2", "wait_replicas="])
def test_number_of_replicas_that_is_none_is_refused(option):
    with pytest.raises(ConfigError, match="give a number"):
        RedisStateStore(f"redis://h:1/0?{option}")


def test_number_of_replicas_is_no_option_of_the_library():
    assert split_replicas("redis://h:1/0?db=2&wait_replicas=3") == ("redis://h:1/0?db=2", 3)
    assert split_replicas("redis://h:1/0?wait_replicas=1") == ("redis://h:1/0", 1)
    assert split_replicas("redis://h:1/0?db=2") == ("redis://h:1/0?db=2", 0)
