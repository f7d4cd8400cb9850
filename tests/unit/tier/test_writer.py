"""The writer behind the engine: order, room, faults, ends. On a real Redis where one can be made to do it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from redis import Redis

from kvservice.errors import Unavailable
from kvservice.store.embedded import EmbeddedRedis, RedisRole
from kvservice.tier import writer as writer_module
from kvservice.tier.base import TierUsage
from kvservice.tier.header import FrameHeader, FrameRole, chunk_hash
from kvservice.tier.redis import RedisTier
from kvservice.tier.wire import decode_frame
from kvservice.tier.writer import WriteBehind
from kvservice.types import SessionId

TAG = bytes(range(16))
ONE, OTHER = SessionId("one"), SessionId("two")
PAYLOAD = bytes(range(256)) * 400
WAIT_S = 20.0


def header(number: int, session_id: SessionId = ONE) -> FrameHeader:
    return FrameHeader(
        tenant_tag=TAG,
        session_id=session_id,
        fingerprint=bytes(32),
        layer_group=0,
        role=FrameRole.KV,
        chunk_hash=chunk_hash(TAG, b"", [number]),
        start=16 + 64 * number,
        stop=80 + 64 * number,
        shape=(len(PAYLOAD),),
        dtype="uint8",
    )


def until(holds: Callable[[], bool]) -> None:
    give_up = time.monotonic() + WAIT_S
    pause = threading.Event()
    while not holds():
        assert time.monotonic() < give_up, "it didn't happen in time"
        pause.wait(0.005)


class GatedTier:
    """A tier in a dictionary that lets a call through only while its gate is open, and fails as it is told."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.fault: str | None = None
        self.values: dict[bytes, bytes] = {}
        self.log: list[str] = []
        self.closed = False

    async def _pass(self, what: str) -> None:
        while not self.gate.is_set():
            await asyncio.sleep(0.001)
        self.log.append(what)
        if self.fault:
            raise Unavailable("it was told to fail", reason=self.fault)

    async def put_many(self, items, ttl_s) -> None:
        await self._pass(f"put {len(items)}")
        self.values.update((key, bytes(value)) for key, value in items)

    async def get_many(self, keys) -> list[bytes | None]:
        await self._pass("get")
        return [self.values.get(key) for key in keys]

    async def delete_session(self, tenant_tag, session_id) -> int:
        await self._pass(f"delete {session_id}")
        gone = [key for key in self.values if f":{session_id}}}".encode() in key]
        for key in gone:
            del self.values[key]
        return len(gone)

    async def usage(self) -> TierUsage:
        return TierUsage()

    async def aclose(self) -> None:
        self.closed = True


@pytest.fixture
def tier() -> GatedTier:
    return GatedTier()


@pytest.fixture
def writer(tier, monkeypatch) -> Iterator[WriteBehind]:
    monkeypatch.setattr(writer_module, "RETRY_S", 0.0)
    made = WriteBehind(tier, max_pending_bytes=3 * len(PAYLOAD), open_s=0.01)
    made.start()
    yield made
    tier.gate.set()
    made.close(0)


@pytest.fixture
def redis_writer(kv_url) -> Iterator[WriteBehind]:
    made = WriteBehind(RedisTier(kv_url))
    made.start()
    yield made
    made.close(0)


async def read(url: str, frame: FrameHeader) -> bytes | None:
    tier = RedisTier(url)
    (value,) = await tier.get_many([frame.key])
    await tier.aclose()
    if value is None:
        return None
    found, payload = decode_frame(frame.key, value)
    assert found == frame
    return bytes(payload)


async def test_submitted_frames_are_in_redis_and_counted(redis_writer, kv_url):
    assert all(redis_writer.submit(header(i), PAYLOAD) for i in range(30))
    assert redis_writer.submit(header(0, OTHER), PAYLOAD)
    assert redis_writer.flush(WAIT_S)
    for frame in (header(0), header(29), header(0, OTHER)):
        assert await read(kv_url, frame) == PAYLOAD
    stats = redis_writer.stats()
    assert stats.connected
    assert (stats.written_frames, stats.pending_frames, stats.pending_bytes) == (31, 0, 0)
    assert stats.failures == stats.faults == {}
    with Redis.from_url(kv_url) as client:
        lengths = {name: client.strlen(name) for name in client.scan_iter("kv1:*")}
    assert redis_writer.bytes_of(TAG, ONE) == sum(n for name, n in lengths.items() if b":one}" in name)
    assert stats.stored_bytes == stats.written_bytes == sum(lengths.values())


async def test_deleted_session_is_gone_with_what_was_submitted_before(redis_writer, kv_url):
    for i in range(5):
        redis_writer.submit(header(i), PAYLOAD)
    redis_writer.submit(header(0, OTHER), PAYLOAD)
    redis_writer.delete_session(TAG, ONE)
    redis_writer.submit(header(7), PAYLOAD)
    assert redis_writer.flush(WAIT_S)
    assert await read(kv_url, header(0)) is None
    assert await read(kv_url, header(7)) == PAYLOAD
    assert await read(kv_url, header(0, OTHER)) == PAYLOAD
    assert redis_writer.bytes_of(TAG, ONE) == redis_writer.bytes_of(TAG, OTHER)


def test_frame_written_twice_counts_once(redis_writer):
    for _ in range(2):
        redis_writer.submit(header(1), PAYLOAD)
        assert redis_writer.flush(WAIT_S)
    stats = redis_writer.stats()
    assert (stats.written_frames, stats.stored_bytes * 2) == (2, stats.written_bytes)


def test_start_without_a_redis_is_an_error(unused_tcp_port):
    made = WriteBehind(RedisTier(f"redis://127.0.0.1:{unused_tcp_port}"))
    with pytest.raises(Unavailable, match="can't be reached"):
        made.start()
    assert not made.stats().connected
    assert made.submit(header(1), PAYLOAD)
    assert made.stats().failures == {"closed": 1}
    made.close(0)


def test_redis_killed_in_mid_write_is_counted_and_used_again_when_it_is_back():
    server = EmbeddedRedis(RedisRole.KV, maxmemory_bytes=64 << 20)
    ends: list[bool] = []
    try:
        made = WriteBehind(RedisTier(server.start(), timeout_s=2.0), open_s=0.05)
        made.start()
        try:
            for i in range(100):
                assert made.submit(header(i), PAYLOAD, ends.append)
                if i == 50:
                    os.kill(server.pid, signal.SIGKILL)
            assert made.flush(WAIT_S)
            away = made.stats()
            assert not away.connected
            assert away.failures["connection"] > 0
            assert away.written_frames + sum(away.failures.values()) == 100
            assert ends.count(True) == away.written_frames
            assert made.has_room(1 << 40)
            server.stop()
            server.start()
            until(lambda: made.stats().connected)
            assert made.submit(header(200), PAYLOAD, ends.append)
            assert made.flush(WAIT_S)
            assert made.stats().written_frames == away.written_frames + 1
            assert len(ends) == 101
        finally:
            made.close(WAIT_S)
    finally:
        server.stop()


def test_full_redis_that_may_not_evict_is_counted_by_name(redis_writer, kv_url):
    with Redis.from_url(kv_url) as client:
        before = client.config_get("maxmemory*")
        client.config_set("maxmemory", 1)
        client.config_set("maxmemory-policy", "noeviction")
        try:
            redis_writer.submit(header(1), PAYLOAD)
            assert redis_writer.flush(WAIT_S)
        finally:
            for name in ("maxmemory", "maxmemory-policy"):
                client.config_set(name, before[name])
    assert redis_writer.stats().failures == {"oom": 1}
    assert redis_writer.bytes_of(TAG, ONE) == 0


def test_while_the_tier_is_slow_there_is_no_room_and_nothing_is_dropped(writer, tier):
    tier.gate.clear()
    assert all(writer.submit(header(i), PAYLOAD) for i in range(3))
    assert not writer.has_room(len(PAYLOAD))
    assert not writer.submit(header(3), PAYLOAD)
    assert writer.stats().pending_frames == 3
    tier.gate.set()
    assert writer.flush(WAIT_S)
    assert writer.has_room(len(PAYLOAD))
    assert (len(tier.values), writer.stats().failures) == (3, {})


def test_payload_over_the_bound_passes_when_it_is_alone(writer, tier):
    big = bytes(4 * len(PAYLOAD))
    tier.gate.clear()
    assert writer.has_room(len(big))
    assert writer.submit(replace(header(1), shape=(len(big),)), big)
    assert not writer.has_room(1)
    tier.gate.set()
    assert writer.flush(WAIT_S)
    assert len(tier.values) == 1


def test_dead_tier_never_stalls_the_caller(writer, tier):
    tier.fault = "timeout"
    writer.submit(header(0), PAYLOAD)
    assert writer.flush(WAIT_S)
    ends: list[bool] = []
    for i in range(1000):
        assert writer.has_room(len(PAYLOAD))
        assert writer.submit(header(i), PAYLOAD, ends.append)
    stats = writer.stats()
    assert ends == [False] * 1000
    assert (stats.failures, stats.connected) == ({"timeout": 1, "breaker": 1000}, False)
    assert stats.faults["timeout"] >= 2


def test_frames_that_wait_behind_a_failed_one_are_given_up_and_counted(writer, tier):
    tier.gate.clear()
    writer.submit(header(0), PAYLOAD)
    tier.fault = "connection"
    writer.delete_session(TAG, OTHER)
    writer.submit(header(1), PAYLOAD)
    tier.gate.set()
    until(lambda: writer.stats().pending_frames == 0)
    assert sum(writer.stats().failures.values()) == 2


def test_first_failure_is_tried_again(writer, tier):
    tier.gate.clear()
    tier.fault = "timeout"
    writer.submit(header(0), PAYLOAD)
    done = threading.Event()
    original = tier._pass

    async def once(what: str) -> None:
        try:
            await original(what)
        finally:
            tier.fault = None

    tier._pass = once
    writer.submit(header(1), PAYLOAD, lambda _: done.set())
    tier.gate.set()
    assert writer.flush(WAIT_S)
    assert done.is_set()
    assert (writer.stats().failures, len(tier.values)) == ({}, 2)


def test_deletion_waits_until_the_tier_is_back(writer, tier):
    writer.submit(header(1), PAYLOAD)
    assert writer.flush(WAIT_S)
    tier.fault = "timeout"
    writer.delete_session(TAG, ONE)
    until(lambda: not writer.stats().connected)
    assert not writer.flush(0)
    assert writer.bytes_of(TAG, ONE) > 0
    tier.fault = None
    assert writer.flush(WAIT_S)
    assert tier.values == {}
    assert (writer.bytes_of(TAG, ONE), writer.stats().pending_deletions) == (0, 0)


def test_probe_brings_the_tier_back_without_traffic(writer, tier):
    tier.fault = "loading"
    writer.submit(header(1), PAYLOAD)
    until(lambda: not writer.stats().connected)
    tier.fault = None
    until(lambda: writer.stats().connected)


def test_frame_that_contradicts_its_header_is_counted_and_holds_up_no_other(writer, tier):
    ends: list[bool] = []
    writer.submit(header(1), PAYLOAD[:-1], ends.append)
    writer.submit(header(2), PAYLOAD, ends.append)
    assert writer.flush(WAIT_S)
    assert (writer.stats().failures, ends) == ({"frame": 1}, [False, True])
    assert list(tier.values) == [header(2).key]


def test_mover_outlives_a_backend_with_a_fault_of_its_own(writer, tier):
    original = tier.put_many

    async def broken(items, ttl_s) -> None:
        tier.put_many = original
        raise ZeroDivisionError

    tier.put_many = broken
    writer.submit(header(1), PAYLOAD)
    assert writer.flush(WAIT_S)
    until(lambda: writer.stats().connected)
    assert (writer.stats().failures, writer.stats().faults) == ({"internal": 1}, {"internal": 1})
    writer.submit(header(2), PAYLOAD)
    assert writer.flush(WAIT_S)
    assert list(tier.values) == [header(2).key]


def test_deletion_outlives_a_backend_with_a_fault_of_its_own(writer, tier):
    writer.submit(header(1), PAYLOAD)
    original = tier.delete_session

    async def broken(tenant_tag, session_id) -> int:
        tier.delete_session = original
        raise ZeroDivisionError

    tier.delete_session = broken
    writer.delete_session(TAG, ONE)
    assert writer.flush(WAIT_S)
    assert (tier.values, writer.bytes_of(TAG, ONE)) == ({}, 0)


def test_close_writes_what_is_pending(tier):
    made = WriteBehind(tier)
    made.start()
    tier.gate.clear()
    for i in range(5):
        made.submit(header(i), PAYLOAD)
    tier.gate.set()
    made.close(WAIT_S)
    assert (len(tier.values), tier.closed, made.stats().connected) == (5, True, False)
    made.close(0)


def test_close_gives_up_what_a_stuck_tier_does_not_take(tier):
    made = WriteBehind(tier)
    made.start()
    tier.gate.clear()
    ends: list[bool] = []
    made.submit(header(0), PAYLOAD, ends.append)
    made.delete_session(TAG, ONE)
    made.submit(header(1), PAYLOAD, ends.append)
    made.close(0.01)
    stats = made.stats()
    assert ends == [False, False]
    assert (stats.failures, stats.pending_frames, stats.pending_deletions) == ({"closed": 2}, 0, 0)
    assert tier.closed
    assert made.flush(0)


def test_close_of_a_writer_that_was_never_started_does_nothing(tier):
    WriteBehind(tier).close(0)


def test_bytes_past_their_time_are_no_longer_counted(tier):
    now = [1000.0]
    made = WriteBehind(tier, ttl_s=60, clock=lambda: now[0])
    made.start()
    made.submit(header(1), PAYLOAD)
    assert made.flush(WAIT_S)
    now[0] += 60
    made.submit(header(1, OTHER), PAYLOAD)
    assert made.flush(WAIT_S)
    assert made.bytes_of(TAG, ONE) == 0
    assert made.stats().stored_bytes == made.bytes_of(TAG, OTHER) > 0
    made.close(0)
