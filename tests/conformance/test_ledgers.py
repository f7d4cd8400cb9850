"""What every ledger of stored KV must do, run on each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from redis import Redis

from kvservice.errors import Conflict, LimitExceeded, NotFound
from kvservice.store.base import StateStore
from kvservice.store.ledger import Held, KvLedger, Position, fork_manifest, split_bytes
from kvservice.store.manifests import FrameTable, Manifest
from kvservice.store.memory import MemoryStateStore
from kvservice.store.redis import RedisStateStore
from kvservice.types import FrameRef, SessionId, TenantId, WorkerId

ANN, BOB = TenantId("ann"), TenantId("bob}:x")
S, T, DOC = SessionId("s"), SessionId("t"), SessionId("doc")
W, V = WorkerId("w"), WorkerId("v:1")
QUOTA = 10_000
TTL_S = 100.0
TAG = b"t" * 16


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "redis"])
async def store(request, clock) -> AsyncIterator[StateStore]:
    if request.param == "memory":
        opened: StateStore = MemoryStateStore(clock, QUOTA)
    else:
        url = request.getfixturevalue("state_url")
        opened = RedisStateStore(url, clock=clock, default_quota_bytes=QUOTA)
    yield opened
    await opened.aclose()


@pytest.fixture
def ledger(store) -> KvLedger:
    return store.ledger


def frames(num_chunks: int, home: SessionId = S) -> FrameTable:
    refs = (FrameRef(0, "kv", 16 + 64 * i, 80 + 64 * i, bytes([i]) * 16, 500) for i in range(num_chunks))
    return FrameTable.of((home, ref) for ref in refs)


def manifest(epoch: int, num_chunks: int = 2, session_id: SessionId = S, **changes: object) -> Manifest:
    made = Manifest(
        session_id, ANN, TAG, b"f" * 16, epoch, 0, 400, 16 + 64 * num_chunks, frames(num_chunks, session_id)
    )
    return replace(made, **changes)


async def publish(
    ledger: KvLedger, epoch: int, expected: Position, num_bytes: int = 1000, session_id: SessionId = S, **more: object
) -> Manifest:
    return await ledger.publish_manifest(
        manifest(epoch, session_id=session_id),
        expected,
        bytes_by_home={session_id: num_bytes, **more.pop("shared", {})},
        ttl_s=more.pop("ttl_s", TTL_S),
        **more,
    )


async def stored(ledger: KvLedger, tenant: TenantId = ANN) -> int:
    return (await ledger.tenant_bytes(tenant)).stored_bytes


async def reserved(ledger: KvLedger) -> int:
    return (await ledger.tenant_bytes(ANN)).reserved_bytes


async def begun(ledger: KvLedger, session_id: SessionId = S, worker: WorkerId = W, ttl_s: float = TTL_S) -> Position:
    return await ledger.acquire_session(ANN, session_id, worker, ttl_s)


async def test_reservation_counts_until_it_lapses(ledger, clock):
    await ledger.reserve_bytes(ANN, "r", 3000, TTL_S)
    assert (await reserved(ledger), await stored(ledger), await stored(ledger, BOB)) == (3000, 0, 0)
    clock.now += TTL_S
    assert await reserved(ledger) == 0


async def test_reservation_beyond_the_quota_is_refused_and_changes_nothing(ledger):
    await ledger.reserve_bytes(ANN, "r", 6000, TTL_S)
    with pytest.raises(LimitExceeded) as caught:
        await ledger.reserve_bytes(ANN, "q", 4001, TTL_S)
    assert caught.value.reason == "stored_bytes_quota"
    assert caught.value.metadata == {
        "quota": "stored_bytes",
        "wanted_bytes": "10001",
        "quota_bytes": "10000",
    }
    assert await reserved(ledger) == 6000
    await ledger.reserve_bytes(ANN, "q", 4000, TTL_S)
    await ledger.reserve_bytes(BOB, "q", 10_000, TTL_S)


async def test_reservation_made_again_takes_the_place_of_the_first_and_zero_gives_it_back(ledger):
    await ledger.reserve_bytes(ANN, "r", 6000, TTL_S)
    await ledger.reserve_bytes(ANN, "r", 9000, TTL_S)
    assert await reserved(ledger) == 9000
    await ledger.reserve_bytes(ANN, "r", 0, TTL_S)
    assert await reserved(ledger) == 0


async def test_quota_of_a_tenants_own_holds_and_can_be_taken_back(ledger):
    await ledger.set_quota(ANN, 100)
    with pytest.raises(LimitExceeded):
        await ledger.reserve_bytes(ANN, "r", 101, TTL_S)
    await ledger.set_quota(ANN, None)
    await ledger.reserve_bytes(ANN, "r", 101, TTL_S)
    assert (await ledger.tenant_bytes(ANN)).quota_bytes == QUOTA


async def test_publication_turns_the_reservation_into_a_lease(ledger):
    await ledger.reserve_bytes(ANN, "r", 5000, TTL_S)
    at = await begun(ledger)
    kept = await publish(ledger, at.epoch, at, 1000, reservation_id="r")
    assert kept == replace(manifest(at.epoch), version=1)
    assert await ledger.get_manifest(ANN, S) == kept
    assert await ledger.get_manifest(BOB, S) is None
    assert (await stored(ledger), await reserved(ledger)) == (1000, 0)


async def test_publication_without_a_reservation_is_checked_against_the_quota(ledger):
    at = await begun(ledger)
    with pytest.raises(LimitExceeded):
        await publish(ledger, at.epoch, at, QUOTA + 1)
    assert (await stored(ledger), await ledger.get_manifest(ANN, S)) == (0, None)
    # What was reserved is the tenant's, even if the quota is lowered meanwhile.
    await ledger.reserve_bytes(ANN, "r", 5000, TTL_S)
    await ledger.set_quota(ANN, 10)
    await publish(ledger, at.epoch, at, 5000, reservation_id="r")
    assert await stored(ledger) == 5000


async def test_lower_epoch_can_not_publish_and_hears_the_true_one(ledger):
    first = await begun(ledger)
    await publish(ledger, first.epoch, first)
    second = await begun(ledger, worker=V)
    assert second.epoch > first.epoch
    assert second.version == 1
    with pytest.raises(Conflict, match="another worker has acquired it") as caught:
        await publish(ledger, first.epoch, replace(first, version=1), 2000)
    assert caught.value.reason == "fenced"
    assert caught.value.metadata == {"epoch": str(second.epoch), "version": "1"}
    assert await stored(ledger) == 1000
    await publish(ledger, second.epoch, second, 2000)
    assert await stored(ledger) == 2000


async def test_publication_over_an_unknown_version_is_refused(ledger):
    at = await begun(ledger)
    await publish(ledger, at.epoch, at)
    with pytest.raises(Conflict) as caught:
        await publish(ledger, at.epoch, at)
    assert (caught.value.reason, caught.value.metadata["version"]) == ("manifest_moved", "1")


async def test_of_many_publications_at_once_one_wins(ledger):
    at = await begun(ledger)
    ends = await asyncio.gather(*(publish(ledger, at.epoch, at, 100 + i) for i in range(8)), return_exceptions=True)
    assert sum(isinstance(end, Manifest) for end in ends) == 1
    assert sum(isinstance(end, Conflict) for end in ends) == 7


async def test_each_acquisition_has_an_epoch_of_its_own_even_after_the_lease_expired(ledger, clock):
    first = await begun(ledger)
    clock.now += TTL_S
    second = await begun(ledger, worker=V)
    assert second.epoch > first.epoch
    with pytest.raises(Conflict):
        await publish(ledger, first.epoch, first)


async def test_expired_lease_leaves_the_sum_by_itself_and_its_manifest_goes(ledger, clock):
    at = await begun(ledger)
    await publish(ledger, at.epoch, at)
    clock.now += TTL_S - 1
    assert await stored(ledger) == 1000
    clock.now += 1
    assert await stored(ledger) == 0
    assert await ledger.get_manifest(ANN, S) is None
    assert await ledger.list_leases(ANN) == []
    assert await ledger.settle(ANN) == (await ledger.settle(ANN))


async def test_renewal_prolongs_all_of_a_workers_leases_and_names_the_lost_ones(ledger, clock):
    mine, other = await begun(ledger), await begun(ledger, T)
    await publish(ledger, mine.epoch, mine)
    await publish(ledger, other.epoch, other, 500, T)
    await begun(ledger, T, V)
    clock.now += TTL_S / 2
    held = [Held(ANN, S, mine.epoch), Held(ANN, T, other.epoch), Held(BOB, S, 1)]
    assert await ledger.renew_leases(W, held, TTL_S) == held[1:]
    clock.now += TTL_S * 0.75
    assert [lease.session_id for lease in await ledger.list_leases(ANN)] == [S]
    assert await ledger.renew_leases(W, [], TTL_S) == []


async def test_lease_says_who_what_and_until_when(ledger, clock):
    at = await begun(ledger, worker=V)
    await publish(ledger, at.epoch, at)
    (lease,) = await ledger.list_leases(ANN)
    assert (lease.worker_id, lease.position, lease.bytes_by_home) == (V, Position(at.epoch, 1), {S: 1000})
    assert abs(lease.expires_at - clock() - TTL_S) < 0.01


async def test_shared_document_is_counted_once_and_for_as_long_as_somebody_uses_it(ledger, clock):
    of_doc = await begun(ledger, DOC)
    await publish(ledger, of_doc.epoch, of_doc, 3000, DOC)
    for session_id in (S, T):
        at = await begun(ledger, session_id)
        await publish(ledger, at.epoch, at, 100, session_id, shared={DOC: 3000})
    assert await stored(ledger) == 3200
    assert split_bytes(await ledger.list_leases(ANN)) == {DOC: 1000, S: 1100, T: 1100}
    assert await ledger.delete_manifest(ANN, DOC) == []
    assert await stored(ledger) == 3200
    assert await ledger.delete_manifest(ANN, S) == [S]
    assert await ledger.delete_manifest(ANN, T) == [DOC, T]
    assert await stored(ledger) == 0


async def test_frames_that_nobody_keeps_can_not_be_named(ledger):
    at = await begun(ledger)
    with pytest.raises(Conflict, match="was closed or has expired") as caught:
        await publish(ledger, at.epoch, at, 100, shared={DOC: 3000})
    assert caught.value.reason == "home_gone"


async def test_fork_names_its_parents_frames_costs_nothing_and_outlives_it(ledger):
    at = await begun(ledger)
    parent = await publish(ledger, at.epoch, at)
    fork = await fork_manifest(ledger, ANN, S, T, 100, TTL_S)
    assert (fork.parent, fork.num_tokens, fork.epoch, fork.version) == (S, 100, 0, 1)
    assert [ref.stop for _, ref in fork.frames.frames()] == [80]
    assert {home for home, _ in fork.frames.frames()} == {S}
    assert await stored(ledger) == 1000
    owner = await begun(ledger, T, V)
    assert owner.version == 1
    mine = replace(fork, epoch=owner.epoch, frames=parent.frames.until(80).with_frames(frames(3, T).frames()))
    await ledger.publish_manifest(mine, owner, bytes_by_home={S: 1000, T: 700}, ttl_s=TTL_S)
    assert await stored(ledger) == 1700
    assert await ledger.delete_manifest(ANN, S) == []
    assert await stored(ledger) == 1700
    assert await ledger.delete_manifest(ANN, T) == [S, T]
    assert await stored(ledger) == 0


async def test_fork_of_what_has_no_manifest_is_not_found_and_twice_is_refused(ledger):
    with pytest.raises(NotFound):
        await fork_manifest(ledger, ANN, S, T, 100, TTL_S)
    at = await begun(ledger)
    await publish(ledger, at.epoch, at)
    await fork_manifest(ledger, ANN, S, T, 100, TTL_S)
    with pytest.raises(Conflict):
        await fork_manifest(ledger, ANN, S, T, 100, TTL_S)


async def test_deleting_what_is_not_there_still_says_that_its_blobs_may_go(ledger):
    assert await ledger.delete_manifest(ANN, S) == [S]


async def test_tenants_are_known_by_their_tags_while_they_have_leases(ledger):
    at = await begun(ledger)
    await publish(ledger, at.epoch, at)
    assert await ledger.list_tenants() == {TAG: ANN}
    await ledger.delete_manifest(ANN, S)
    assert await ledger.list_tenants() == {}


async def test_smaller_manifest_gives_bytes_back(ledger):
    at = await begun(ledger)
    await publish(ledger, at.epoch, at, 5000)
    await publish(ledger, at.epoch, replace(at, version=1), 200)
    assert await stored(ledger) == 200


async def test_wrong_sum_is_mended_and_stated(store, clock, request):
    at = await begun(store.ledger)
    await publish(store.ledger, at.epoch, at)
    assert (await store.ledger.settle(ANN)).drift_bytes == 0
    if isinstance(store, RedisStateStore):
        with Redis.from_url(request.getfixturevalue("state_url")) as client:
            client.incrby("kvs:{tenant:ann}:sum", 77)
        settled = await store.ledger.settle(ANN)
        assert (settled.drift_bytes, await stored(store.ledger)) == (77, 1000)


async def test_two_hundred_sessions_created_used_forked_and_closed_leave_nothing(store, request):
    ledger = store.ledger
    for number in range(100):
        session_id, fork_id = SessionId(f"s{number}"), SessionId(f"f{number}")
        await ledger.reserve_bytes(ANN, f"r{number}", 60, TTL_S)
        at = await begun(ledger, session_id)
        await publish(ledger, at.epoch, at, 50, session_id, reservation_id=f"r{number}")
        await fork_manifest(ledger, ANN, session_id, fork_id, 100, TTL_S)
        await begun(ledger, fork_id)
    leases = await ledger.list_leases(ANN)
    assert len(leases) == 200
    assert (
        await ledger.renew_leases(W, [Held(ANN, each.session_id, each.position.epoch) for each in leases], TTL_S) == []
    )
    assert await stored(ledger) == 5000
    for lease in leases:
        await ledger.delete_manifest(ANN, lease.session_id)
    assert (await stored(ledger), await ledger.list_tenants()) == (0, {})
    if isinstance(store, RedisStateStore):
        with Redis.from_url(request.getfixturevalue("state_url")) as client:
            assert client.keys("*") == [b"kvs:{fleet}:epoch"]
