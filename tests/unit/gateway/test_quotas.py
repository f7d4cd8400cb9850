from __future__ import annotations

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from kvservice.client import Client
from kvservice.config.gateway import QuotaConfig
from kvservice.errors import LimitExceeded, QuotaExceeded
from kvservice.internal.v1 import worker_pb2
from kvservice.store.rates import RedisRateStore
from kvservice.types import Role
from kvservice.v1 import admin_pb2, admin_pb2_grpc, sessions_pb2, sessions_pb2_grpc
from tests.unit.gateway.conftest import Service, eventually, keys, running

KEYS = keys(("ann-key", "ann", Role.TENANT), ("bob-key", "bob", Role.TENANT), ("ops-key", "ops", Role.OPERATOR))


async def set_quota(service: Service, **limits: float) -> None:
    stub = admin_pb2_grpc.AdminServiceStub(await service.channel())
    request = admin_pb2.SetQuotaRequest(tenant="ann", **limits)
    await stub.SetQuota(request, metadata=(("authorization", "Bearer ops-key"),))


async def test_requests_beyond_the_minute_are_refused_with_quota_and_time() -> None:
    async with running(api_keys=KEYS) as service:
        await set_quota(service, requests_per_minute=2)
        ann, bob = await service.client("ann-key"), await service.client("bob-key")
        await ann.list_models()
        session = await ann.create_session()
        with pytest.raises(QuotaExceeded) as caught:
            await ann.get(session.session_id)
        assert caught.value.retryable
        assert caught.value.metadata == {"quota": "requests_per_minute"}
        assert caught.value.retry_after_s == pytest.approx(30.0, abs=0.1)
        # The details that any client understands.
        stub = sessions_pb2_grpc.SessionServiceStub(await service.channel())
        with pytest.raises(grpc.aio.AioRpcError) as raw:
            await stub.List(sessions_pb2.ListRequest(), metadata=(("authorization", "Bearer ann-key"),))
        failure = error_details_pb2.QuotaFailure()
        assert any(detail.Unpack(failure) for detail in rpc_status.from_call(raw.value).details)
        assert [violation.subject for violation in failure.violations] == ["requests_per_minute"]
        # Nobody else is touched, and time heals.
        for _ in range(3):
            await bob.list_models()
        service.clock.now += 31
        await ann.list_models()


async def test_tokens_are_paid_at_the_end_and_debts_hold_back_the_next_call() -> None:
    async with running(api_keys=KEYS) as service:
        await set_quota(service, tokens_per_minute=60)
        ann = await service.client("ann-key")
        session = await ann.create_session()
        await ann.append(session.session_id, "x" * 90)
        with pytest.raises(QuotaExceeded, match="60 tokens a minute"):
            await ann.ask(session.session_id, "q", max_new_tokens=1)
        assert len(service.worker.submits) == 1
        # 30 are owed, one must be left.
        service.clock.now += 32
        await ann.ask(session.session_id, "q", max_new_tokens=1)


async def test_a_call_that_is_cut_short_pays_for_what_was_computed() -> None:
    async with running(api_keys=KEYS) as service:
        await set_quota(service, tokens_per_minute=1000)
        ann, ops = await service.client("ann-key"), await service.client("ops-key")
        session = await ann.create_session()
        service.worker.pause_after = 3
        answer = asyncio.create_task(ann.ask(session.session_id, "four", max_new_tokens=10))
        await service.worker.wait_for("submits")
        await asyncio.wait([answer], timeout=0.2)
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)

        async def charged() -> bool:
            stats = await tenants(service)
            return stats["ann"].tokens == 7 and stats["ann"].running_calls == 0

        await eventually(charged)
        del ops


async def tenants(service: Service) -> dict[str, admin_pb2.TenantStats]:
    stub = admin_pb2_grpc.AdminServiceStub(await service.channel())
    stats = await stub.GetStats(admin_pb2.GetStatsRequest(), metadata=(("authorization", "Bearer ops-key"),))
    return {each.tenant: each for each in stats.tenants}


async def test_as_many_calls_run_as_may_and_one_that_ends_makes_room() -> None:
    async with running(api_keys=KEYS) as service:
        await set_quota(service, concurrent_calls=1)
        ann = await service.client("ann-key")
        one, two = await ann.create_session(), await ann.create_session()
        service.worker.pause_after = 1
        answer = asyncio.create_task(ann.ask(one.session_id, "q", max_new_tokens=2))
        await service.worker.wait_for("submits")
        with pytest.raises(QuotaExceeded, match="1 calls of this tenant are running") as caught:
            await ann.ask(two.session_id, "q", max_new_tokens=2)
        assert caught.value.metadata == {"quota": "concurrent_calls"}
        service.worker.go.set()
        await answer
        await ann.ask(two.session_id, "q", max_new_tokens=2)


async def test_a_document_beyond_the_tenants_size_is_refused_for_good() -> None:
    async with running(api_keys=KEYS) as service:
        await set_quota(service, document_tokens=10)
        ann, bob = await service.client("ann-key"), await service.client("bob-key")
        session = await ann.create_session()
        with pytest.raises(LimitExceeded, match="may have 10") as caught:
            await ann.append(session.session_id, "x" * 11)
        assert not caught.value.retryable
        await ann.append(session.session_id, "x" * 10)
        theirs = await bob.create_session()
        await bob.append(theirs.session_id, "x" * 11)


async def test_as_many_sessions_as_may_be_are_open_and_one_that_is_closed_makes_room() -> None:
    async with running(api_keys=KEYS) as service:
        await set_quota(service, sessions=2)
        ann = await service.client("ann-key")
        first = await ann.create_session()
        await ann.fork_session(first.session_id)
        for refused in (ann.create_session(), ann.fork_session(first.session_id)):
            with pytest.raises(LimitExceeded, match="2 open sessions") as caught:
                await refused
            assert caught.value.metadata == {"quota": "sessions"}
        await ann.close_session(first.session_id)
        await ann.create_session()
        assert (await tenants(service))["ann"].refused == 2


async def test_sessions_that_have_expired_count_no_more() -> None:
    async with running(api_keys=KEYS) as service:
        await set_quota(service, sessions=1)
        ann = await service.client("ann-key")
        await ann.create_session(ttl_s=60)
        service.clock.now += 61
        await ann.create_session()


async def test_a_workers_refusal_for_a_tenants_bytes_reaches_the_caller_with_quota_and_time() -> None:
    async with running(api_keys=KEYS) as service:
        ann = await service.client("ann-key")
        session = await ann.create_session()
        service.worker.refusals.append(
            worker_pb2.Failure(
                code="RESOURCE_EXHAUSTED",
                reason="quota_exceeded",
                message="too many bytes",
                retryable=True,
                quota="device_bytes",
            )
        )
        with pytest.raises(QuotaExceeded, match="too many bytes") as caught:
            await ann.append(session.session_id, "x")
        assert caught.value.metadata == {"quota": "device_bytes"}
        assert caught.value.retry_after_s is not None
        assert (await tenants(service))["ann"].refused == 1
        # It doesn't wait in line for what only its own calls can free.
        assert len(service.worker.submits) == 1


async def test_an_operator_sees_what_one_tenant_has_stored_and_may_have() -> None:
    async with running(api_keys=KEYS) as service:
        await set_quota(service, redis_bytes=1000, weight=2.5, device_bytes=7)
        ops = await service.client("ops-key")
        (ann,) = (await ops.stats("ann")).tenants
        assert (ann.stored_bytes, ann.redis_bytes, ann.weight, ann.device_bytes) == (0, 1000, 2.5, 7)
        await set_quota(service, weight=0, device_bytes=0, redis_bytes=0)
        (ann,) = (await ops.stats("ann")).tenants
        assert (ann.weight, ann.device_bytes) == (1.0, None)


async def test_defaults_hold_for_tenants_without_limits_and_0_goes_back_to_them() -> None:
    async with running(api_keys=KEYS, quota=QuotaConfig(document_tokens=5)) as service:
        ann = await service.client("ann-key")
        session = await ann.create_session()
        with pytest.raises(LimitExceeded):
            await ann.append(session.session_id, "123456")
        await set_quota(service, document_tokens=6)
        await ann.append(session.session_id, "123456")
        await set_quota(service, document_tokens=0)
        with pytest.raises(LimitExceeded):
            await ann.append(session.session_id, "123456")
        stats = await tenants(service)
        assert stats["ann"].document_tokens == 5
        assert not stats["ann"].HasField("requests_per_minute")
        assert stats["ann"].requests == 4


async def test_two_gateways_count_together(state_url: str) -> None:
    from kvservice.gateway.server import Gateway
    from kvservice.store.memory import MemoryStateStore
    from tests.unit.gateway.conftest import config

    rates = RedisRateStore(state_url)
    quota = QuotaConfig(requests_per_minute=3)
    gateways = [Gateway(config(quota=quota), MemoryStateStore(), KEYS, rates=rates) for _ in range(2)]
    addresses = [await gateway.start() for gateway in gateways]
    try:
        async with Client(addresses[0], "ann-key") as one, Client(addresses[1], "ann-key") as two:
            for client in (one, two, one):
                await client.list_models()
            with pytest.raises(QuotaExceeded):
                async with asyncio.timeout(5):
                    await Client(addresses[1], "ann-key", retry=_once()).list_models()
    finally:
        for gateway in gateways:
            await gateway.stop()
        await rates.aclose()


def _once():
    from tests.unit.gateway.conftest import ONCE

    return ONCE
