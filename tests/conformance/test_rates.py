"""What every rate store must do, run on each."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest

from kvservice.store.rates import MemoryRateStore, Meter, Quota, RateStore, RedisRateStore
from kvservice.types import TenantId

ANN, BOB = TenantId("ann"), TenantId("bob:{rate:ann}")
TTL_S = 60.0


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "redis"])
async def rates(request, clock) -> AsyncIterator[RateStore]:
    opened: RateStore = (
        MemoryRateStore(clock)
        if request.param == "memory"
        else RedisRateStore(request.getfixturevalue("state_url"), clock=clock)
    )
    yield opened
    await opened.aclose()


async def take(rates: RateStore, tenant: TenantId = ANN, per_minute: float = 3.0) -> float:
    return await rates.draw(tenant, Meter.REQUESTS, per_minute, needed=1.0, drawn=1.0)


async def test_a_bucket_gives_what_a_minute_allows_and_then_says_how_long_to_wait(rates, clock) -> None:
    assert [await take(rates) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert await take(rates) == pytest.approx(20.0, abs=0.01)
    clock.now += 19.0
    assert await take(rates) == pytest.approx(1.0, abs=0.01)
    clock.now += 1.01
    assert await take(rates) == 0.0
    assert await take(rates) > 0
    # After a long rest no more than a minute's worth.
    clock.now += 3600.0
    assert [await take(rates) > 0 for _ in range(4)] == [False, False, False, True]


async def test_what_was_charged_beyond_the_bucket_is_owed(rates, clock) -> None:
    async def may_begin() -> float:
        return await rates.draw(ANN, Meter.TOKENS, 600.0, needed=1.0, drawn=0.0)

    assert await may_begin() == 0.0
    await rates.charge(ANN, Meter.TOKENS, 600.0, 1000.0)
    assert await may_begin() == pytest.approx(40.1, abs=0.01)
    clock.now += 41.0
    assert await may_begin() == 0.0


async def test_less_than_one_a_minute_is_one_now_and_then(rates, clock) -> None:
    assert await take(rates, per_minute=0.5) == 0.0
    assert await take(rates, per_minute=0.5) == pytest.approx(120.0, abs=0.1)


async def test_tenants_have_buckets_of_their_own(rates) -> None:
    for _ in range(3):
        await take(rates)
    assert await take(rates) > 0
    assert await take(rates, BOB) == 0.0


async def test_as_many_calls_run_as_may_until_they_end_or_lapse(rates, clock) -> None:
    assert await rates.begin_call(ANN, "a", 2, TTL_S)
    assert await rates.begin_call(ANN, "b", 2, TTL_S)
    assert not await rates.begin_call(ANN, "c", 2, TTL_S)
    assert await rates.begin_call(BOB, "c", 2, TTL_S)
    # Renewal is no further call.
    assert await rates.begin_call(ANN, "a", 2, TTL_S)
    await rates.end_call(ANN, "b")
    assert await rates.begin_call(ANN, "c", 2, TTL_S)
    clock.now += TTL_S + 1
    assert await rates.begin_call(ANN, "d", 1, TTL_S)


async def test_limits_are_kept_replaced_and_taken_away(rates) -> None:
    assert await rates.quota(ANN) == Quota()
    quota = Quota(requests_per_minute=1.5, concurrent_calls=2)
    await rates.set_quota(ANN, quota)
    await rates.set_quota(BOB, Quota(tokens_per_minute=10.0, document_tokens=7))
    assert await rates.quota(ANN) == quota
    assert (await rates.quota(BOB)).document_tokens == 7
    assert await rates.tenants() == [ANN, BOB]
    await rates.set_quota(ANN, Quota())
    assert await rates.quota(ANN) == Quota()
    assert await rates.tenants() == [BOB]


def test_a_tenants_own_limits_go_before_the_defaults() -> None:
    defaults = Quota(requests_per_minute=5.0, concurrent_calls=1)
    assert Quota(requests_per_minute=9.0).over(defaults) == Quota(requests_per_minute=9.0, concurrent_calls=1)
