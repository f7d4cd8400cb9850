"""The publisher on real servers of both roles, with frames that a real writer writes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
import torch
from redis import Redis

from kvservice.config.recipes import get_recipe
from kvservice.errors import LimitExceeded
from kvservice.store.base import SessionRecord
from kvservice.store.blobs import RedisBlobs, key_of
from kvservice.store.ledger import fork_manifest
from kvservice.store.redis import RedisStateStore
from kvservice.tier.chunks import chain, chunk_name
from kvservice.tier.frame_sets import FrameSet, FrameSets
from kvservice.tier.header import FrameHeader, FrameRole
from kvservice.tier.journal import FrameJournal, JournaledWriter
from kvservice.tier.redis import RedisTier
from kvservice.types import (
    CallId,
    EngineCall,
    OnMiss,
    PromptFormat,
    Reached,
    SamplingParams,
    SessionId,
    TenantId,
    WorkerId,
)
from kvservice.worker.publishing import Publisher

# A chunk is one group.
WHOLE = FrameSet(b"f" * 16, (2, 25, 64, 2, 64), torch.bfloat16)
ANN, TAG = TenantId("ann"), b"t" * 16
S = SessionId("s")
POD, RECALL = get_recipe("pod"), get_recipe("recall")
TTL_S = 600.0
PATIENCE_S = 10.0


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
def kv(kv_url):
    with Redis.from_url(kv_url) as client:
        yield client


@pytest.fixture
def state(state_url):
    with Redis.from_url(state_url) as client:
        yield client


class Worker:
    """A publisher and the writer that it hears from."""

    def __init__(self, name: str, store: RedisStateStore, kv_url: str, clock: Clock) -> None:
        self.journal = FrameJournal(FrameSets(WHOLE, replace(WHOLE, fingerprint=b"p" * 16)))
        self.writer = JournaledWriter(RedisTier(kv_url), self.journal, ttl_s=TTL_S)
        self.blobs = RedisBlobs(kv_url)
        self.publisher = Publisher(WorkerId(name), store, self.journal, self.blobs, TTL_S, clock)
        self.calls = 0

    async def call(
        self, base: int, new: int, session_id: SessionId = S, *, was_elsewhere: bool = False, **changes: object
    ) -> CallId:
        self.calls += 1
        call = EngineCall(
            CallId(str(self.calls)),
            session_id,
            RECALL,
            base_tokens=(0,) * base,
            document_tokens=(0,) * new,
            tenant_tag=TAG,
        )
        await self.publisher.begin(replace(call, **changes), ANN, was_elsewhere=was_elsewhere)
        return call.call_id

    def write(self, groups: range, session_id: SessionId = S, size: int = 300, name: int = 0, tag: bytes = TAG) -> None:
        for group in groups:
            start = 16 + 64 * group
            head = (tag, session_id, b"f" * 16, 0, FrameRole.KV, bytes([group, name]) * 8, start, start + 64)
            assert self.writer.submit(FrameHeader(*head, (size,), "uint8"), bytes(size))

    def write_window(self, start: int, stop: int, tag: bytes = TAG, size: int = 900) -> None:
        name = stop.to_bytes(16, "little")
        head = (tag, S, b"f" * 16, 0, FrameRole.WINDOW, name, start, stop)
        assert self.writer.submit(FrameHeader(*head, (size,), "uint8"), bytes(size))

    async def end(self, call_id: CallId, appended: int, reached: Reached | None = None) -> None:
        self.publisher.ended(call_id, appended, reached)
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            await self.publisher.settle()

    async def turn(self, base: int, new: int, groups: range, session_id: SessionId = S) -> None:
        call_id = await self.call(base, new, session_id)
        self.write(groups, session_id)
        await self.end(call_id, new)


@pytest.fixture
async def start(store, kv_url, clock):
    workers: list[Worker] = []

    async def start(name: str) -> Worker:
        worker = Worker(name, store, kv_url, clock)
        await worker.blobs.check()
        await asyncio.to_thread(worker.writer.start)
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        await worker.publisher.stop(1.0)
        await worker.blobs.aclose()
        await asyncio.to_thread(worker.writer.close, 1.0)


@pytest.fixture
async def worker(start) -> Worker:
    return await start("w")


async def keep_record(store, clock, session_id: SessionId = S) -> None:
    await store.create_session(
        SessionRecord(
            session_id, ANN, "m", "recall", PromptFormat.RAW, OnMiss.RECOMPUTE, 5000.0, clock.now, clock.now + 5000
        )
    )


def allocated(kv: Redis) -> object:
    """What all frames take. What an allocator gives for the same size differs by some bytes from time to time."""
    return pytest.approx(sum(kv.memory_usage(key) for key in kv.keys("kv1:*")), rel=0.02)


def stops(manifest) -> list[int]:
    return [frame.stop for _, frame in manifest.frames.frames()]


async def test_turn_is_published_with_the_frames_that_were_written_and_their_sizes(worker, store, kv):
    assert RECALL.window_start(500) == 16 + 64 * 3
    await worker.turn(0, 500, range(3))
    manifest = await store.ledger.get_manifest(ANN, S)
    assert (manifest.num_tokens, manifest.window_start, manifest.version) == (500, 208, 1)
    assert stops(manifest) == [80, 144, 208]
    for home, frame in manifest.frames.frames():
        assert kv.strlen(key_of(manifest, home, frame)) == frame.stored_bytes
    found = await store.ledger.tenant_bytes(ANN)
    assert found.reserved_bytes == 0
    assert found.stored_bytes == allocated(kv)


async def test_later_turns_add_to_the_manifest_and_raise_its_version(worker, store):
    await worker.turn(0, 500, range(3))
    await worker.turn(500, 10, range(0))
    await worker.turn(510, 90, range(3, 4))
    manifest = await store.ledger.get_manifest(ANN, S)
    assert (manifest.version, manifest.num_tokens, stops(manifest)) == (3, 600, [80, 144, 208, 272])
    assert worker.publisher.stats().published == 3


async def test_frames_of_a_turn_that_was_taken_back_are_not_named(worker, store):
    await worker.turn(0, 500, range(3))
    call_id = await worker.call(500, 200)
    worker.write(range(3, 6))
    await worker.end(call_id, 0)
    assert stops(await store.ledger.get_manifest(ANN, S)) == [80, 144, 208]
    worker.write(range(3, 5), name=1)
    await worker.turn(500, 100, range(0))
    manifest = await store.ledger.get_manifest(ANN, S)
    assert [chunk.chunk_hash[1] for chunk in manifest.frames.chunks] == [0, 0, 0, 1, 1]


async def test_bytes_are_reserved_while_a_call_runs_and_the_rest_is_given_back(worker, store):
    call_id = await worker.call(0, 500)
    assert (await store.ledger.tenant_bytes(ANN)).reserved_bytes > 3 * WHOLE.group_bytes
    await worker.end(call_id, 0)
    assert (await store.ledger.tenant_bytes(ANN)).reserved_bytes == 0
    assert await store.ledger.get_manifest(ANN, S) is None


async def test_full_quota_refuses_the_call(worker, store):
    await store.ledger.set_quota(ANN, 100)
    with pytest.raises(LimitExceeded) as caught:
        await worker.call(0, 500)
    assert caught.value.reason == "stored_bytes_quota"
    await worker.call(0, 100)


async def test_calls_without_a_tenant_or_that_keep_nothing_are_not_published(worker, store, state):
    await worker.call(0, 500, retain=False, sampling=SamplingParams())
    await worker.call(0, 500, tenant_tag=b"")
    assert state.keys("*") == []


async def test_worker_that_was_cut_off_can_not_publish_over_its_successor(start, store):
    first, second = await start("v"), await start("w")
    await first.turn(0, 500, range(3))
    await second.turn(500, 100, range(3, 4))
    before = await store.ledger.get_manifest(ANN, S)
    assert stops(before) == [80, 144, 208, 272]
    await first.turn(500, 300, range(3, 7))
    assert await store.ledger.get_manifest(ANN, S) == before
    assert (first.publisher.stats().fenced, first.publisher.stats().held_sessions) == (1, 0)
    assert second.publisher.stats().fenced == 0


async def test_leases_and_frames_are_renewed_without_being_read(worker, store, clock, kv):
    await keep_record(store, clock)
    await worker.turn(0, 500, range(3))
    for key in kv.keys("kv1:*"):
        kv.pexpire(key, 5000)
    clock.now += TTL_S - 1
    await worker.publisher.renew()
    clock.now += TTL_S - 1
    assert await store.ledger.get_manifest(ANN, S) is not None
    assert min(kv.ttl(key) for key in kv.keys("kv1:*")) > TTL_S / 2


async def test_session_that_was_closed_elsewhere_is_let_go(worker, store, clock):
    await keep_record(store, clock)
    await worker.turn(0, 500, range(3))
    await store.delete_session(S)
    await worker.publisher.renew()
    assert worker.publisher.stats().held_sessions == 0
    clock.now += TTL_S
    assert (await store.ledger.tenant_bytes(ANN)).stored_bytes == 0


async def test_state_that_came_back_empty_is_given_the_manifests_again(worker, store, clock, state):
    await worker.turn(0, 500, range(3))
    before = await store.ledger.get_manifest(ANN, S)
    state.flushall()
    await keep_record(store, clock)
    await worker.publisher.renew()
    again = await store.ledger.get_manifest(ANN, S)
    assert (again.frames, again.num_tokens) == (before.frames, 500)
    state.flushall()
    await keep_record(store, clock)
    await worker.turn(500, 100, range(3, 4))
    assert stops(await store.ledger.get_manifest(ANN, S)) == [80, 144, 208, 272]


async def test_lost_session_of_a_lost_record_is_not_raised_from_the_dead(worker, store, state):
    await worker.turn(0, 500, range(3))
    state.flushall()
    await worker.turn(500, 100, range(3, 4))
    assert await store.ledger.get_manifest(ANN, S) is None
    assert worker.publisher.stats().held_sessions == 0


async def test_released_session_is_published_no_more(worker, store):
    await worker.turn(0, 500, range(3))
    call_id = await worker.call(500, 100)
    worker.write(range(3, 4))
    await worker.publisher.release(S)
    assert await store.ledger.delete_manifest(ANN, S) == [S]
    await worker.end(call_id, 100)
    assert await store.ledger.get_manifest(ANN, S) is None
    assert await store.ledger.list_leases(ANN) == []
    assert (await store.ledger.tenant_bytes(ANN)).reserved_bytes == 0


async def test_fork_goes_on_with_its_parents_frames_and_its_own(worker, store):
    await worker.turn(0, 500, range(3))
    fork = SessionId("f")
    await fork_manifest(store.ledger, ANN, S, fork, 500, TTL_S)
    charged = (await store.ledger.tenant_bytes(ANN)).stored_bytes
    await worker.turn(500, 100, range(3, 4), fork)
    manifest = await store.ledger.get_manifest(ANN, fork)
    assert [home for home, _ in manifest.frames.frames()] == [S, S, S, fork]
    assert (manifest.parent, manifest.version) == (S, 2)
    assert (await store.ledger.tenant_bytes(ANN)).stored_bytes < charged * 3 / 2


async def test_frames_that_were_lost_at_once_are_not_named(worker, store, kv):
    call_id = await worker.call(0, 500)
    worker.write(range(3))
    assert await asyncio.to_thread(worker.writer.flush, PATIENCE_S)
    kv.delete(*[key for key in kv.keys("kv1:*") if key.endswith(b"0100" * 8)])
    await worker.end(call_id, 500)
    assert stops(await store.ledger.get_manifest(ANN, S)) == [80, 208]


async def test_state_store_that_is_away_costs_no_call_and_the_next_turn_catches_up(worker, store, state, clock):
    await worker.turn(0, 500, range(3))
    state.config_set("maxmemory", 1)
    try:
        await worker.turn(500, 100, range(3, 4))
        await worker.turn(600, 64, range(4, 5))
        assert worker.publisher.stats().failures["state_oom"] >= 1
    finally:
        state.config_set("maxmemory", 0)
    clock.now += 10
    await worker.turn(664, 64, range(5, 6))
    manifest = await store.ledger.get_manifest(ANN, S)
    assert stops(manifest) == [80, 144, 208, 272, 336, 400]


async def test_turn_while_the_state_store_is_away_is_known_and_published_once_it_is_back(worker, store, state):
    await worker.turn(0, 500, range(3))
    state.config_set("maxmemory", 1)
    try:
        await worker.turn(500, 100, range(3, 4))
        known = await worker.publisher.known(S)
    finally:
        state.config_set("maxmemory", 0)
    assert (known.num_tokens, stops(known)) == (600, [80, 144, 208, 272])
    assert await worker.publisher.publish(S)
    manifest = await store.ledger.get_manifest(ANN, S)
    assert (manifest.num_tokens, stops(manifest)) == (600, [80, 144, 208, 272])


async def test_frames_of_the_next_turn_are_not_lost_when_the_last_is_published_late(worker, store):
    first = await worker.call(0, 500)
    worker.write(range(3))
    worker.publisher.ended(first, 500)
    second = await worker.call(500, 100)
    worker.write(range(3, 4))
    await asyncio.sleep(0)
    await worker.publisher.settle()
    assert stops(await store.ledger.get_manifest(ANN, S)) == [80, 144, 208]
    await worker.end(second, 100)
    assert stops(await store.ledger.get_manifest(ANN, S)) == [80, 144, 208, 272]


async def test_frames_of_another_model_are_forgotten(start, store):
    first, second = await start("v"), await start("w")
    await first.turn(0, 500, range(3))
    second.journal.frame_sets.describe(replace(WHOLE, fingerprint=b"g" * 16), None)
    call_id = await second.call(500, 10)
    head = (TAG, S, b"g" * 16, 0, FrameRole.KV, b"n" * 16, 16, 80)
    assert second.writer.submit(FrameHeader(*head, (300,), "uint8"), bytes(300))
    await second.end(call_id, 10)
    manifest = await store.ledger.get_manifest(ANN, S)
    assert (manifest.fingerprint, stops(manifest), manifest.version) == (b"g" * 16, [80], 2)


async def test_frames_of_a_worker_with_another_map_are_forgotten_once_a_call_says_that_keys_are_shared(start, store):
    first, second = await start("v"), await start("w")
    call_id = await first.call(0, 500, recipe=POD)
    head = (TAG, S, b"p" * 16, 0, FrameRole.KV, b"n" * 16, 16, 80)
    assert first.writer.submit(FrameHeader(*head, (300,), "uint8"), bytes(300))
    await first.end(call_id, 500)
    published = await store.ledger.get_manifest(ANN, S)
    assert (published.fingerprint, stops(published)) == (b"p" * 16, [80])
    second.journal.frame_sets.describe(WHOLE, replace(WHOLE, fingerprint=b"q" * 16))
    # Acquired, it stays what it is: whoever has that map may read it yet.
    assert await second.publisher.acquire(ANN, TAG, S)
    assert (await second.publisher.known(S)).fingerprint == b"p" * 16
    call_id = await second.call(500, 10, recipe=POD)
    # A reader finds what it has no use for, and counts that.
    assert (await second.publisher.known(S)).fingerprint == b"p" * 16
    await second.end(call_id, 10)
    manifest = await store.ledger.get_manifest(ANN, S)
    assert (manifest.fingerprint, stops(manifest)) == (b"q" * 16, [])


async def test_what_a_session_that_shares_took_over_is_not_another_kinds(worker, store):
    """Names of chunks stand for tokens, so those of both kinds are alike."""
    tokens = (0,) * 500
    name = chunk_name(TAG, chain(TAG, tokens)[0], 16, "raw")
    call_id = await worker.call(0, 500, SessionId("other"))
    head = (TAG, SessionId("other"), b"f" * 16, 0, FrameRole.KV, name, 16, 80)
    assert worker.writer.submit(FrameHeader(*head, (300,), "uint8"), bytes(300))
    await worker.end(call_id, 500)
    await worker.end(await worker.call(0, 500, recipe=POD), 500)
    assert stops(await worker.publisher.known(S)) == []
    await worker.end(await worker.call(0, 500, SessionId("alike")), 500)
    assert stops(await worker.publisher.known(SessionId("alike"))) == [80]


@pytest.mark.parametrize("is_shared", [False, True])
async def test_frames_of_the_last_checkpoint_go_once_others_are_published_unless_forks_may_name_them(
    worker, store, kv, clock, is_shared
):
    await keep_record(store, clock)
    await worker.turn(0, 500, range(3))
    before = await store.ledger.get_manifest(ANN, S)
    (old,) = [key_of(before, home, frame) for home, frame in before.frames.frames() if frame.start == 16]
    if is_shared:
        await worker.publisher.share(S)
        assert (await store.ledger.get_manifest(ANN, S)).is_shared
    call_id = await worker.call(500, 0, prompt_tokens=(0,), sampling=SamplingParams(max_new_tokens=4))
    worker.write(range(1), name=1)
    await worker.end(call_id, 5)
    after = await store.ledger.get_manifest(ANN, S)
    assert [frame.chunk_hash[1] for _, frame in after.frames.frames()] == [1, 0, 0]
    assert kv.exists(old) == is_shared
    assert all(kv.exists(key_of(after, home, frame)) for home, frame in after.frames.frames())


async def test_who_hands_a_session_over_publishes_it_and_who_takes_it_on_fences_it(start, store, clock):
    await keep_record(store, clock)
    giver, taker = await start("a"), await start("b")
    await giver.turn(0, 500, range(3))
    assert await giver.publisher.publish(S)
    assert await taker.publisher.acquire(ANN, TAG, S)
    # The giver was cut off, and comes back: what it has to say counts no more.
    before = await store.ledger.get_manifest(ANN, S)
    await giver.turn(500, 64, range(3, 4))
    assert await store.ledger.get_manifest(ANN, S) == before
    assert giver.publisher.stats().fenced == 1
    # And it may own the session again.
    assert await giver.publisher.acquire(ANN, TAG, S)


async def test_session_that_was_elsewhere_is_known_as_it_was_left_there(start, store):
    first, second = await start("a"), await start("b")
    await first.turn(0, 500, range(3))
    await second.turn(500, 100, range(3, 4))
    call_id = await first.call(600, 100, was_elsewhere=True)
    assert stops(await first.publisher.known(S)) == [80, 144, 208, 272]
    first.write(range(4, 5))
    await first.end(call_id, 100)
    assert stops(await store.ledger.get_manifest(ANN, S)) == [80, 144, 208, 272, 336]
    assert first.publisher.stats().fenced == 0


async def test_session_that_another_worker_only_asked_for_is_published_with_all_that_is_known_of_it(start, store):
    first, second = await start("a"), await start("b")
    await first.turn(0, 500, range(3))
    # A turn that could not be published; and a worker that acquires the session, and then refuses the call.
    await first.call(500, 100)
    first.write(range(3, 4))
    assert await second.publisher.acquire(ANN, TAG, S)
    call_id = await first.call(600, 100, was_elsewhere=True)
    first.write(range(4, 5))
    await first.end(call_id, 100)
    assert stops(await store.ledger.get_manifest(ANN, S)) == [80, 144, 208, 272, 336]
    assert first.publisher.stats().fenced == 0


async def test_window_is_published_with_its_turn_and_the_one_before_goes(worker, store, kv):
    async def turn(base: int, tokens: int, groups: range) -> None:
        call_id = await worker.call(base, tokens - base)
        worker.write(groups)
        worker.write_window(RECALL.window_start(tokens), tokens - 1)
        await worker.end(call_id, tokens - base, Reached(tokens - 1))

    await turn(0, 500, range(3))
    first = await store.ledger.get_manifest(ANN, S)
    assert (first.window.start, first.window.stop, first.window.home) == (208, 499, S)
    assert first.num_tokens == 500
    charged = (await store.ledger.tenant_bytes(ANN)).stored_bytes
    assert charged == allocated(kv)
    await turn(500, 510, range(0))
    second = await store.ledger.get_manifest(ANN, S)
    assert second.window.stop == 509
    assert len(kv.keys("kv1:*:window:*")) == 1
    # A fork has the window of its moment, whatever becomes of its parent.
    await worker.publisher.share(S)
    fork = await fork_manifest(store.ledger, ANN, S, SessionId("f"), 510, TTL_S)
    assert fork.window == second.window
    assert (await fork_manifest(store.ledger, ANN, S, SessionId("g"), 400, TTL_S)).window is None
    for tokens in (520, 530):
        await turn(tokens - 10, tokens, range(0))
    stops = {int(key.rpartition(b":")[2][:4], 16) for key in kv.keys("kv1:*:window:*")}
    assert len(stops) == 2
    assert (await worker.blobs.sizes([key_of(fork, S, frame) for _, frame in fork.named()])).count(0) == 0
    charged = (await store.ledger.tenant_bytes(ANN)).stored_bytes
    assert charged == allocated(kv)


async def test_window_of_tokens_that_were_taken_back_is_not_named(worker, store):
    call_id = await worker.call(0, 500)
    worker.write(range(3))
    worker.write_window(208, 499)
    await worker.end(call_id, 500, Reached(499))
    call_id = await worker.call(400, 50)
    await worker.end(call_id, 50, Reached(449))
    assert (await store.ledger.get_manifest(ANN, S)).window is None


async def test_windows_that_no_manifest_has_named_are_deleted_too(worker, store, kv):
    call_id = await worker.call(0, 500)
    worker.write(range(3))
    worker.write_window(208, 498)
    worker.write_window(208, 499)
    await worker.end(call_id, 500, Reached(499))
    assert (await store.ledger.get_manifest(ANN, S)).window.stop == 499
    assert len(kv.keys("kv1:*:window:*")) == 1


async def test_drained_publisher_lets_all_sessions_go_published(worker, store):
    other = SessionId("other")
    await worker.turn(0, 500, range(3))
    await worker.turn(0, 500, range(3), other)
    assert await worker.publisher.hand_over() == 2
    assert worker.publisher.stats().held_sessions == 0
    assert await store.ledger.get_manifest(ANN, other) is not None


async def test_after_a_change_of_the_secret_old_frames_go_and_new_ones_are_published(worker, store, kv):
    await worker.turn(0, 500, range(3))
    assert len(kv.keys("kv1:*")) == 3
    new_tag = b"n" * 16
    call_id = await worker.call(500, 10, tenant_tag=new_tag)
    assert kv.keys("kv1:*") == []
    worker.write(range(3), tag=new_tag)
    worker.write_window(208, 509, new_tag)
    await worker.end(call_id, 10, Reached(509))
    manifest = await store.ledger.get_manifest(ANN, S)
    assert (manifest.tenant_tag, stops(manifest), manifest.window.stop) == (new_tag, [80, 144, 208], 509)


async def test_what_was_taken_over_from_anothers_memory_is_named_where_it_lies(worker, store, kv):
    other = SessionId("other")
    tokens = tuple(range(500))
    names = chain(TAG, tokens[:208])

    def write(groups: range, session_id: SessionId) -> None:
        for group in groups:
            name = chunk_name(TAG, names[group], 16 + 64 * group, "raw")
            head = (TAG, session_id, b"f" * 16, 0, FrameRole.KV, name, 16 + 64 * group, 80 + 64 * group)
            assert worker.writer.submit(FrameHeader(*head, (300,), "uint8"), bytes(300))

    call_id = await worker.call(0, 0, other, document_tokens=tokens)
    write(range(3), other)
    await worker.end(call_id, 500, Reached(500))
    call_id = await worker.call(0, 0, document_tokens=tokens)
    write(range(2, 3), S)
    await worker.end(call_id, 500, Reached(500))
    manifest = await store.ledger.get_manifest(ANN, S)
    assert [(chunk.stop, chunk.home) for chunk in manifest.frames.chunks] == [(80, other), (144, other), (208, S)]
    charged = (await store.ledger.tenant_bytes(ANN)).stored_bytes
    assert charged == allocated(kv)
    # Others' frames stay, whatever becomes of whose they are.
    await worker.publisher.publish(other)
    assert (await store.ledger.get_manifest(ANN, other)).is_shared


async def test_session_without_frames_says_how_it_was_computed(worker, store):
    call_id = await worker.call(0, 500)
    reached = Reached(499, ((450, 499),))
    await worker.end(call_id, 500, reached)
    assert (await store.ledger.get_manifest(ANN, S)).reached == reached
    assert (await worker.publisher.known(S)).reached == reached
    assert await worker.publisher.known(SessionId("nobody")) is None
