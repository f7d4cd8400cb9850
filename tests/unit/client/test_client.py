from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from kvservice.client import Client, Finished, RetryPolicy, Tokens
from kvservice.errors import (
    Conflict,
    InvalidRequest,
    KVServiceError,
    LimitExceeded,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from kvservice.v1 import (
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
)


class Scripted(sessions_pb2_grpc.SessionServiceServicer, inference_pb2_grpc.InferenceServiceServicer):
    """A service that fails as told. `script` gives what happens at each attempt."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.script: list[Callable[[Any], Any]] = []

    async def _next(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        step = self.script.pop(0)
        return await step(context)

    async def Create(self, request, context):
        return await self._next(request, context)

    async def Get(self, request, context):
        return await self._next(request, context)

    async def Append(self, request_iterator, context):
        requests = [request async for request in request_iterator]
        yield await self._next(requests, context)

    async def Generate(self, request, context):
        async for event in await self._next(request, context):
            if isinstance(request, sessions_pb2.SessionServiceGenerateRequest):
                yield sessions_pb2.SessionServiceGenerateResponse(event=event)
            else:
                yield inference_pb2.InferenceServiceGenerateResponse(event=event)


def gives(message: Any) -> Callable[[Any], Any]:
    async def step(context):
        return message

    return step


def fails(code: grpc.StatusCode, details: str = "no") -> Callable[[Any], Any]:
    async def step(context):
        await context.abort(code, details)

    return step


def streams(*events: common_pb2.GenerateEvent, then: grpc.StatusCode | None = None) -> Callable[[Any], Any]:
    async def step(context):
        async def events_of_the_stream() -> AsyncIterator[common_pb2.GenerateEvent]:
            for event in events:
                yield event
            if then is not None:
                await context.abort(then, "cut")

        return events_of_the_stream()

    return step


def started() -> common_pb2.GenerateEvent:
    return common_pb2.GenerateEvent(sequence=1, started=common_pb2.Started(worker_id="w", seed=9))


def token(sequence: int) -> common_pb2.GenerateEvent:
    return common_pb2.GenerateEvent(
        sequence=sequence, tokens=common_pb2.TokenChunk(token_ids=[sequence], text=f"t{sequence} ")
    )


def finished(sequence: int) -> common_pb2.GenerateEvent:
    return common_pb2.GenerateEvent(
        sequence=sequence, finished=common_pb2.Finished(finish_reason=common_pb2.FINISH_REASON_EOS)
    )


class Naps:
    """Instead of sleeping."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


@pytest.fixture
def naps() -> Naps:
    return Naps()


@pytest.fixture
async def service(naps: Naps):
    servicer = Scripted()
    server = grpc.aio.server()
    sessions_pb2_grpc.add_SessionServiceServicer_to_server(servicer, server)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    retry = RetryPolicy(max_attempts=4, sleep=naps, rng=random.Random(1))
    async with Client(f"127.0.0.1:{port}", "key", retry=retry) as client:
        yield servicer, client
    await server.stop(None)


async def test_a_cut_stream_goes_on_after_its_last_event_under_the_same_request_id(service, naps: Naps) -> None:
    servicer, client = service
    servicer.script = [
        streams(started(), token(2), token(3), then=grpc.StatusCode.UNAVAILABLE),
        fails(grpc.StatusCode.UNAVAILABLE),
        streams(token(4), finished(5)),
    ]
    events = [event async for event in client.generate("s", "q", max_new_tokens=3)]
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5]
    assert [request.last_sequence for request in servicer.requests] == [0, 3, 3]
    assert len({request.request_id for request in servicer.requests}) == 1
    assert servicer.requests[0].request_id
    assert len(naps.seconds) == 2


async def test_attempts_are_bounded(service, naps: Naps) -> None:
    servicer, client = service
    servicer.script = [fails(grpc.StatusCode.UNAVAILABLE, "again")] * 9
    with pytest.raises(Unavailable, match="again"):
        await client.get("s")
    assert len(servicer.requests) == 4
    first, second, third = naps.seconds
    assert 0.05 <= first <= 0.1 < 0.2 <= third <= 0.4
    assert first < second < third


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, LimitExceeded),
        (grpc.StatusCode.ABORTED, Conflict),
        (grpc.StatusCode.UNAUTHENTICATED, Unauthenticated),
    ],
)
async def test_what_can_not_pass_is_not_made_again(service, code: grpc.StatusCode, cls: type[KVServiceError]) -> None:
    servicer, client = service
    servicer.script = [fails(code)]
    with pytest.raises(cls):
        await client.get("s")
    assert len(servicer.requests) == 1


async def test_the_services_wish_for_a_pause_is_honoured(service, naps: Naps) -> None:
    from kvservice.gateway.interceptors import error_status

    async def overloaded(context):
        await context.abort_with_status(error_status(Overloaded("full", retry_after_s=3.0)))

    async def patient(context):
        await context.abort_with_status(error_status(Overloaded("full", retry_after_s=600.0)))

    servicer, client = service
    servicer.script = [overloaded, patient, gives(sessions_pb2.GetResponse())]
    await client.get("s")
    assert naps.seconds == [3.0, 5.0]


async def test_a_busy_session_is_only_waited_for_after_a_cut(service) -> None:
    from kvservice.gateway.interceptors import error_status

    async def busy(context):
        await context.abort_with_status(error_status(Conflict("busy", reason="session_busy")))

    servicer, client = service
    servicer.script = [busy]
    with pytest.raises(Conflict):
        await anext(client.generate("s", "q"))
    servicer.script = [
        streams(started(), then=grpc.StatusCode.UNAVAILABLE),
        busy,
        streams(finished(2)),
    ]
    assert [event.sequence async for event in client.generate("s", "q")] == [1, 2]


async def test_an_upload_is_made_again_whole(service) -> None:
    servicer, client = service
    done = sessions_pb2.AppendResponse(finished=sessions_pb2.AppendFinished(num_tokens=7))
    servicer.script = [fails(grpc.StatusCode.UNAVAILABLE), gives(done)]

    async def chunks():
        yield "first "
        yield b"second"

    result = await client.append("s", chunks(), expected_num_tokens=0)
    assert result.num_tokens == 7
    first, second = servicer.requests
    assert first == second
    assert first[0].start.HasField("expected_num_tokens")
    assert first[1].data == b"first second"


async def test_large_documents_go_in_chunks_below_the_message_limit(service) -> None:
    servicer, client = service
    done = sessions_pb2.AppendResponse(finished=sessions_pb2.AppendFinished())
    servicer.script = [gives(done), gives(done)]
    document = "€" * 2_000_000
    await client.append("s", document)
    await client.append("s", token_ids=range(200_000))
    text, ids = servicer.requests
    assert b"".join(part.data for part in text[1:]).decode() == document
    assert [i for part in ids[1:] for i in part.token_ids.token_ids] == list(range(200_000))
    assert max(part.ByteSize() for part in text + ids) < 1024 * 1024


async def test_an_answer_without_a_session_is_not_made_again_once_it_began(service) -> None:
    servicer, client = service
    servicer.script = [
        fails(grpc.StatusCode.UNAVAILABLE),
        streams(started(), token(2), then=grpc.StatusCode.UNAVAILABLE),
    ]
    events = client.complete("q")
    assert [(await anext(events)).sequence for _ in range(2)] == [1, 2]
    with pytest.raises(Unavailable):
        await anext(events)
    assert len(servicer.requests) == 2


async def test_ask_gives_the_whole_answer(service) -> None:
    servicer, client = service
    servicer.script = [streams(started(), token(2), token(3), finished(4))]
    answer = await client.ask("s", "q", temperature=0.0, stop=["."])
    assert (answer.text, answer.token_ids, answer.started.seed) == ("t2 t3 ", (2, 3), 9)
    assert isinstance(answer.finished, Finished)
    sent = servicer.requests[0].sampling
    assert sent.HasField("temperature")
    assert not sent.HasField("top_p")
    assert list(sent.stop) == ["."]


async def test_events_of_a_kind_to_come_are_passed_over(service) -> None:
    servicer, client = service
    telemetry = common_pb2.GenerateEvent(sequence=2, kv=common_pb2.KvTelemetry())
    servicer.script = [streams(started(), telemetry, token(3), finished(4))]
    events = [event async for event in client.generate("s", "q")]
    assert [event.sequence for event in events] == [1, 3, 4]
    assert isinstance(events[1], Tokens)


async def test_the_key_goes_with_every_call(service) -> None:
    servicer, client = service
    servicer.script = [gives(sessions_pb2.GetResponse()), streams(finished(1))]
    await client.get("s")
    [event async for event in client.generate("s", "q")]
    assert [metadata["authorization"] for metadata in servicer.metadata] == ["Bearer key", "Bearer key"]


async def test_a_service_that_is_not_there_is_unavailable(naps: Naps) -> None:
    retry = RetryPolicy(max_attempts=2, sleep=naps)
    async with Client("127.0.0.1:1", retry=retry) as client:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 can't be reached"):
            await client.list_models()
    assert len(naps.seconds) == 1
