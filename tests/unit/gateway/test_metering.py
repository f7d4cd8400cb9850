"""What calls have used is written down once, and adds up to what was charged."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from kvservice.client import Client
from kvservice.errors import KVServiceError, Unavailable
from kvservice.gateway.metering import Metering
from kvservice.internal.v1 import worker_pb2
from kvservice.store.ledger import TenantBytes
from kvservice.store.usage import MemoryUsageLog, UsageKind, UsageRecord
from kvservice.types import Role, TenantId, Usage
from tests.unit.gateway.conftest import Service, eventually, keys, running

KEYS = keys(("ann-key", "ann", Role.TENANT), ("bob-key", "bob", Role.TENANT), ("ops-key", "ops", Role.OPERATOR))
FAILS = worker_pb2.Failure(code="INTERNAL", reason="internal", message="it broke")


async def records(service: Service) -> list:
    ops = await service.client("ops-key")
    found, _ = await ops.usage()
    return list(found)


async def test_a_request_that_is_made_twice_is_written_down_once() -> None:
    async with running(api_keys=KEYS) as service:
        ann = await service.client("ann-key")
        session = await ann.create_session()
        for _ in range(2):
            await ann.append(session.session_id, "document", request_id="r1")
        for _ in range(2):
            await ann.ask(session.session_id, "q?", request_id="r2", max_new_tokens=3)
        append, answer = await records(service)
        assert (append.kind, append.tenant, append.record_id) == ("call", "ann", "r1")
        assert append.usage == Usage(prompt_tokens=8)
        assert (answer.record_id, answer.session_id, answer.model) == ("r2", session.session_id, "toy")
        assert answer.usage == Usage(cached_tokens=8, prompt_tokens=2, completion_tokens=3)


async def test_what_fails_is_told_apart_and_its_repeat_is_the_request() -> None:
    async with running(api_keys=KEYS) as service:
        ann = await service.client("ann-key")
        session = await ann.create_session()
        service.worker.failures.append(FAILS)
        with pytest.raises(KVServiceError):
            await ann.ask(session.session_id, "q?", request_id="r", max_new_tokens=3)
        await ann.ask(session.session_id, "q?", request_id="r", max_new_tokens=3)
        cut, answer = await records(service)
        assert (cut.kind, answer.kind) == ("cut_short", "call")
        assert cut.usage == Usage(prompt_tokens=2, completion_tokens=3)
        assert cut.record_id != answer.record_id == "r"


async def test_pages_go_on_where_the_last_ended() -> None:
    async with running(api_keys=KEYS) as service:
        ann, ops = await service.client("ann-key"), await service.client("ops-key")
        session = await ann.create_session()
        await ann.append(session.session_id, "one")
        first, cursor = await ops.usage()
        assert len(first) == 1
        await ann.append(session.session_id, "two")
        second, cursor = await ops.usage(cursor)
        assert len(second) == 1
        assert await ops.usage(cursor) == ((), cursor)


async def test_a_closed_sessions_last_bytes_are_its_own() -> None:
    async with running(api_keys=KEYS) as service:
        service.worker.released_byte_s = (7.0, 9.0)
        ann = await service.client("ann-key")
        session = await ann.create_session()
        await ann.close_session(session.session_id)
        (end,) = await records(service)
        assert (end.kind, end.session_id) == ("session_end", session.session_id)
        assert (end.device_byte_s, end.host_byte_s) == (7.0, 9.0)


@pytest.mark.parametrize("seed", range(3))
async def test_the_sums_are_what_tenants_were_charged_whatever_happens_to_calls(seed: int) -> None:
    chance = random.Random(seed)
    async with running(api_keys=KEYS) as service:
        service.worker.done_byte_s = (2.0, 3.0)
        clients = {name: await service.client(f"{name}-key") for name in ("ann", "bob")}
        sessions = {name: await client.create_session() for name, client in clients.items()}
        asked: set[tuple[str, str]] = set()
        for _ in range(25):
            name = chance.choice(["ann", "bob"])
            if chance.random() < 0.3:
                service.worker.failures.append(FAILS)
            request_id = f"r{chance.randrange(8)}"
            asked.add((name, request_id))
            try:
                await _one_call(clients[name], sessions[name].session_id, request_id)
            except KVServiceError:
                continue
        stats = {each.tenant: each for each in (await (await service.client("ops-key")).stats()).tenants}
        found = await records(service)
        for name in clients:
            own = [record for record in found if record.tenant == name]
            tokens = sum(record.usage.prompt_tokens + record.usage.completion_tokens for record in own)
            assert tokens == stats[name].tokens
        ended = Counter((record.tenant, record.record_id) for record in found if record.kind == "call")
        assert set(ended.values()) == {1}
        assert set(ended) <= asked
        assert sum(record.device_byte_s for record in found) == 2.0 * len(ended)


async def _one_call(client: Client, session_id: str, request_id: str) -> None:
    # The request is a function of its id, so that a repeat is one.
    if int(request_id[1:]) % 2:
        await client.append(session_id, "d" * int(request_id[1:]), request_id=request_id)
    else:
        await client.ask(session_id, "q", request_id=request_id, max_new_tokens=int(request_id[1:]) + 1)


class FailingLog(MemoryUsageLog):
    def __init__(self) -> None:
        super().__init__()
        self.is_away = True

    async def append(self, record: UsageRecord) -> bool:
        if self.is_away:
            raise Unavailable("away")
        return await super().append(record)


def record(name: str) -> UsageRecord:
    return UsageRecord(UsageKind.CALL, TenantId("ann"), name, 1.0)


async def test_records_wait_for_a_store_that_is_away() -> None:
    log = FailingLog()
    metering = Metering(log, lambda: 0.0)
    for name in "ab":
        await metering.write(record(name))
    assert await log.read("", 10) == ([], "0-0")
    log.is_away = False
    await metering.write(record("c"))
    assert [each.record_id for each in (await log.read("", 10))[0]] == ["a", "b", "c"]


class Stored:
    """As much of a ledger as is looked at."""

    async def list_tenants(self) -> dict[bytes, TenantId]:
        return {b"1": TenantId("ann"), b"2": TenantId("bob")}

    async def tenant_bytes(self, tenant: TenantId) -> TenantBytes:
        return TenantBytes(50 if tenant == "ann" else 0, 7, 1000)


async def test_a_period_of_stored_bytes_is_written_down_once_however_many_gateways_look() -> None:
    log = MemoryUsageLog()
    for now in (1000.0, 1010.0, 1061.0):
        await Metering(log, lambda now=now: now).sample_stored(Stored(), 60.0)  # type: ignore[misc, arg-type]
    found, _ = await log.read("", 10)
    assert [(each.kind, each.tenant, each.redis_byte_s) for each in found] == [(UsageKind.STORED, "ann", 3000.0)] * 2


async def test_a_call_that_its_caller_left_is_written_down() -> None:
    async with running(api_keys=KEYS) as service:
        ann = await service.client("ann-key")
        session = await ann.create_session()
        service.worker.pause_after = 3
        answer = asyncio.create_task(ann.ask(session.session_id, "four", max_new_tokens=10))
        await service.worker.wait_for("submits")
        await asyncio.wait([answer], timeout=0.2)
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)

        async def written() -> bool:
            return [each.usage for each in await records(service)] == [Usage(prompt_tokens=4, completion_tokens=3)]

        await eventually(written)
