from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from kvservice.client import RetryPolicy, Tokens
from kvservice.errors import Conflict, NotFound
from kvservice.store.redis import RedisStateStore
from tests.unit.gateway.conftest import running
from tests.unit.gateway.fake_worker import FakeWorker, answer_tokens


@pytest.fixture
async def store(state_url: str):
    store = RedisStateStore(state_url)
    yield store
    await store.aclose()


async def test_a_session_is_durable_and_outlives_its_gateway(store: RedisStateStore) -> None:
    async with running(store=store) as service:
        client = await service.client()
        session = await client.create_session(request_id="r1")
        result = await client.append(session.session_id, "document", request_id="r2")
        assert (result.num_tokens, result.durable_tokens) == (8, 8)
        first = await client.ask(session.session_id, "q", request_id="r3", max_new_tokens=2)
    async with running([FakeWorker("w2")], store=store) as service:
        client = await service.client()
        assert (await client.create_session(request_id="r1")).session_id == session.session_id
        assert await client.ask(session.session_id, "q", request_id="r3", max_new_tokens=2) == first
        again = await client.ask(session.session_id, "q", max_new_tokens=2)
        assert again.finished.durable_tokens == again.finished.num_tokens == 8 + 3 + 3
        assert await client.close_session(session.session_id, request_id="r4") == (10, 20)
        assert await client.close_session(session.session_id, request_id="r4") == (10, 20)
        with pytest.raises(NotFound):
            await client.get(session.session_id)


async def test_two_gateways_change_a_session_one_at_a_time(store: RedisStateStore) -> None:
    worker = FakeWorker()
    async with running([worker], store=store) as one, running([], store=store) as two:
        await two.connected(1)
        first, second = await one.client(), await two.client()
        session = await first.create_session()
        worker.pause_after = 1
        answer = asyncio.create_task(first.ask(session.session_id, "q", request_id="r1", max_new_tokens=2))
        await worker.wait_for("submits")
        with pytest.raises(Conflict, match="another call is changing"):
            await second.ask(session.session_id, "q")
        with pytest.raises(Conflict, match="is being carried out"):
            await second.ask(session.session_id, "q", request_id="r1", max_new_tokens=2)
        worker.go.set()
        assert await second_time(second, session.session_id) == await answer


async def second_time(client, session_id: str):
    """The same request, at the other gateway, once the first is through."""
    while True:
        try:
            return await client.ask(session_id, "q", request_id="r1", max_new_tokens=2)
        except Conflict:
            await asyncio.sleep(0.005)


async def test_a_stream_that_was_cut_goes_on_with_the_same_tokens(store: RedisStateStore) -> None:
    """The worker is lost in mid-answer, another one takes over, and the caller sees one answer."""
    workers = [FakeWorker("w1"), FakeWorker("w2")]
    async with running(workers, store=store) as service:
        client = await service.client(retry=RetryPolicy(first_delay_s=0.01, max_delay_s=0.1))
        session = await client.create_session()
        for worker in workers:
            worker.pause_after = 3
        seen = []
        async with aclosing(client.generate(session.session_id, "q", max_new_tokens=6, seed=1)) as events:
            async for event in events:
                seen.append(event)
                if event.sequence == 4:
                    holder, other = sorted(workers, key=lambda worker: not worker.submits)
                    other.pause_after = None
                    await store.unregister_worker(holder.worker_id, holder.epoch)
                    await holder.kill()
        assert [event.sequence for event in seen] == list(range(1, 9))
        tokens = [token_id for event in seen if isinstance(event, Tokens) for token_id in event.token_ids]
        assert tokens == answer_tokens(1, 6)
        assert len(other.submits) == 1
