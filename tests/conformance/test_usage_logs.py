"""What every usage log must do, run on each."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvservice.errors import InvalidRequest
from kvservice.store.usage import MemoryUsageLog, RedisUsageLog, UsageKind, UsageLog, UsageRecord
from kvservice.types import TenantId, Usage

ANN = TenantId("ann:call")


@pytest.fixture(params=["memory", "redis"])
async def log(request) -> AsyncIterator[UsageLog]:
    opened: UsageLog = (
        MemoryUsageLog() if request.param == "memory" else RedisUsageLog(request.getfixturevalue("state_url"))
    )
    yield opened
    await opened.aclose()


def record(name: str, tenant: TenantId = ANN, kind: UsageKind = UsageKind.CALL) -> UsageRecord:
    usage = Usage(cached_tokens=1, prompt_tokens=2, completion_tokens=3, recomputed_tokens=4, reused_tokens=5)
    return UsageRecord(kind, tenant, name, 1234.5, "session", "toy", usage, 0.125, 1e15, 2.5)


async def test_records_come_back_as_they_were_in_order_and_in_pages(log) -> None:
    written = [record(f"r{number} ü\n") for number in range(5)]
    for each in written:
        assert await log.append(each)
    first, cursor = await log.read("", 3)
    second, cursor = await log.read(cursor, 3)
    assert first + second == written
    assert await log.read(cursor, 3) == ([], cursor)
    await log.append(record("more"))
    assert (await log.read(cursor, 3))[0] == [record("more")]


async def test_a_second_record_of_an_id_is_dropped(log) -> None:
    assert await log.append(record("r"))
    assert not await log.append(record("r"))
    # Of another tenant, or kind, it is another; no name makes another's.
    assert await log.append(record("r", TenantId("bob")))
    assert await log.append(record("r", kind=UsageKind.CUT_SHORT))
    assert await log.append(record("call:r", TenantId("ann")))
    assert len((await log.read("", 10))[0]) == 4


@pytest.mark.parametrize("cursor", ["x", "1", "1-2-3", "-", "(1-0", "9" * 30 + "-0", "+"])
async def test_what_is_no_cursor_is_refused(log, cursor: str) -> None:
    with pytest.raises(InvalidRequest, match="cursor"):
        await log.read(cursor, 10)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "a:b", ""]), st.sampled_from(["r", "s", "b:r"])), max_size=12))
async def test_each_id_counts_once_in_the_sums(names) -> None:
    log = MemoryUsageLog()
    for tenant, name in names:
        await log.append(record(name, TenantId(tenant)))
    found, _ = await log.read("", 100)
    assert sorted((each.tenant, each.record_id) for each in found) == sorted(set(names))
