"""Several tenants at one gateway: who is asked for first, and who needn't wait."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import grpc
import pytest

from kvservice.client.errors import error_from_rpc
from kvservice.config.gateway import QuotaConfig
from kvservice.errors import DeadlineExceeded, Overloaded
from kvservice.internal.v1 import worker_pb2
from kvservice.types import Load, Role
from kvservice.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.unit.gateway.conftest import Service, eventually, keys, running
from tests.unit.gateway.fake_worker import OVERLOADED, ROOMY, FakeWorker

KEYS = keys(("ann-key", "ann", Role.TENANT), ("bob-key", "bob", Role.TENANT), ("ops-key", "ops", Role.OPERATOR))
OPS = (("authorization", "Bearer ops-key"),)
OWN_SHARE = worker_pb2.Failure(
    code="RESOURCE_EXHAUSTED", reason="tenant_answers", message="what is left is for other tenants", retryable=True
)


async def waiting(service: Service, count: int) -> None:
    await eventually(lambda: service.gateway.levels().waiting_calls == count)


async def appending(service: Service, key: str, text: str) -> asyncio.Task[object]:
    client = await service.client(key)
    session = await client.create_session()
    return asyncio.create_task(client.append(session.session_id, text))


def documents_of(worker: FakeWorker) -> list[str]:
    return [bytes(submit.append.token_ids).decode() for submit in worker.submits]


async def test_a_newcomer_doesnt_wait_for_all_that_another_tenant_has_sent() -> None:
    async with running(api_keys=KEYS) as service:
        worker = service.worker
        worker.refusals.extend([OVERLOADED, OVERLOADED])
        calls = []
        for number in range(4):
            calls.append(await appending(service, "ann-key", f"flood {number}"))
            await waiting(service, number + 1)
        calls.append(await appending(service, "bob-key", "one"))
        await waiting(service, 5)
        # It goes first, and so it asked at once.
        await eventually(lambda: documents_of(worker) == ["flood 0", "one"])
        worker.show(replace(ROOMY, device_free_bytes=1))
        await asyncio.gather(*calls)
        assert documents_of(worker)[2:] == ["one", "flood 0", "flood 1", "flood 2", "flood 3"]


async def test_a_call_whose_tenant_has_its_share_is_in_nobody_elses_way() -> None:
    async with running(api_keys=KEYS) as service:
        worker = service.worker
        worker.refusals.append(OWN_SHARE)
        blocked = await appending(service, "ann-key", "y")
        await waiting(service, 1)
        # Larger, and later by its order.
        assert (await (await appending(service, "bob-key", "x" * 900))).num_tokens == 900
        assert not blocked.done()
        worker.show(replace(ROOMY, device_free_bytes=1))
        await blocked


async def test_one_tenant_doesnt_fill_the_line() -> None:
    async with running(api_keys=KEYS, limits={"waiting_calls": 8}) as service:
        service.worker.refusals.extend([OVERLOADED, OVERLOADED])
        calls = []
        for number in range(7):
            calls.append(await appending(service, "ann-key", f"flood {number}"))
            await waiting(service, number + 1)
        with pytest.raises(Overloaded, match="7 of them this tenant's"):
            await (await appending(service, "ann-key", "one more"))
        calls.append(await appending(service, "bob-key", "one"))
        await waiting(service, 8)
        service.worker.show(replace(ROOMY, device_free_bytes=1))
        await asyncio.gather(*calls)


async def test_the_worker_is_told_of_weight_and_bytes() -> None:
    async with running(api_keys=KEYS, quota=QuotaConfig(host_bytes=5)) as service:
        stub = admin_pb2_grpc.AdminServiceStub(await service.channel())
        await stub.SetQuota(admin_pb2.SetQuotaRequest(tenant="ann", weight=3, device_bytes=1000), metadata=OPS)
        for key in ("ann-key", "bob-key"):
            await (await appending(service, key, "x"))
        ann, bob = service.worker.submits
        assert (ann.weight, ann.tenant_device_bytes, ann.tenant_host_bytes) == (3.0, 1000, 5)
        assert (bob.weight, bob.HasField("tenant_device_bytes"), bob.tenant_host_bytes) == (1.0, False, 5)


async def refusal_within(service: Service, timeout_s: float, document: str) -> DeadlineExceeded:
    stub = inference_pb2_grpc.InferenceServiceStub(await service.channel())
    request = inference_pb2.InferenceServiceGenerateRequest(document=document, prompt="q")
    request.sampling.max_new_tokens = 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(request, timeout=timeout_s):
            pass
    error = error_from_rpc(caught.value, "")
    assert isinstance(error, DeadlineExceeded)
    return error


async def test_a_deadline_that_cant_be_met_is_refused_before_anybody_is_asked() -> None:
    slow = replace(ROOMY, load=Load(prefill_tokens_per_s=10.0))
    async with running([FakeWorker(headroom=slow)]) as service:
        started = time.monotonic()
        error = await refusal_within(service, 20.0, "x" * 900)
        assert time.monotonic() - started < 10.0
        assert error.reason == "deadline_unreachable"
        assert float(error.metadata["predicted_s"]) == pytest.approx(90.1)
        assert service.worker.submits == []


async def test_a_call_leaves_the_line_when_its_deadline_cant_be_met_any_more() -> None:
    slow = replace(ROOMY, load=Load(prefill_tokens_per_s=10.0))
    async with running([FakeWorker(headroom=slow)]) as service:
        service.worker.refusals.append(OVERLOADED)
        started = time.monotonic()
        # 2 s of reading, which may be predicted wrong by half: given up 1 s before the deadline.
        error = await refusal_within(service, 1.5, "x" * 19)
        assert time.monotonic() - started < 1.4
        assert error.reason == "deadline_unreachable"
        assert len(service.worker.submits) == 1
