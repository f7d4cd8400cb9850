"""A worker is lost: before an answer's first token another one answers, after it the stream says where it stands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from kvservice.client import Client, Finished, Started, Tokens
from kvservice.client.errors import error_from_rpc
from kvservice.client.results import Event
from kvservice.errors import FailedPrecondition, Unavailable
from kvservice.gateway.dispatch import MAX_FAILOVERS
from kvservice.internal.seen import SeenDigest
from kvservice.internal.v1 import worker_pb2
from kvservice.v1 import sessions_pb2
from tests.unit.gateway.conftest import Service, running
from tests.unit.gateway.fake_worker import FakeWorker

DRAINING = worker_pb2.Failure(code="UNAVAILABLE", reason="draining", message="the worker drained", retryable=True)


@pytest.fixture
async def pair() -> AsyncIterator[Service]:
    async with running([FakeWorker("w1"), FakeWorker("w2")]) as service:
        yield service


async def _session(service: Service, client: Client) -> tuple[str, FakeWorker, FakeWorker]:
    """A session with a document; the worker that holds it, and the other."""
    session = (await client.create_session()).session_id
    await client.append(session, "document")
    holder = next(worker for worker in service.workers if worker.submits)
    return session, holder, next(worker for worker in service.workers if worker is not holder)


async def test_a_worker_lost_before_the_first_token_is_followed_by_another_in_the_same_call(pair: Service) -> None:
    client = await pair.client()
    session, holder, other = await _session(pair, client)
    holder.pause_after = 0
    events: list[Event] = []

    async def ask() -> None:
        async for event in client.generate(session, "q", max_new_tokens=3):
            events.append(event)

    answer = asyncio.create_task(ask())
    await holder.wait_for("submits", 2)
    await holder.kill()
    await answer
    # It was told of one worker, once; and nothing is missing.
    assert [type(event) for event in events] == [Started, Tokens, Tokens, Tokens, Finished]
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5]
    assert events[0].worker_id == holder.worker_id
    assert (await client.get(session)).worker_id == other.worker_id
    first, second = holder.submits[-1], other.submits[-1]
    assert first.call_id != second.call_id
    assert bytes(second.base_token_ids) == b"document"
    assert second.generate.sampling.seed == first.generate.sampling.seed
    assert pair.gateway.levels().failed_over_calls == 1


async def test_an_append_goes_on_at_another_worker(pair: Service) -> None:
    client = await pair.client()
    session, holder, other = await _session(pair, client)
    holder.pause_after = 1
    shown: list[tuple[int, int]] = []
    appended = asyncio.create_task(client.append(session, " and more", on_progress=lambda *now: shown.append(now)))
    await holder.wait_for("submits", 2)
    await holder.kill()
    assert (await appended).num_tokens == len("document and more")
    assert bytes(other.submits[-1].append.token_ids) == b" and more"
    assert shown == [(0, 9), (4, 9), (9, 9)]


async def test_a_call_without_a_session_goes_on_at_another_worker(pair: Service) -> None:
    client = await pair.client()
    for worker in pair.workers:
        worker.pause_after = 0
    answer = asyncio.create_task(_collect(client.complete("q", max_new_tokens=2)))
    async with asyncio.timeout(10):
        while not any(worker.submits for worker in pair.workers):
            await asyncio.sleep(0.005)
    asked = next(worker for worker in pair.workers if worker.submits)
    other = next(worker for worker in pair.workers if worker is not asked)
    other.pause_after = None
    await asked.kill()
    assert [type(event) for event in await answer] == [Started, Tokens, Tokens, Finished]


async def test_a_worker_that_drains_before_the_first_token_is_followed_by_another(pair: Service) -> None:
    client = await pair.client()
    session, holder, _ = await _session(pair, client)
    holder.pause_after = None
    holder.failures.append(DRAINING)
    result = await client.append(session, " and more")
    assert result.num_tokens == len("document and more")


class LosesTexts(FakeWorker):
    """As if it were gone whenever it is asked for the tokens of a text."""

    async def Tokenize(
        self, request: worker_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.TokenizeResponse:
        self.tokenized.append(request)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")


async def test_a_text_whose_worker_is_lost_is_given_to_another() -> None:
    lost, other = LosesTexts("w1"), FakeWorker("w2")
    async with running([lost, other]) as service:
        client = await service.client()
        session = (await client.create_session()).session_id
        assert (await client.append(session, "text")).num_tokens == 4
        assert len(lost.tokenized) == len(other.tokenized) == 1


async def test_a_call_that_ends_every_worker_is_given_up(pair: Service) -> None:
    client = await pair.client()
    session, holder, other = await _session(pair, client)
    for worker in (holder, other):
        worker.failures.extend([DRAINING] * 9)
    with pytest.raises(Unavailable, match="drained"):
        await client.append(session, " and more")
    assert len(holder.submits) - 1 + len(other.submits) == 1 + MAX_FAILOVERS


async def test_after_a_token_the_stream_says_where_it_stands_and_goes_on_from_there(pair: Service) -> None:
    client = await pair.client()
    session, holder, other = await _session(pair, client)
    holder.pause_after = 2
    events: list[Event] = []

    async def ask() -> None:
        async for event in client.generate(session, "q", request_id="r", max_new_tokens=4):
            events.append(event)

    answer = asyncio.create_task(ask())
    async with asyncio.timeout(10):
        while len(events) < 3:
            await asyncio.sleep(0.005)
    await holder.kill()
    with pytest.raises(Unavailable, match=f"worker {holder.worker_id} was lost.*last_sequence 3") as caught:
        await answer
    assert caught.value.metadata["last_sequence"] == "3"
    assert caught.value.retry_after_s is not None
    assert (await client.get(session)).num_tokens == len("document")
    # As the client library goes on by itself, when it may try again.
    seen = SeenDigest()
    for event in events[1:]:
        seen.add(event.token_ids)
    rest = await _repeat(pair, session, 3, seen.value())
    assert [event.sequence for event in rest] == [4, 5, 6]
    assert other.submits[-1].generate.sampling.seed == holder.submits[-1].generate.sampling.seed


@pytest.mark.parametrize(("after", "seen"), [(3, b"another answer!!"), (9, b"")])
async def test_a_stream_never_goes_on_from_another_answer(service: Service, after: int, seen: bytes) -> None:
    client = await service.client()
    session = (await client.create_session()).session_id
    with pytest.raises(FailedPrecondition, match="last_sequence 0") as caught:
        await _repeat(service, session, after, seen)
    assert caught.value.reason == "not_resumable"
    # Nothing was kept of it, and the session is free.
    assert (await client.get(session)).num_tokens == 0
    assert len(await _repeat(service, session, 0, b"")) == 6


async def test_a_repeat_of_a_kept_answer_is_compared_too(service: Service) -> None:
    client = await service.client()
    session = (await client.create_session()).session_id
    whole = await _repeat(service, session, 0, b"")
    seen = SeenDigest()
    for event in whole[1:4]:
        seen.add(event.tokens.token_ids)
    assert await _repeat(service, session, 4, seen.value()) == whole[4:]
    with pytest.raises(FailedPrecondition):
        await _repeat(service, session, 4, b"another answer!!")


async def _repeat(service: Service, session: str, after: int, seen: bytes) -> list:
    """The events of one answer behind those that the caller has."""
    request = sessions_pb2.SessionServiceGenerateRequest(
        session_id=session, request_id="r", prompt="q", last_sequence=after, seen_digest=seen
    )
    request.sampling.max_new_tokens = 4
    stub = await service.sessions()
    try:
        return [response.event async for response in stub.Generate(request)]
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error, service.address) from None


async def _collect(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]
