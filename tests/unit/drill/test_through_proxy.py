"""The tier's own clients behind a link with faults: right, missing with a reason, or refused; never wrong."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest

from kvservice.drill.proxy import LinkFault, Proxy
from kvservice.errors import Unavailable
from kvservice.tier.base import open_source
from kvservice.tier.header import FrameHeader, FrameRole, chunk_hash
from kvservice.tier.reader import OPEN_S, FrameReader, FrameWant, Miss
from kvservice.tier.redis import RedisTier
from kvservice.tier.wire import encode_frame
from kvservice.types import SessionId

TAG = b"t" * 16
PAYLOAD_BYTES = 20_000
HEADERS = [
    FrameHeader(
        TAG, SessionId("s"), TAG, 0, FrameRole.KV, chunk_hash(TAG, b"", [index]), 16, 80, (PAYLOAD_BYTES,), "uint8"
    )
    for index in range(12)
]
FRAMES = [
    (header.key, bytes(encode_frame(header, bytes([index]) * PAYLOAD_BYTES))) for index, header in enumerate(HEADERS)
]
ROUNDS = 4
FAULTS = {
    "latency": LinkFault(latency_s=0.01, jitter_s=0.02),
    "reset": LinkFault(reset_after_bytes=50_000),
    "truncated": LinkFault(truncate_after_bytes=50_000),
    "replies flipped": LinkFault(flip_every_bytes=15_000),
    "replies riddled": LinkFault(flip_every_bytes=60),
    "requests flipped": LinkFault(flip_every_bytes=300, flip_requests=True),
    "black hole": LinkFault(black_hole=True),
    "slow drip": LinkFault(drip_bytes_per_s=30_000),
    "refused": LinkFault(refuses=True),
    "loading": LinkFault(error="-LOADING Redis is loading the dataset in memory"),
    "moved": LinkFault(error="-MOVED 3999 127.0.0.1:1"),
}


@asynccontextmanager
async def proxied(kv_url):
    parts = urlsplit(kv_url)
    proxy = Proxy("127.0.0.1", parts.port, seed=5)
    port = await proxy.start()
    try:
        yield proxy, kv_url.replace(f":{parts.port}", f":{port}")
    finally:
        await proxy.aclose()


@pytest.mark.parametrize("name", FAULTS)
async def test_tier_gives_what_was_put_or_nothing_or_refuses(kv_url, name):
    async with proxied(kv_url) as (proxy, url):
        tier = RedisTier(url, timeout_s=0.3)
        try:
            await tier.put_many(FRAMES, 60.0)
            proxy.set(FAULTS[name])
            for _ in range(ROUNDS):
                try:
                    values = await tier.get_many([key for key, _ in FRAMES])
                    await tier.put_many(FRAMES[:2], 60.0)
                except Unavailable:
                    continue
                if not name.startswith("replies") and "flipped" not in name:
                    # Flips of values are for the frames' checksums to find.
                    assert all(value in (None, frame) for value, (_, frame) in zip(values, FRAMES, strict=True))
            proxy.heal()
            # Connections that were just cut are found out when they are used.
            with contextlib.suppress(Unavailable):
                await tier.get_many([FRAMES[0][0]])
            await tier.put_many(FRAMES, 60.0)
            assert await tier.get_many([key for key, _ in FRAMES]) == [frame for _, frame in FRAMES]
        finally:
            await tier.aclose()


@pytest.mark.parametrize("name", FAULTS)
async def test_reader_fills_memory_rightly_or_says_why_not(kv_url, name):
    async with proxied(kv_url) as (proxy, url):
        tier = RedisTier(kv_url)
        await tier.put_many(FRAMES, 60.0)
        await tier.aclose()
        reader = FrameReader(open_source(url), open_s=0.2)
        try:
            proxy.set(FAULTS[name])
            for _ in range(ROUNDS):
                results, memory = await asyncio.to_thread(_read, reader, 0.3)
                for index, result in enumerate(results):
                    assert result.miss is None or isinstance(result.miss, Miss)
                    if result.miss is None:
                        assert memory[index] == bytes([index]) * PAYLOAD_BYTES
            proxy.heal()
            await asyncio.sleep(0.25)
            give_up = time.monotonic() + 5 * OPEN_S
            while True:
                results, _ = await asyncio.to_thread(_read, reader, 2.0)
                if all(result.miss is None for result in results):
                    break
                assert time.monotonic() < give_up, [result.miss for result in results]
        finally:
            await asyncio.to_thread(reader.close)


def _read(reader: FrameReader, timeout_s: float):
    memory = [bytearray(PAYLOAD_BYTES) for _ in HEADERS]
    wants = [FrameWant(header, [memoryview(into)]) for header, into in zip(HEADERS, memory, strict=True)]
    return list(reader.fetch(wants, time.monotonic() + timeout_s)), [bytes(each) for each in memory]
