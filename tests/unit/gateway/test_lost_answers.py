"""A request is carried out once, whatever becomes of the gateway that carried it out and of its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from kvservice.errors import Conflict, Unavailable
from kvservice.store.memory import MemoryStateStore
from kvservice.types import SessionId, TenantId
from tests.unit.gateway.conftest import running
from tests.unit.gateway.fake_worker import FakeWorker

CLAIM_S = 0.3


class FlakyStore(MemoryStateStore):
    """Loses what it is told to lose."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.fails: set[str] = set()

    async def finish_request(
        self, tenant: TenantId, request_id: str, messages: Sequence[bytes], ttl_s: float, *, owner: str = ""
    ) -> None:
        self._maybe("finish")
        await super().finish_request(tenant, request_id, messages, ttl_s, owner=owner)

    async def unlock_session(self, session_id: SessionId, owner: str) -> None:
        self._maybe("unlock")
        await super().unlock_session(session_id, owner)

    def _maybe(self, what: str) -> None:
        if what in self.fails:
            raise Unavailable("the store is away")


@pytest.fixture
async def flaky():
    loop = asyncio.get_running_loop()
    store = FlakyStore(loop.time)
    async with running([FakeWorker()], store=store, lock_ttl_s=CLAIM_S) as service:
        yield service


async def test_call_that_went_well_is_answered_though_the_store_is_away_afterwards(flaky):
    client = await flaky.client()
    session = (await client.create_session()).session_id
    flaky.store.fails = {"finish", "unlock"}
    result = await client.append(session, "once", request_id="r1")
    assert result.num_tokens == 4
    flaky.store.fails.clear()
    await asyncio.sleep(2 * CLAIM_S)
    # Claim and lock have lapsed, and nobody knows the answer any more; but the session knows the request.
    with pytest.raises(Conflict, match="holds 4 tokens") as caught:
        await client.append(session, "once", request_id="r1")
    assert (caught.value.reason, caught.value.metadata["num_tokens"]) == ("answer_lost", "4")
    with pytest.raises(Conflict):
        await client.append(session, "once", request_id="r1")
    assert (await client.get(session)).num_tokens == 4
    assert (await client.append(session, "more", request_id="r2")).num_tokens == 8


async def test_truncation_whose_answer_was_lost_is_answered_again(flaky):
    client = await flaky.client()
    session = (await client.create_session()).session_id
    await client.append(session, "eight to", request_id="r0")
    flaky.store.fails = {"finish"}
    assert (await client.truncate_session(session, 3, request_id="r1")).num_tokens == 3
    flaky.store.fails.clear()
    await asyncio.sleep(2 * CLAIM_S)
    assert (await client.truncate_session(session, 3, request_id="r1")).num_tokens == 3


async def test_claim_outlives_its_time_as_long_as_the_call_runs(flaky):
    client = await flaky.client()
    session = (await client.create_session()).session_id
    flaky.worker.pause_after = 1
    running_call = asyncio.create_task(client.ask(session, "q", request_id="r1", max_new_tokens=2))
    await flaky.worker.wait_for("submits")
    await asyncio.sleep(3 * CLAIM_S)
    with pytest.raises(Conflict, match="being carried out"):
        await client.ask(session, "q", request_id="r1", max_new_tokens=2)
    flaky.worker.go.set()
    first = await running_call
    assert await client.ask(session, "q", request_id="r1", max_new_tokens=2) == first
