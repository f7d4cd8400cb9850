"""The scrubber and Verify on real servers of both roles."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from redis import Redis

from kvservice.store.base import SessionRecord
from kvservice.store.blobs import RedisBlobs, charged_bytes, key_of
from kvservice.store.manifests import FrameTable, Manifest
from kvservice.store.redis import RedisStateStore
from kvservice.store.scrub import Scrubber
from kvservice.store.verify import verify
from kvservice.tier.header import FrameHeader, FrameRole
from kvservice.tier.redis import RedisTier
from kvservice.tier.wire import encode_frame
from kvservice.types import FrameRef, OnMiss, PromptFormat, SessionId, TenantId, WorkerId

ANN, TAG, FINGERPRINT = TenantId("ann"), b"t" * 16, b"f" * 16
S, T = SessionId("s"), SessionId("t")
GRACE_S = 50.0
TTL_S = 1000.0


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(state_url, clock):
    store = RedisStateStore(state_url, clock=clock)
    yield store
    await store.aclose()


@pytest.fixture
async def blobs(kv_url):
    blobs = RedisBlobs(kv_url)
    await blobs.check()
    yield blobs
    await blobs.aclose()


@pytest.fixture
def kv(kv_url):
    with Redis.from_url(kv_url) as client:
        yield client


async def put(kv_url: str, session_id: SessionId, num_frames: int = 3) -> list[tuple[SessionId, FrameRef]]:
    """Writes frames as a worker does."""
    headers = [
        FrameHeader(
            TAG, session_id, FINGERPRINT, 0, FrameRole.KV, bytes([i]) * 16, 16 + 64 * i, 80 + 64 * i, (500,), "uint8"
        )
        for i in range(num_frames)
    ]
    items = [(header.key, encode_frame(header, bytes(500))) for header in headers]
    tier = RedisTier(kv_url)
    await tier.put_many(items, TTL_S)
    await tier.aclose()
    return [
        (session_id, FrameRef(0, "kv", header.start, header.stop, header.chunk_hash, len(value)))
        for header, (_, value) in zip(headers, items, strict=True)
    ]


async def publish(store, blobs, frames, session_id: SessionId = S) -> Manifest:
    at = await store.ledger.acquire_session(ANN, session_id, WorkerId("w"), TTL_S)
    manifest = Manifest(session_id, ANN, TAG, FINGERPRINT, at.epoch, 0, 500, 300, FrameTable.of(frames))
    charges = charged_bytes(manifest, blobs.allocator)
    return await store.ledger.publish_manifest(manifest, at, bytes_by_home=charges, ttl_s=TTL_S)


def scrubber(store, blobs, clock, **settings) -> Scrubber:
    return Scrubber(store.ledger, blobs, clock, orphan_grace_s=GRACE_S, **settings)


async def run_pass(scrub: Scrubber):
    while not await scrub.round():
        pass
    return scrub.last_pass


async def test_ledger_of_healthy_servers_agrees_with_memory_usage(store, blobs, clock, kv, kv_url):
    manifest = await publish(store, blobs, await put(kv_url, S))
    report = await run_pass(scrubber(store, blobs, clock))
    assert (report.leases, report.named_frames, report.met_frames) == (1, 3, 3)
    assert (report.missing_frames, report.wrong_size_frames, report.orphan_frames, report.mended_bytes) == (0, 0, 0, 0)
    assert report.drift_bytes == 0
    said = sum(kv.memory_usage(key_of(manifest, home, frame)) for home, frame in manifest.frames.frames())
    assert abs(report.ledger_bytes - said) <= 0.05 * said


async def test_round_is_bounded_and_a_pass_takes_as_many_as_it_needs(store, blobs, clock, kv_url):
    for number in range(4):
        session_id = SessionId(f"s{number}")
        await publish(store, blobs, await put(kv_url, session_id), session_id)
    scrub = scrubber(store, blobs, clock, keys_a_round=5)
    rounds = 1
    while not await scrub.round():
        rounds += 1
    assert 4 <= rounds <= 6
    assert (scrub.last_pass.named_frames, scrub.last_pass.met_frames) == (12, 12)


async def test_lost_and_changed_frames_are_counted(store, blobs, clock, kv, kv_url):
    manifest = await publish(store, blobs, await put(kv_url, S))
    first, second, _ = (key_of(manifest, home, frame) for home, frame in manifest.frames.frames())
    kv.delete(first)
    kv.append(second, b"more")
    report = await run_pass(scrubber(store, blobs, clock))
    assert (report.missing_frames, report.wrong_size_frames) == (1, 1)
    assert report.drift_bytes < 0


async def test_orphans_are_removed_once_their_grace_is_over_and_others_stay(store, blobs, clock, kv, kv_url):
    await publish(store, blobs, await put(kv_url, S))
    await put(kv_url, T)
    scrub = scrubber(store, blobs, clock)
    report = await run_pass(scrub)
    assert (report.orphan_frames, report.removed_frames) == (3, 0)
    clock.now += GRACE_S
    report = await run_pass(scrub)
    assert report.removed_frames == 3
    report = await run_pass(scrub)
    assert (report.met_frames, report.orphan_frames) == (3, 0)


async def test_session_that_has_not_published_yet_is_no_orphan(store, blobs, clock, kv_url):
    await publish(store, blobs, await put(kv_url, S))
    await put(kv_url, T)
    scrub = scrubber(store, blobs, clock)
    await run_pass(scrub)
    clock.now += GRACE_S
    await store.ledger.acquire_session(ANN, T, WorkerId("w"), TTL_S)
    report = await run_pass(scrub)
    assert (report.orphan_frames, report.removed_frames) == (0, 0)


async def test_wrong_sum_is_mended_and_stated(store, blobs, clock, state_url, kv_url):
    await publish(store, blobs, await put(kv_url, S))
    with Redis.from_url(state_url) as state:
        state.decrby("kvs:{tenant:ann}:sum", 50)
    report = await run_pass(scrubber(store, blobs, clock))
    assert (report.mended_bytes, report.drift_bytes) == (50, 0)


async def test_verify_says_what_there_is_of_each_session(store, blobs, clock, kv, kv_url):
    now = clock()
    record = SessionRecord(S, ANN, "m", "recall", PromptFormat.RAW, OnMiss.RECOMPUTE, TTL_S, now, now + TTL_S)
    await store.create_session(record)
    manifest = await publish(store, blobs, await put(kv_url, S))
    await put(kv_url, T, 2)
    keys = [key_of(manifest, home, frame) for home, frame in manifest.frames.frames()]
    kv.setrange(keys[0], 100, b"?")
    kv.delete(keys[1])
    found = await verify(store, blobs, ANN, TAG)
    first, second = found.sessions
    assert (first.has_record, first.has_lease, first.version, first.num_tokens) == (True, True, 1, 500)
    assert (first.named_frames, first.missing_frames, first.corrupt_frames, first.own_frames) == (3, 1, 1, 2)
    assert first.charged_bytes == found.tenant_bytes.stored_bytes > 1500
    assert (second.session_id, second.has_record, second.has_lease, second.own_frames) == (T, False, False, 2)
    (only,) = (await verify(store, blobs, ANN, TAG, "s")).sessions
    assert only == first
    assert (await verify(store, blobs, TenantId("bob"), b"b" * 16)).sessions == ()


async def test_verify_shows_that_nothing_is_left(store, blobs, kv_url, kv):
    manifest = await publish(store, blobs, await put(kv_url, S))
    assert await store.ledger.delete_manifest(ANN, S) == [S]
    assert await blobs.delete([key_of(manifest, home, frame) for home, frame in manifest.frames.frames()]) == 3
    found = await verify(store, blobs, ANN, TAG)
    assert (found.sessions, found.tenant_bytes.stored_bytes) == ((), 0)


async def test_renewal_lets_frames_and_their_index_live_longer(store, blobs, kv_url, kv):
    manifest = await publish(store, blobs, await put(kv_url, S))
    keys = [key_of(manifest, home, frame) for home, frame in manifest.frames.frames()]
    kv.delete(keys[0])
    assert await blobs.renew(keys, 5000) == 2
    assert min(kv.ttl(key) for key in kv.keys("*")) > 4000


def test_manifest_of_frames_elsewhere_is_charged_by_home():
    frames = [(S, FrameRef(0, "kv", 16, 80, b"a" * 16, 1000)), (T, FrameRef(0, "kv", 80, 144, b"b" * 16, 300_000))]
    manifest = Manifest(S, ANN, TAG, FINGERPRINT, 1, 0, 200, 144, FrameTable.of(frames))
    blobs = RedisBlobs("redis://127.0.0.1:1")
    charges = charged_bytes(manifest, blobs.allocator)
    assert 1000 < charges[S] < 1300
    assert 300_000 < charges[T] < 300_300
    assert charged_bytes(replace(manifest, frames=FrameTable()), blobs.allocator) == {}
