"""What every state store must do, run on each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
from redis import Redis

from kvservice.errors import Conflict, InvalidRequest, LimitExceeded, NotFound
from kvservice.store.base import Begun, InProgress, Replay, SessionRecord, StateStore, WorkerRecord
from kvservice.store.memory import MemoryStateStore
from kvservice.store.redis import RedisStateStore
from kvservice.types import OnMiss, PromptFormat, Reached, SessionId, TenantId, WorkerId

ANN, BOB = TenantId("ann"), TenantId("bob")
TTL_S = 100.0
LEASE_S = 60.0
SHORT_S = 5.0


class Clock:
    """Unix seconds that stand still until they are told to move."""

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
        opened: StateStore = MemoryStateStore(clock)
    else:
        opened = RedisStateStore(request.getfixturevalue("state_url"), clock=clock)
    yield opened
    await opened.aclose()


def record(session_id: str, clock: Clock, tenant: TenantId = ANN, **changes: object) -> SessionRecord:
    made = SessionRecord(
        session_id=SessionId(session_id),
        tenant=tenant,
        model="smollm2-135m",
        recipe="recall",
        prompt_format=PromptFormat.CHAT,
        on_miss=OnMiss.FAIL,
        ttl_s=TTL_S,
        created_at=clock(),
        expires_at=clock() + TTL_S,
        token_ids=(0, 1, 49151, 2**32 - 1),
        worker_id="w",
        worker_epoch=3,
        last_error="it was late: ümläut",
        reached=Reached(4, ((1, 2), (3, 4))),
    )
    return replace(made, **changes)


@pytest.fixture
def lapse(request, store, clock) -> Callable[[], None]:
    """Lets what lives for SHORT_S come to its end: by our clock, or as a server does by its own."""

    def by_clock() -> None:
        clock.now += SHORT_S

    def by_server() -> None:
        with Redis.from_url(request.getfixturevalue("state_url")) as client:
            for key in client.scan_iter():
                if 0 <= client.pttl(key) <= SHORT_S * 1000:
                    client.delete(key)

    return by_server if isinstance(store, RedisStateStore) else by_clock


async def test_no_more_sessions_of_a_tenant_are_kept_than_may_be(store, clock) -> None:
    await store.create_session(record("other", clock, tenant=BOB), at_most=1)
    tries = (store.create_session(record(f"s{number}", clock), at_most=3) for number in range(8))
    answers = await asyncio.gather(*tries, return_exceptions=True)
    assert [isinstance(answer, LimitExceeded) for answer in answers].count(False) == 3
    listed = await store.list_sessions(ANN, after="", limit=9)
    assert len(listed) == 3
    await store.delete_session(listed[0].session_id)
    await store.create_session(record("s9", clock), at_most=3)


async def test_session_comes_back_as_it_was_written(store, clock):
    written = record("s", clock)
    kept = await store.create_session(written)
    assert replace(kept, version=0, durable_tokens=0) == written
    assert kept.version == 1
    assert await store.get_session(SessionId("s")) == kept


async def test_session_without_tokens_comes_back(store, clock):
    kept = await store.create_session(record("s", clock, token_ids=()))
    assert await store.get_session(SessionId("s")) == kept


async def test_long_session_comes_back(store, clock):
    tokens = tuple(range(40_000))
    await store.create_session(record("s", clock, token_ids=tokens))
    assert (await store.get_session(SessionId("s"))).token_ids == tokens


async def test_unknown_session_is_none(store):
    assert await store.get_session(SessionId("nobody")) is None


async def test_session_id_can_be_taken_once(store, clock):
    kept = await store.create_session(record("s", clock))
    with pytest.raises(Conflict, match="exists already"):
        await store.create_session(record("s", clock, tenant=BOB))
    assert await store.get_session(SessionId("s")) == kept


async def test_update_moves_the_version_by_one(store, clock):
    first = await store.create_session(record("s", clock))
    second = await store.update_session(replace(first, token_ids=(1, 2, 3), last_error=""))
    assert (second.version, second.token_ids) == (2, (1, 2, 3))
    assert await store.get_session(SessionId("s")) == second


async def test_update_of_an_older_version_is_refused_and_changes_nothing(store, clock):
    first = await store.create_session(record("s", clock))
    second = await store.update_session(replace(first, token_ids=(1,)))
    with pytest.raises(Conflict, match="version 2, not 1"):
        await store.update_session(replace(first, token_ids=(9,)))
    assert await store.get_session(SessionId("s")) == second


async def test_of_many_updates_at_once_one_wins(store, clock):
    first = await store.create_session(record("s", clock))
    updates = (store.update_session(replace(first, token_ids=(i,))) for i in range(10))
    ends = await asyncio.gather(*updates, return_exceptions=True)
    assert sum(isinstance(end, SessionRecord) for end in ends) == 1
    assert sum(isinstance(end, Conflict) for end in ends) == 9


async def test_update_of_a_deleted_session_is_not_found(store, clock):
    kept = await store.create_session(record("s", clock))
    assert await store.delete_session(SessionId("s"))
    with pytest.raises(NotFound):
        await store.update_session(kept)
    assert await store.get_session(SessionId("s")) is None


async def test_delete_says_whether_there_was_something(store, clock):
    await store.create_session(record("s", clock))
    assert await store.delete_session(SessionId("s")) is True
    assert await store.delete_session(SessionId("s")) is False
    assert await store.list_sessions(ANN, after="", limit=10) == []


async def test_list_has_a_tenants_own_sessions_in_order_page_by_page(store, clock):
    for number in (3, 1, 2, 5, 4):
        await store.create_session(record(f"s{number}", clock))
    await store.create_session(record("s0", clock, tenant=BOB))
    first = await store.list_sessions(ANN, after="", limit=2)
    second = await store.list_sessions(ANN, after=first[-1].session_id, limit=10)
    assert [r.session_id for r in first] == ["s1", "s2"]
    assert [r.session_id for r in second] == ["s3", "s4", "s5"]
    assert first[0] == await store.get_session(SessionId("s1"))
    assert await store.list_sessions(ANN, after="s5", limit=10) == []
    assert await store.list_sessions(TenantId("nobody"), after="", limit=10) == []


async def test_page_is_filled_past_expired_sessions(store, clock):
    for number in range(8):
        expires_at = clock() + (1 if number % 2 else TTL_S)
        await store.create_session(record(f"s{number}", clock, expires_at=expires_at))
    clock.now += 1
    assert [r.session_id for r in await store.list_sessions(ANN, after="", limit=3)] == ["s0", "s2", "s4"]


async def test_tenants_with_awkward_names_do_not_meet(store, clock):
    names = [TenantId(name) for name in ("a:b", "a", "a}:b", "{a}", "a:b}:sessions", "a%3Ab")]
    for number, tenant in enumerate(names):
        await store.create_session(record(f"s{number}", clock, tenant=tenant))
    for number, tenant in enumerate(names):
        assert [r.session_id for r in await store.list_sessions(tenant, after="", limit=9)] == [f"s{number}"]


async def test_expired_session_is_hidden_and_then_swept(store, clock):
    await store.create_session(record("s", clock))
    clock.now += TTL_S
    assert await store.get_session(SessionId("s")) is None
    assert await store.list_sessions(ANN, after="", limit=10) == []
    (expired,) = await store.expired_sessions(clock(), 10)
    assert expired.session_id == "s"
    assert await store.delete_session(SessionId("s"), version=expired.version)
    assert await store.expired_sessions(clock(), 10) == []


async def test_living_session_is_not_swept(store, clock):
    await store.create_session(record("s", clock))
    assert await store.expired_sessions(clock() + TTL_S - 1, 10) == []


async def test_renewed_session_is_not_swept_before_its_new_time(store, clock):
    kept = await store.create_session(record("s", clock))
    await store.update_session(replace(kept, expires_at=kept.expires_at + TTL_S))
    clock.now += TTL_S
    assert await store.expired_sessions(clock(), 10) == []
    assert await store.get_session(SessionId("s")) is not None
    clock.now += TTL_S
    assert [r.session_id for r in await store.expired_sessions(clock(), 10)] == ["s"]


async def test_renewal_moves_the_end_and_the_version_and_nothing_else(store, clock):
    kept = await store.create_session(record("s", clock))
    renewed = await store.renew_session(kept, clock() + 5 * TTL_S)
    assert renewed == replace(kept, expires_at=clock() + 5 * TTL_S, version=2)
    assert await store.get_session(SessionId("s")) == renewed
    clock.now += TTL_S
    assert await store.expired_sessions(clock(), 10) == []


async def test_session_that_a_call_holds_or_that_moved_on_is_not_renewed(store, clock):
    kept = await store.create_session(record("s", clock))
    assert await store.lock_session(SessionId("s"), "call", LEASE_S)
    assert await store.renew_session(kept, clock() + 5 * TTL_S) == kept
    await store.unlock_session(SessionId("s"), "call")
    moved = await store.update_session(kept)
    await store.renew_session(kept, clock() + 5 * TTL_S)
    assert await store.get_session(SessionId("s")) == moved
    await store.delete_session(SessionId("s"))
    await store.renew_session(moved, clock() + 5 * TTL_S)
    assert await store.get_session(SessionId("s")) is None


async def test_existing_sessions_are_told_apart(store, clock):
    await store.create_session(record("s", clock))
    assert await store.existing_sessions([SessionId("s"), SessionId("t")]) == {"s"}
    assert await store.existing_sessions([]) == set()


async def test_expired_session_that_a_call_holds_is_not_swept_and_can_be_renewed(store, clock):
    kept = await store.create_session(record("s", clock))
    assert await store.lock_session(SessionId("s"), "call", 1000)
    clock.now += TTL_S
    assert await store.expired_sessions(clock(), 10) == []
    assert not await store.delete_session(SessionId("s"), version=kept.version)
    renewed = await store.update_session(replace(kept, expires_at=clock() + TTL_S))
    await store.unlock_session(SessionId("s"), "call")
    assert await store.get_session(SessionId("s")) == renewed


async def test_sweeper_does_not_delete_a_session_renewed_since_it_was_listed(store, clock):
    kept = await store.create_session(record("s", clock))
    clock.now += TTL_S
    (expired,) = await store.expired_sessions(clock(), 10)
    await store.update_session(replace(kept, expires_at=clock() + TTL_S))
    assert not await store.delete_session(SessionId("s"), version=expired.version)
    assert await store.get_session(SessionId("s")) is not None


async def test_sweep_has_no_more_than_it_asked_for(store, clock):
    for number in range(5):
        await store.create_session(record(f"s{number}", clock))
    clock.now += TTL_S
    assert len(await store.expired_sessions(clock(), 3)) == 3


async def test_lock_has_one_owner_who_may_renew_it(store):
    session = SessionId("s")
    assert await store.lock_session(session, "a", LEASE_S)
    assert await store.lock_session(session, "a", LEASE_S)
    assert not await store.lock_session(session, "b", LEASE_S)
    assert await store.lock_session(SessionId("t"), "b", LEASE_S)


async def test_lock_is_given_back_by_its_owner_only(store):
    session = SessionId("s")
    await store.lock_session(session, "a", LEASE_S)
    await store.unlock_session(session, "b")
    assert not await store.lock_session(session, "b", LEASE_S)
    await store.unlock_session(session, "a")
    assert await store.lock_session(session, "b", LEASE_S)
    await store.unlock_session(session, "a")
    assert not await store.lock_session(session, "a", LEASE_S)


async def test_lapsed_lock_can_be_taken_by_another(store, lapse):
    assert await store.lock_session(SessionId("s"), "a", SHORT_S)
    lapse()
    assert await store.lock_session(SessionId("s"), "b", LEASE_S)


async def test_renewed_lock_lives_longer(store, lapse):
    await store.lock_session(SessionId("s"), "a", SHORT_S)
    await store.lock_session(SessionId("s"), "a", LEASE_S)
    lapse()
    assert not await store.lock_session(SessionId("s"), "b", LEASE_S)


async def test_of_many_that_lock_at_once_one_wins(store):
    ends = await asyncio.gather(*(store.lock_session(SessionId("s"), f"o{i}", LEASE_S) for i in range(10)))
    assert sum(ends) == 1


async def test_request_is_begun_once_then_in_progress_then_replayed(store):
    assert await store.begin_request(ANN, "r", b"digest", LEASE_S) == Begun()
    assert await store.begin_request(ANN, "r", b"digest", LEASE_S) == InProgress()
    messages = [b"", b"one", bytes(range(256))]
    await store.finish_request(ANN, "r", messages, LEASE_S)
    assert await store.begin_request(ANN, "r", b"digest", LEASE_S) == Replay(tuple(messages))


@pytest.mark.parametrize("count", [0, 20_000])
async def test_answers_of_any_length_are_replayed(store, count):
    messages = tuple(b"%d" % i for i in range(count))
    await store.begin_request(ANN, "r", b"digest", LEASE_S)
    await store.finish_request(ANN, "r", messages, LEASE_S)
    assert await store.begin_request(ANN, "r", b"digest", LEASE_S) == Replay(messages)


async def test_request_id_of_another_request_is_refused(store):
    await store.begin_request(ANN, "r", b"digest", LEASE_S)
    with pytest.raises(InvalidRequest) as caught:
        await store.begin_request(ANN, "r", b"other", LEASE_S)
    assert (caught.value.reason, caught.value.field) == ("request_id_reused", "request_id")


async def test_request_ids_are_each_tenants_own(store):
    assert await store.begin_request(TenantId("a:b"), "c", b"1", LEASE_S) == Begun()
    assert await store.begin_request(TenantId("a"), "b:c", b"2", LEASE_S) == Begun()


async def test_forgotten_request_may_be_made_again(store):
    await store.begin_request(ANN, "r", b"digest", LEASE_S)
    await store.forget_request(ANN, "r")
    assert await store.begin_request(ANN, "r", b"other", LEASE_S) == Begun()


async def test_lapsed_claim_may_be_made_again(store, lapse):
    await store.begin_request(ANN, "r", b"digest", SHORT_S)
    lapse()
    await store.finish_request(ANN, "r", [b"too late"], LEASE_S)
    assert await store.begin_request(ANN, "r", b"digest", LEASE_S) == Begun()


async def test_claim_is_renewed_by_its_owner_alone_and_only_until_it_is_answered(store):
    await store.begin_request(ANN, "r", b"digest", LEASE_S, owner="one")
    assert await store.renew_request(ANN, "r", LEASE_S, owner="one")
    assert not await store.renew_request(ANN, "r", LEASE_S, owner="two")
    assert not await store.renew_request(ANN, "another", LEASE_S, owner="one")
    await store.finish_request(ANN, "r", [b"x"], LEASE_S, owner="one")
    assert not await store.renew_request(ANN, "r", LEASE_S, owner="one")


async def test_owner_that_comes_back_late_touches_nothing_of_the_next_one(store, lapse):
    await store.begin_request(ANN, "r", b"digest", SHORT_S, owner="frozen")
    lapse()
    await store.begin_request(ANN, "r", b"digest", LEASE_S, owner="next")
    await store.forget_request(ANN, "r", owner="frozen")
    await store.finish_request(ANN, "r", [b"late"], LEASE_S, owner="frozen")
    assert await store.begin_request(ANN, "r", b"digest", LEASE_S) == InProgress()
    await store.finish_request(ANN, "r", [b"right"], LEASE_S, owner="next")
    await store.forget_request(ANN, "r", owner="frozen")
    assert await store.begin_request(ANN, "r", b"digest", LEASE_S) == Replay((b"right",))


async def test_answer_outlives_its_claim(store, lapse):
    await store.begin_request(ANN, "r", b"digest", SHORT_S)
    await store.finish_request(ANN, "r", [b"x"], LEASE_S)
    lapse()
    assert await store.begin_request(ANN, "r", b"digest", LEASE_S) == Replay((b"x",))


async def test_of_many_that_begin_at_once_one_wins(store):
    ends = await asyncio.gather(*(store.begin_request(ANN, "r", b"d", LEASE_S) for _ in range(10)))
    assert sum(isinstance(end, Begun) for end in ends) == 1


async def test_epochs_grow(store):
    epochs = [await store.next_epoch() for _ in range(3)]
    assert epochs == sorted(set(epochs))


async def test_workers_are_listed_while_their_lease_holds(store, lapse):
    first = WorkerRecord(WorkerId("w1"), "127.0.0.1:1", 1)
    second = WorkerRecord(WorkerId("w2"), "127.0.0.1:2", 2)
    await store.register_worker(second, LEASE_S)
    await store.register_worker(first, SHORT_S)
    assert await store.list_workers() == [first, second]
    lapse()
    assert await store.list_workers() == [second]
    assert await store.list_workers() == [second]
    assert not await store.renew_worker(WorkerId("w1"), 1, LEASE_S)
    await store.register_worker(first, LEASE_S)
    assert await store.list_workers() == [first, second]


async def test_renewed_lease_lives_longer(store, lapse):
    worker = WorkerRecord(WorkerId("w"), "127.0.0.1:1", 1)
    await store.register_worker(worker, SHORT_S)
    assert await store.renew_worker(WorkerId("w"), 1, LEASE_S)
    lapse()
    assert await store.list_workers() == [worker]


async def test_later_life_of_a_worker_takes_the_place_of_the_earlier(store):
    earlier = WorkerRecord(WorkerId("w"), "127.0.0.1:1", 1)
    later = WorkerRecord(WorkerId("w"), "127.0.0.1:2", 2)
    await store.register_worker(earlier, LEASE_S)
    await store.register_worker(later, LEASE_S)
    with pytest.raises(Conflict, match="epoch 2"):
        await store.register_worker(earlier, LEASE_S)
    assert not await store.renew_worker(WorkerId("w"), 1, LEASE_S)
    await store.unregister_worker(WorkerId("w"), 1)
    assert await store.list_workers() == [later]
    await store.unregister_worker(WorkerId("w"), 2)
    assert await store.list_workers() == []
