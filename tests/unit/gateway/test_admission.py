from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from kvservice.config.recipes import get_recipe
from kvservice.errors import BudgetTooSmall, DeadlineExceeded, Overloaded, Unavailable
from kvservice.gateway.admission import Admission
from kvservice.gateway.placement import PlacementRequest
from kvservice.internal.v1 import worker_pb2
from tests.unit.gateway.conftest import eventually, running
from tests.unit.gateway.fake_worker import MODEL, OVERLOADED, ROOMY, FakeWorker


async def test_a_refusal_goes_on_to_the_next_worker() -> None:
    workers = [FakeWorker("w1"), FakeWorker("w2")]
    async with running(workers) as service:
        client = await service.client()
        workers[0].refusals.append(OVERLOADED)
        session = await client.create_session()
        await client.append(session.session_id, "x")
        assert [len(worker.submits) for worker in workers] == [1, 1]
        assert (await client.get(session.session_id)).worker_id == "w2"


async def test_a_call_waits_until_there_is_room() -> None:
    async with running() as service:
        client, worker = await service.client(), service.worker
        session = await client.create_session()
        worker.refusals.extend([OVERLOADED, OVERLOADED])
        append = asyncio.create_task(client.append(session.session_id, "x"))
        await worker.wait_for("submits", 1)
        assert await waiting(client, 1)
        # Nothing has changed, so it isn't asked again; each change is one more try.
        worker.show(replace(ROOMY, device_free_bytes=1))
        await worker.wait_for("submits", 2)
        worker.show(replace(ROOMY, device_free_bytes=2))
        result = await append
        assert result.num_tokens == 1
        assert len(worker.submits) == 3
        assert await waiting(client, 0)


async def waiting(client, count: int) -> bool:
    async def as_many() -> bool:
        return (await client.stats()).waiting_calls == count

    await eventually(as_many)
    return True


async def test_calls_in_line_are_served_in_order() -> None:
    async with running() as service:
        client, worker = await service.client(), service.worker
        sessions = [await client.create_session() for _ in range(3)]
        worker.refusals.append(OVERLOADED)
        calls = []
        for position, session in enumerate(sessions):
            calls.append(asyncio.create_task(client.append(session.session_id, f"document {position}")))
            await waiting(client, position + 1)
        # Later ones went to the end of the line without asking.
        assert len(worker.submits) == 1
        worker.show(replace(ROOMY, device_free_bytes=1))
        await worker.wait_for("submits", 2)
        worker.show(replace(ROOMY, device_free_bytes=2))
        await asyncio.gather(*calls)
        assert documents_of(worker) == ["document 0", "document 0", "document 1", "document 2"]


async def test_a_call_of_a_higher_priority_goes_to_the_front_of_the_line() -> None:
    async with running() as service:
        client, worker = await service.client(), service.worker
        sessions = [await client.create_session() for _ in range(4)]
        worker.refusals.extend([OVERLOADED, OVERLOADED])
        calls = []
        for position, (session, priority) in enumerate(zip(sessions, (0, -1, 5, 0), strict=True)):
            append = client.append(session.session_id, f"document {position}", priority=priority)
            calls.append(asyncio.create_task(append))
            await waiting(client, position + 1)
        # The urgent one was tried at once: a worker may make room for it. The others have never asked.
        assert documents_of(worker) == ["document 0", "document 2"]
        worker.show(replace(ROOMY, device_free_bytes=1))
        await asyncio.gather(*calls)
        assert documents_of(worker)[2:] == ["document 2", "document 0", "document 3", "document 1"]


async def test_a_small_call_passes_a_blocked_large_one_where_there_seems_to_be_room() -> None:
    async with running() as service:
        client, worker = await service.client(), service.worker
        large, small = await client.create_session(), await client.create_session()
        worker.refusals.append(OVERLOADED)
        blocked = asyncio.create_task(client.append(large.session_id, "x" * 900))
        await waiting(client, 1)
        assert (await client.append(small.session_id, "y")).num_tokens == 1
        assert not blocked.done()
        worker.show(replace(ROOMY, device_free_bytes=1))
        assert (await blocked).num_tokens == 900


async def test_calls_of_another_model_have_a_line_of_their_own() -> None:
    workers = [FakeWorker("w1"), FakeWorker("w2", model=replace(MODEL, name="other"))]
    async with running(workers) as service:
        client = await service.client()
        full, free = await client.create_session(model="toy"), await client.create_session(model="other")
        workers[0].refusals.append(OVERLOADED)
        blocked = asyncio.create_task(client.append(full.session_id, "x"))
        await waiting(client, 1)
        assert (await client.append(free.session_id, "as large or larger")).num_tokens == 18
        workers[0].show(replace(ROOMY, device_free_bytes=1))
        await blocked


async def test_a_call_whose_deadline_passes_in_line_is_not_submitted() -> None:
    fleet = FullFleet()
    admission = Admission(fleet, max_waiting=10, max_wait_s=60.0)
    request = PlacementRequest("toy", get_recipe("dense"), 1, "", 0)
    with pytest.raises(DeadlineExceeded, match="before a worker had room"):
        await admission.admit(request, worker_pb2.Submit(), deadline=time.monotonic())
    assert fleet.submits == 0
    assert admission.waiting == 0


class FullFleet:
    version = 0
    submits = 0

    def views(self):
        raise AssertionError("nobody is asked")


def documents_of(worker) -> list[str]:
    return [bytes(submit.append.token_ids).decode() for submit in worker.submits]


async def test_the_longest_wait_ends_overloaded_with_a_time_to_retry() -> None:
    async with running(max_wait_s=0.05) as service:
        client = await service.client()
        session = await client.create_session()
        service.worker.refusals.append(OVERLOADED)
        with pytest.raises(Overloaded, match="no worker had room for 1 tokens") as caught:
            await client.append(session.session_id, "x")
        assert caught.value.retry_after_s == 0.05
        assert (await client.append(session.session_id, "x")).num_tokens == 1


async def test_the_line_is_bounded() -> None:
    async with running(limits={"waiting_calls": 1}) as service:
        client = await service.client()
        first, second = await client.create_session(), await client.create_session()
        service.worker.refusals.append(OVERLOADED)
        waits = asyncio.create_task(client.append(first.session_id, "x"))
        await waiting(client, 1)
        with pytest.raises(Overloaded, match="1 calls wait") as caught:
            await client.append(second.session_id, "x")
        assert caught.value.reason == "queue_full"
        waits.cancel()
        await waiting(client, 0)


async def test_a_call_that_leaves_the_line_lets_the_next_one_try() -> None:
    async with running() as service:
        client, worker = await service.client(), service.worker
        first, second = await client.create_session(), await client.create_session()
        worker.refusals.append(OVERLOADED)
        leaves = asyncio.create_task(client.append(first.session_id, "first"))
        await waiting(client, 1)
        stays = asyncio.create_task(client.append(second.session_id, "second"))
        await waiting(client, 2)
        leaves.cancel()
        assert (await stays).num_tokens == 6
        assert len(worker.submits) == 2


async def test_a_refusal_for_good_is_the_answer() -> None:
    async with running() as service:
        client = await service.client()
        session = await client.create_session()
        service.worker.refusals.append(
            worker_pb2.Failure(code="FAILED_PRECONDITION", reason="budget_too_small", message="needs 9 bytes, has 3")
        )
        with pytest.raises(BudgetTooSmall, match="needs 9 bytes, has 3"):
            await client.append(session.session_id, "x")


async def test_a_fleet_that_drains_is_unavailable() -> None:
    async with running() as service:
        client = await service.client()
        session = await client.create_session()
        service.worker.show(replace(ROOMY, draining=True))
        await eventually(lambda: service.gateway.fleet.views()[0].headroom.draining)
        with pytest.raises(Unavailable, match="is draining") as caught:
            await client.append(session.session_id, "x")
        assert caught.value.retry_after_s is not None


async def test_a_cancel_during_admission_reaches_the_worker() -> None:
    async with running() as service:
        client, worker = await service.client(), service.worker
        session = await client.create_session()
        worker.pause_after = 0
        append = asyncio.create_task(client.append(session.session_id, "x"))
        await worker.wait_for("submits")
        append.cancel()
        await worker.wait_for("cancels")
        assert worker.cancels == [worker.submits[0].call_id]
