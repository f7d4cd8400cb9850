"""A session that goes on at another worker than the one that holds it is handed over first."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from kvservice.errors import DeadlineExceeded
from kvservice.gateway import leaving
from tests.unit.gateway.conftest import Service, eventually, running
from tests.unit.gateway.fake_worker import OVERLOADED, ROOMY, FakeWorker


async def held(service: Service) -> str:
    """A session that w1 holds."""
    client = await service.client()
    session = (await client.create_session()).session_id
    await client.append(session, "a document")
    assert (await client.get(session)).worker_id == "w1"
    return session


async def test_the_holder_hands_over_before_another_worker_is_asked() -> None:
    holder, other = FakeWorker("w1"), FakeWorker("w2")
    async with running([holder, other]) as service:
        client, session = await service.client(), await held(service)
        holder.refusals.append(OVERLOADED)
        holder.lets_go.clear()
        append = asyncio.create_task(client.append(session, "more"))
        await holder.wait_for("hand_overs")
        assert (holder.hand_overs[0].session_id, holder.hand_overs[0].keeps_kv) == (session, True)
        assert not other.submits
        holder.lets_go.set()
        await append
        assert (await client.get(session)).worker_id == "w2"
        assert [submit.was_elsewhere for submit in (holder.submits[-1], *other.submits)] == [False, True]


async def test_a_holder_that_takes_the_call_hands_nothing_over() -> None:
    holder, other = FakeWorker("w1"), FakeWorker("w2")
    async with running([holder, other]) as service:
        client, session = await service.client(), await held(service)
        await client.append(session, "more")
        assert not holder.hand_overs
        assert not holder.submits[-1].was_elsewhere


async def test_a_holder_that_drains_hands_over_too() -> None:
    holder, other = FakeWorker("w1"), FakeWorker("w2")
    async with running([holder, other]) as service:
        client, session = await service.client(), await held(service)
        holder.show(replace(ROOMY, draining=True))
        await eventually(lambda: any(view.headroom.draining for view in service.gateway.fleet.views()))
        await client.append(session, "more")
        assert (len(holder.hand_overs), len(other.submits)) == (1, 1)


async def test_a_call_that_waits_has_its_session_handed_over_once() -> None:
    holder, other = FakeWorker("w1"), FakeWorker("w2")
    async with running([holder, other]) as service:
        client, session = await service.client(), await held(service)
        holder.refusals.extend([OVERLOADED, OVERLOADED])
        other.refusals.append(OVERLOADED)
        append = asyncio.create_task(client.append(session, "more"))
        await other.wait_for("submits")
        other.show(replace(ROOMY, device_free_bytes=1))
        await append
        assert len(holder.hand_overs) == 1
        # The other one may have acquired it meanwhile.
        assert [submit.was_elsewhere for submit in holder.submits[1:]] == [False, True]


async def test_a_holder_that_hangs_or_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "HAND_OVER_S", 0.05)
    holder, other = FakeWorker("w1"), FakeWorker("w2")
    async with running([holder, other]) as service:
        client, session = await service.client(), await held(service)
        holder.refusals.append(OVERLOADED)
        holder.lets_go.clear()
        await client.append(session, "more")
        assert (await client.get(session)).worker_id == "w2"
        await other.kill()
        await service.connected(1)
        holder.lets_go.set()
        await client.append(session, "and more")
        assert holder.submits[-1].was_elsewhere


async def test_no_more_time_is_spent_on_a_holder_than_the_call_has() -> None:
    holder, other = FakeWorker("w1"), FakeWorker("w2")
    async with running([holder, other]) as service:
        client, session = await service.client(), await held(service)
        holder.refusals.append(OVERLOADED)
        holder.lets_go.clear()
        with pytest.raises(DeadlineExceeded):
            await client.append(session, "more", timeout_s=0.3)
        assert not other.submits


async def test_whoever_goes_on_is_told_how_the_tokens_were_computed() -> None:
    async with running() as service:
        client, worker = await service.client(), service.worker
        worker.selects_from = 4
        session = (await client.create_session()).session_id
        await client.append(session, "ten tokens")
        await client.append(session, "more")
        await client.truncate_session(session, 6)
        await client.append(session, "again")
        told = [submit.reached for submit in worker.submits]
        assert not worker.submits[0].HasField("reached")
        assert [(each.num_computed, list(each.selected)) for each in told[1:]] == [(10, [4, 10]), (6, [4, 6])]
