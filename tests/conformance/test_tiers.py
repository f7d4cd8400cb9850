"""What every tier backend must do, run on each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvservice.errors import Unavailable
from kvservice.tier.base import TierBackend, open_tier
from kvservice.tier.header import FrameRole, chunk_hash, frame_key
from kvservice.types import SessionId

TAG = bytes(range(16))
ONE, OTHER = SessionId("one"), SessionId("other")
TTL_S = 60.0


@pytest.fixture
async def backend(kv_url) -> AsyncIterator[TierBackend]:
    tier = open_tier(kv_url)
    yield tier
    await tier.aclose()


def key(number: int, session_id: SessionId = ONE, tag: bytes = TAG) -> bytes:
    return frame_key(tag, session_id, bytes(32), 0, FrameRole.KV, chunk_hash(tag, b"", [number]))


async def test_values_come_back_bit_equal_in_the_order_asked_for(backend):
    values = {key(i): bytes([i]) * (1 + i * 1000) for i in range(20)}
    await backend.put_many(list(values.items()), TTL_S)
    asked = list(reversed(values))
    assert await backend.get_many(asked) == [values[name] for name in asked]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_any_contiguous_buffer_can_be_put(backend, kind):
    await backend.put_many([(key(1), kind(b"abc" * 9000))], TTL_S)
    assert await backend.get_many([key(1)]) == [b"abc" * 9000]


async def test_missing_value_is_none(backend):
    await backend.put_many([(key(1), b"x")], TTL_S)
    assert await backend.get_many([key(0), key(1), key(2)]) == [None, b"x", None]


async def test_nothing_asked_is_nothing_done(backend):
    await backend.put_many([], TTL_S)
    assert await backend.get_many([]) == []


async def test_put_replaces_the_whole_value(backend):
    await backend.put_many([(key(1), b"long" * 5000)], TTL_S)
    await backend.put_many([(key(1), b"short")], TTL_S)
    assert await backend.get_many([key(1)]) == [b"short"]


async def test_many_megabytes_pass_in_one_call(backend):
    values = {key(i): bytes([i]) * (3 << 20) for i in range(7)}
    await backend.put_many(list(values.items()), TTL_S)
    assert await backend.get_many(list(values)) == list(values.values())


async def test_value_is_gone_after_its_time(backend):
    await backend.put_many([(key(1), b"x")], 0.001)
    async with asyncio.timeout(10):
        while await backend.get_many([key(1)]) != [None]:
            await asyncio.sleep(0)


async def test_delete_session_leaves_nothing_of_it_and_all_of_others(backend):
    mine = [(key(i), b"mine") for i in range(1000)]
    others = [(key(1, OTHER), b"other"), (key(1, ONE, bytes(16)), b"other tenant")]
    await backend.put_many(mine + others, TTL_S)
    assert await backend.delete_session(TAG, ONE) == 1000
    assert set(await backend.get_many([name for name, _ in mine])) == {None}
    assert await backend.get_many([name for name, _ in others]) == [b"other", b"other tenant"]
    assert await backend.delete_session(TAG, ONE) == 0


async def test_usage_counts_what_is_there(backend):
    assert (await backend.usage()).frames == 0
    await backend.put_many([(key(1), b"x" * 1000), (key(2, OTHER), b"y" * 500)], TTL_S)
    usage = await backend.usage()
    assert (usage.frames, usage.frame_bytes) == (2, 1500)
    assert usage.memory_bytes >= usage.frame_bytes
    assert usage.capacity_bytes > 0
    await backend.delete_session(TAG, ONE)
    assert (await backend.usage()).frame_bytes == 500


async def test_thousand_gets_at_once_all_end(backend):
    await backend.put_many([(key(1), b"x")], TTL_S)
    answers = await asyncio.gather(*(backend.get_many([key(1)]) for _ in range(1000)))
    assert answers == [[b"x"]] * 1000


async def test_cancelled_calls_leave_the_backend_usable(backend):
    values = [(key(i), bytes([i]) * (1 << 20)) for i in range(8)]
    await backend.put_many(values, TTL_S)
    names = [name for name, _ in values]
    for turns in range(20):
        call = asyncio.ensure_future(backend.get_many(names))
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    assert await backend.get_many(names) == [value for _, value in values]


async def test_closed_backend_refuses_everything(backend):
    await backend.aclose()
    calls = [
        backend.put_many([(key(1), b"x")], TTL_S),
        backend.get_many([key(1)]),
        backend.delete_session(TAG, ONE),
        backend.usage(),
    ]
    for call in calls:
        with pytest.raises(Unavailable) as caught:
            await call
        assert caught.value.reason == "closed"
