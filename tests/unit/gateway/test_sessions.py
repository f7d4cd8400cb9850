from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import grpc
import pytest

from kvservice.client import Finished, SessionState, Started, Tokens
from kvservice.errors import (
    BudgetTooSmall,
    Conflict,
    FailedPrecondition,
    InvalidRequest,
    KVServiceError,
    LimitExceeded,
    NotFound,
    PromptTooLong,
    Unavailable,
)
from kvservice.internal.v1 import worker_pb2
from kvservice.store.ledger import Position
from kvservice.store.manifests import Manifest
from kvservice.types import FinishReason, Headroom, PromptFormat, Role, SessionId, TenantId, TokenLogprob, WorkerId
from kvservice.v1 import common_pb2, sessions_pb2
from tests.unit.gateway.conftest import Service, eventually, keys, running
from tests.unit.gateway.fake_worker import ROOMY, FakeWorker, answer_tokens


async def test_a_document_is_read_and_a_question_answered(service: Service) -> None:
    client = await service.client()
    session = await client.create_session(prompt_format=PromptFormat.CHAT)
    progress: list[tuple[int, int]] = []
    result = await client.append(session.session_id, "word " * 10, on_progress=lambda *seen: progress.append(seen))
    assert progress == [(0, 50), (25, 50), (50, 50)]
    assert result.num_tokens == 50
    assert result.timings.prefill_ms == 1.5
    assert result.timings.total_ms >= result.timings.queue_ms > 0

    events = [event async for event in client.generate(session.session_id, "why?", max_new_tokens=5, seed=3)]
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5, 6, 7]
    assert events[0] == Started(1, session.session_id, "w1", "recall", 3)
    assert "".join(event.text for event in events if isinstance(event, Tokens)) == "defgh"
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.finish_reason is FinishReason.LENGTH
    assert finished.num_tokens == 50 + 4 + 5
    assert finished.usage.cached_tokens == 50
    assert finished.kv.window_bytes == 4096
    assert 0 < finished.timings.queue_ms <= finished.timings.ttft_ms <= finished.timings.total_ms

    shown = await client.get(session.session_id)
    assert (shown.num_tokens, shown.worker_id, shown.state) == (59, "w1", SessionState.IDLE)
    document, question = service.worker.tokenized
    assert (document.role, document.first) == (worker_pb2.TEXT_ROLE_DOCUMENT, True)
    assert (question.role, question.first) == (worker_pb2.TEXT_ROLE_QUESTION, False)


async def test_of_several_answers_the_first_joins_the_session_and_the_others_are_told(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    answer = await client.ask(session.session_id, "q", n=3, temperature=1.0, seed=0, max_new_tokens=2, logprobs=1)
    assert (answer.text, [other.text for other in answer.alternatives]) == ("ab", ["bc", "cd"])
    assert answer.finished.finish_reasons == (FinishReason.LENGTH,) * 3
    assert answer.alternatives[0].finish_reason is FinishReason.LENGTH
    [first, second] = answer.alternatives[1].logprobs
    assert (first.chosen, second.chosen) == (TokenLogprob(ord("c"), -ord("c")), TokenLogprob(ord("d"), -ord("d")))
    assert first.top == (TokenLogprob(0, 0.0),)
    assert (await client.get(session.session_id)).num_tokens == 1 + 2


async def test_sampling_priority_and_the_time_left_reach_the_worker(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    await client.append(session.session_id, "x", priority=-5, timeout_s=30.0)
    await client.append(session.session_id, "x", detach=True, timeout_s=30.0)
    schema = {"type": "object"}
    await client.ask(session.session_id, "q", priority=7, timeout_s=30.0, json_schema=schema, logit_bias={3: 1.5})
    await client.ask(session.session_id, "q")
    kept = client.generate(session.session_id, "q", keep_partial=True, timeout_s=30.0)
    assert [type(event) for event in [event async for event in kept]][-1] is Finished
    complete = client.complete("q", priority=100, timeout_s=30.0, regex="a+")
    assert [type(event) for event in [event async for event in complete]][-1] is Finished

    append, detached, ask, patient, keeping, sessionless = service.worker.submits
    assert [submit.priority for submit in service.worker.submits] == [-5, 0, 7, 0, 0, 100]
    assert all(20.0 < submit.deadline_s < 31.0 for submit in (append, ask, sessionless))
    # What outlives the RPC, what has no deadline, and what is to be kept when it passes.
    assert detached.deadline_s == patient.deadline_s == keeping.deadline_s == 0.0
    assert ask.generate.sampling.grammar == common_pb2.Grammar(json_schema='{"type": "object"}')
    assert dict(ask.generate.sampling.logit_bias) == {3: 1.5}
    assert sessionless.generate.sampling.grammar == common_pb2.Grammar(regex="a+")


async def test_what_only_the_model_can_tell_is_refused_too(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    with pytest.raises(InvalidRequest, match=r"sampling\.logit_bias holds 256"):
        await client.ask(session.session_id, "q", logit_bias={256: 1.0})
    with pytest.raises(InvalidRequest, match="priority=101"):
        await client.append(session.session_id, "x", priority=101)
    with pytest.raises(InvalidRequest, match="priority=-101"):
        await client.ask(session.session_id, "x", priority=-101)
    assert service.worker.submits == []


async def test_several_answers_of_a_failed_call_are_not_resumed(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    stub = await service.sessions()
    request = sessions_pb2.SessionServiceGenerateRequest(
        session_id=session.session_id, request_id="r", prompt="q", last_sequence=3
    )
    request.sampling.n, request.sampling.temperature = 2, 1.0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [response async for response in stub.Generate(request)]
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "last_sequence 0" in caught.value.details()
    request.last_sequence = 0
    whole = [response.event async for response in stub.Generate(request)]
    # One that went well is kept as it was.
    request.last_sequence = 3
    assert [response.event async for response in stub.Generate(request)] == whole[3:]


async def test_chunks_may_split_a_character(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    stub = await service.sessions()
    parts = [sessions_pb2.AppendRequest(start=sessions_pb2.AppendStart(session_id=session.session_id))]
    parts += [sessions_pb2.AppendRequest(data=bytes([byte])) for byte in "naïve €".encode()]
    responses = [response async for response in stub.Append(iter_async(parts))]
    assert responses[-1].finished.num_tokens == len("naïve €".encode())
    assert service.worker.tokenized[0].text == "naïve €"


async def iter_async(parts):
    for part in parts:
        yield part


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([], "before its first message"),
        ([{"data": b"text"}], "one message with `start`"),
        ([{"start": {}}], "is empty"),
        ([{"start": {}}, {"data": b""}], "is empty"),
        ([{"start": {}}, {"start": {}}], "one message with `start`"),
        ([{"start": {}}, {"data": b"a"}, {"token_ids": {"token_ids": [1]}}], "not both"),
        ([{"start": {}}, {"data": b"abc\xff"}], "0xff at offset 3"),
        ([{"start": {}}, {"data": b"abc\xe2\x82"}], "at offset 3"),
        ([{"start": {}}, {"token_ids": {"token_ids": [7, 256]}}], "token ids are 0 to 255"),
    ],
)
async def test_a_bad_document_is_refused_and_the_session_stays_usable(
    service: Service, parts: list[dict], says: str
) -> None:
    client = await service.client()
    session = await client.create_session()
    requests = []
    for part in parts:
        request = sessions_pb2.AppendRequest(**part)
        if request.HasField("start"):
            request.start.session_id = session.session_id
        requests.append(request)
    with pytest.raises(InvalidRequest, match=says):
        await append_raw(service, requests)
    assert (await client.append(session.session_id, "fine")).num_tokens == 4


async def append_raw(service: Service, requests: list[sessions_pb2.AppendRequest]):
    import grpc

    from kvservice.client.errors import error_from_rpc

    stub = await service.sessions()
    try:
        return [response async for response in stub.Append(iter_async(requests))]
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error, service.address) from None


async def test_the_byte_that_is_not_utf8_is_named(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    with pytest.raises(InvalidRequest) as caught:
        await client.append(session.session_id, b"ab\x80cd")
    assert (caught.value.reason, caught.value.metadata) == ("not_utf8", {"byte_offset": "2"})


async def test_a_document_over_a_limit_is_refused() -> None:
    async with running(limits={"document_bytes": 10, "document_tokens": 5}) as service:
        client = await service.client()
        session = await client.create_session()
        with pytest.raises(LimitExceeded, match="more than 10 bytes"):
            await client.append(session.session_id, "x" * 11)
        with pytest.raises(LimitExceeded, match="6 tokens: one Append takes 5"):
            await client.append(session.session_id, "x" * 6)
        with pytest.raises(LimitExceeded, match="6 tokens"):
            await client.append(session.session_id, token_ids=[1] * 6)
        assert (await client.append(session.session_id, "x" * 5)).num_tokens == 5


async def test_a_message_over_the_limit_is_refused_and_the_session_stays_usable(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    with pytest.raises(LimitExceeded):
        await append_raw(
            service,
            [
                sessions_pb2.AppendRequest(start=sessions_pb2.AppendStart(session_id=session.session_id)),
                sessions_pb2.AppendRequest(data=b"x" * (4 * 1024 * 1024 + 1)),
            ],
        )
    assert (await client.append(session.session_id, "fine")).num_tokens == 4


async def test_too_many_tokens_are_refused_with_the_numbers(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    with pytest.raises(PromptTooLong, match=r"0 tokens held \+ 2001 added .* has 2000 positions"):
        await client.append(session.session_id, "x" * 2001)
    await client.append(session.session_id, "x" * 1990)
    with pytest.raises(PromptTooLong) as caught:
        await client.ask(session.session_id, "why?", max_new_tokens=7)
    assert caught.value.metadata == {"num_tokens": "2001", "max_positions": "2000"}
    # Without a wish for a length, what is left is what there is.
    answer = await client.ask(session.session_id, "why?")
    assert len(answer.token_ids) == 6


async def test_a_budget_too_small_for_one_sequence_says_how_small() -> None:
    small = Headroom(device_capacity_bytes=1000, host_capacity_bytes=1000)
    async with running([FakeWorker(headroom=small)]) as service:
        client = await service.client()
        session = await client.create_session()
        with pytest.raises(BudgetTooSmall, match=r"need 4096 device bytes and 0 host bytes.*1000") as caught:
            await client.append(session.session_id, "x" * 16)
        assert caught.value.metadata["needed_device_bytes"] == "4096"
        assert caught.value.metadata["available_device_bytes"] == "1000"
        assert (await client.get(session.session_id)).num_tokens == 0


async def test_unknown_names_are_not_found_with_those_there_are(service: Service) -> None:
    client = await service.client()
    with pytest.raises(NotFound, match="unknown model 'gpt': known are toy"):
        await client.create_session(model="gpt")
    with pytest.raises(NotFound, match=r"unknown recipe 'magic': .* served with dense, exact, recall"):
        await client.create_session(recipe="magic")
    with pytest.raises(NotFound, match="unknown recipe 'recall-oracle'"):
        await client.create_session(recipe="recall-oracle")
    for call in (client.get("x"), client.ask("x", "?"), client.append("x", "text"), client.close_session("x")):
        with pytest.raises(NotFound, match="unknown session 'x'"):
            await call


async def test_a_foreign_session_looks_like_one_that_never_was() -> None:
    two = keys(("ka", "acme", Role.TENANT), ("kb", "bolt", Role.TENANT))
    async with running(api_keys=two) as service:
        acme, bolt = await service.client("ka"), await service.client("kb")
        session = await acme.create_session()
        for call in (bolt.get, bolt.close_session, lambda i: bolt.ask(i, "?"), lambda i: bolt.append(i, "x")):
            with pytest.raises(NotFound) as foreign:
                await call(session.session_id)
            with pytest.raises(NotFound) as unknown:
                await call("0" * 32)
            assert foreign.value.message.replace(session.session_id, "0" * 32) == unknown.value.message
            assert foreign.value.reason == unknown.value.reason
        assert [each async for each in bolt.list()] == []
        assert (await acme.append(session.session_id, "mine")).num_tokens == 4


async def test_pages_cover_all_sessions_once_and_tokens_belong_to_their_tenant() -> None:
    two = keys(("ka", "acme", Role.TENANT), ("kb", "bolt", Role.TENANT))
    async with running(api_keys=two) as service:
        acme, bolt = await service.client("ka"), await service.client("kb")
        made = sorted([(await acme.create_session()).session_id for _ in range(5)])
        assert [each.session_id async for each in acme.list(page_size=2)] == made
        page = await acme._list_page(sessions_pb2.ListRequest(page_size=2))
        for token in (page.next_page_token, "rubbish", "x", page.next_page_token[:-4] + "AAAA"):
            with pytest.raises(InvalidRequest, match="page_token"):
                await bolt._list_page(sessions_pb2.ListRequest(page_size=2, page_token=token))
        with pytest.raises(InvalidRequest, match="page_size=1001"):
            await acme._list_page(sessions_pb2.ListRequest(page_size=1001))


async def test_a_tenant_has_so_many_sessions_and_no_more() -> None:
    async with running(limits={"sessions_per_tenant": 2}) as service:
        client = await service.client()
        first = await client.create_session()
        await client.create_session()
        with pytest.raises(LimitExceeded, match="2 open sessions"):
            await client.create_session()
        await client.close_session(first.session_id)
        await client.create_session()


@pytest.mark.parametrize("ttl_s", [0.0, 59.0, 7 * 86_400 + 1, -5.0])
async def test_a_ttl_out_of_bounds_is_refused(service: Service, ttl_s: float) -> None:
    client = await service.client()
    with pytest.raises(InvalidRequest, match="it must be 60 to 604800 s") as caught:
        await client.create_session(ttl_s=ttl_s)
    assert caught.value.field == "ttl"


async def test_an_idle_session_expires_and_is_released() -> None:
    async with running(sweep_interval_s=0.02) as service:
        client = await service.client()
        kept, dropped = await client.create_session(ttl_s=100), await client.create_session(ttl_s=100)
        service.clock.now += 60
        await client.append(kept.session_id, "still here")
        service.clock.now += 60
        with pytest.raises(NotFound):
            await client.get(dropped.session_id)
        (listed,) = (await (await service.sessions()).List(sessions_pb2.ListRequest())).sessions
        assert listed.expires_at.seconds == service.clock.now + 40
        assert not listed.expires_soon
        service.clock.now += 31
        (listed,) = (await (await service.sessions()).List(sessions_pb2.ListRequest())).sessions
        assert listed.expires_soon
        assert (await client.get(kept.session_id)).expires_at == service.clock.now + 100
        await service.worker.wait_for("releases")
        assert [release.session_id for release in service.worker.releases] == [dropped.session_id]
        assert not service.worker.releases[0].purge


# Repeats


async def test_a_repeated_create_gives_the_same_session(service: Service) -> None:
    client = await service.client()
    first = await client.create_session(request_id="r1")
    assert await client.create_session(request_id="r1") == first
    with pytest.raises(InvalidRequest) as caught:
        await client.create_session(request_id="r1", recipe="dense")
    assert caught.value.reason == "request_id_reused"
    service.clock.now += 601
    assert (await client.create_session(request_id="r1")).session_id != first.session_id


async def test_a_repeated_append_reads_the_document_once(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    first = await client.append(session.session_id, "once", request_id="r1")
    assert await client.append(session.session_id, "once", request_id="r1") == first
    assert len(service.worker.submits) == 1
    with pytest.raises(InvalidRequest):
        await client.append(session.session_id, "twice", request_id="r1")


async def test_a_repeated_generate_replays_the_events_after_the_last_sequence(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    first = [event async for event in client.generate(session.session_id, "q", request_id="r1", max_new_tokens=3)]
    again = [event async for event in client.generate(session.session_id, "q", request_id="r1", max_new_tokens=3)]
    assert again == first
    stub = await service.sessions()
    request = sessions_pb2.SessionServiceGenerateRequest(
        session_id=session.session_id, request_id="r1", prompt="q", last_sequence=3
    )
    request.sampling.max_new_tokens = 3
    assert [response.event.sequence async for response in stub.Generate(request)] == [4, 5]
    assert len(service.worker.submits) == 1


async def test_a_repeated_close_gives_the_same_answer(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    assert await client.close_session(session.session_id, request_id="r1") == (10, 20)
    assert await client.close_session(session.session_id, request_id="r1") == (10, 20)
    with pytest.raises(NotFound):
        await client.close_session(session.session_id, request_id="r2")


async def test_a_failed_call_may_be_repeated_under_its_id(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    service.worker.failures.append(worker_pb2.Failure(code="INTERNAL", reason="internal", message="it broke"))
    with pytest.raises(Exception, match="it broke"):
        await client.ask(session.session_id, "q", request_id="r1", max_new_tokens=2)
    assert (await client.get(session.session_id)).num_tokens == 0
    answer = await client.ask(session.session_id, "q", request_id="r1", max_new_tokens=2)
    assert answer.finished.num_tokens == 3


async def test_a_repeat_of_a_running_call_is_told_to_wait(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    service.worker.pause_after = 1
    running_call = asyncio.create_task(client.ask(session.session_id, "q", request_id="r1", max_new_tokens=2))
    await service.worker.wait_for("submits")
    with pytest.raises(Conflict) as caught:
        await client.ask(session.session_id, "q", request_id="r1", max_new_tokens=2)
    assert caught.value.reason == "request_in_flight"
    service.worker.go.set()
    first = await running_call
    assert await client.ask(session.session_id, "q", request_id="r1", max_new_tokens=2) == first


@pytest.mark.parametrize("request_id", ["x" * 129, "a\nb"])
async def test_a_bad_request_id_is_refused(service: Service, request_id: str) -> None:
    client = await service.client()
    with pytest.raises(InvalidRequest) as caught:
        await client.create_session(request_id=request_id)
    assert caught.value.field == "request_id"


async def test_the_seed_is_derived_from_the_request_id(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    seeds = []
    for request_id in ("r1", "r2"):
        service.worker.failures.append(worker_pb2.Failure(code="UNAVAILABLE", reason="x", retryable=True))
        with pytest.raises(Unavailable):
            await client.ask(session.session_id, "q", request_id=request_id, max_new_tokens=1)
        answer = await client.ask(session.session_id, "q", request_id=request_id, max_new_tokens=1)
        seeds.append(answer.started.seed)
    sent = [submit.generate.sampling.seed for submit in service.worker.submits]
    assert sent == [seeds[0], seeds[0], seeds[1], seeds[1]]
    assert seeds[0] != seeds[1]


# One at a time


async def test_a_second_call_on_a_busy_session_is_aborted(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    service.worker.pause_after = 1
    first = asyncio.create_task(client.ask(session.session_id, "q", max_new_tokens=2))
    await service.worker.wait_for("submits")
    assert (await client.get(session.session_id)).state is SessionState.GENERATING
    for call in (client.ask, client.append):
        with pytest.raises(Conflict) as caught:
            await call(session.session_id, "other")
        assert caught.value.reason == "session_busy"
    with pytest.raises(Conflict):
        await client.close_session(session.session_id)
    service.worker.go.set()
    assert (await first).finished.num_tokens == 3
    # The moment the answer is complete the session is free.
    await client.ask(session.session_id, "q", max_new_tokens=1)


async def test_a_lost_update_is_noticed(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    await client.append(session.session_id, "1234", expected_num_tokens=0)
    with pytest.raises(Conflict, match="holds 4 tokens") as caught:
        await client.append(session.session_id, "5", expected_num_tokens=0)
    assert (caught.value.reason, caught.value.metadata) == ("num_tokens_mismatch", {"num_tokens": "4"})
    stream = client.generate(session.session_id, "q", expected_num_tokens=3)
    with pytest.raises(Conflict, match="expected_num_tokens=3"):
        await anext(stream)


# Cancellation


async def test_a_client_that_leaves_in_mid_stream_cancels_the_call_and_leaves_the_session_as_before(
    service: Service,
) -> None:
    client = await service.client()
    session = await client.create_session()
    await client.append(session.session_id, "document")
    service.worker.pause_after = 2
    async with aclosing(client.generate(session.session_id, "q", request_id="r1", seed=5)) as events:
        async for event in events:
            if isinstance(event, Tokens):
                break
    await service.worker.wait_for("cancels")
    assert service.worker.cancels == [service.worker.submits[-1].call_id]
    await eventually(lambda: idle(client, session.session_id))
    assert (await client.get(session.session_id)).num_tokens == 8
    service.worker.pause_after = None
    await eventually_answers(client, session.session_id)


async def idle(client, session_id: str) -> bool:
    return (await client.get(session_id)).state is SessionState.IDLE


async def eventually_answers(client, session_id: str) -> None:
    async def answers() -> bool:
        try:
            await client.ask(session_id, "again", max_new_tokens=1)
        except Conflict:
            return False
        return True

    await eventually(answers)


async def test_what_was_generated_is_kept_on_demand(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    service.worker.pause_after = 2
    options = {"request_id": "r1", "keep_partial": True, "seed": 0, "max_new_tokens": 10}
    async with aclosing(client.generate(session.session_id, "q", **options)) as events:
        async for event in events:
            if event.sequence == 3:
                break
    await eventually(lambda: idle(client, session.session_id))
    assert (await client.get(session.session_id)).num_tokens == 1 + 2

    async def kept() -> bool:
        try:
            events = [event async for event in client.generate(session.session_id, "q", **options)]
        except Conflict:
            return False
        assert [event.sequence for event in events] == [1, 2, 3, 4]
        assert events[-1].finish_reason is FinishReason.CANCELLED
        return True

    await eventually(kept)


async def test_a_deadline_cancels_the_call(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    service.worker.pause_after = 0
    from kvservice.errors import DeadlineExceeded

    with pytest.raises(DeadlineExceeded):
        await client.ask(session.session_id, "q", timeout_s=0.2)
    await service.worker.wait_for("cancels")
    service.worker.pause_after = None
    await eventually_answers(client, session.session_id)


async def test_a_client_that_leaves_during_an_append_leaves_the_session_as_before(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    service.worker.pause_after = 1
    append = asyncio.create_task(client.append(session.session_id, "text"))
    await service.worker.wait_for("submits")
    append.cancel()
    await service.worker.wait_for("cancels")
    await eventually(lambda: idle(client, session.session_id))
    assert (await client.get(session.session_id)).num_tokens == 0


async def test_a_detached_append_outlives_its_connection(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    service.worker.pause_after = 1
    append = asyncio.create_task(client.append(session.session_id, "text", detach=True))
    await service.worker.wait_for("submits")

    async def half_done() -> bool:
        return (await client.get(session.session_id)).prefill_done_tokens == 2

    await eventually(half_done)
    append.cancel()
    await asyncio.gather(append, return_exceptions=True)
    shown = await client.get(session.session_id)
    assert (shown.state, shown.prefill_total_tokens) == (SessionState.APPENDING, 4)
    service.worker.go.set()
    await eventually(lambda: idle(client, session.session_id))
    assert (await client.get(session.session_id)).num_tokens == 4
    assert service.worker.cancels == []


async def test_why_a_detached_append_failed_is_told_by_get(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    service.worker.failures.append(worker_pb2.Failure(code="INTERNAL", reason="internal", message="the arena broke"))
    with pytest.raises(Exception, match="the arena broke"):
        await client.append(session.session_id, "text", detach=True)
    assert (await client.get(session.session_id)).last_error == "the arena broke"
    await client.append(session.session_id, "text")
    assert (await client.get(session.session_id)).last_error == ""


async def test_half_an_upload_is_no_document(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    stub = await service.sessions()
    for _ in range(20):
        call = stub.Append()
        start = sessions_pb2.AppendStart(session_id=session.session_id, detach=True)
        await call.write(sessions_pb2.AppendRequest(start=start))
        await call.write(sessions_pb2.AppendRequest(data=b"half of "))
        # On the same connection, so what was written has arrived.
        await stub.Get(sessions_pb2.GetRequest(session_id=session.session_id))
        call.cancel()
    # The next call is behind all of them.
    await client.append(session.session_id, "whole")
    assert [bytes(submit.append.token_ids) for submit in service.worker.submits] == [b"whole"]


# Workers


async def test_the_worker_that_holds_a_session_is_asked_first() -> None:
    roomy, roomier = Headroom(*[1 << 28] * 6), ROOMY
    workers = [FakeWorker("w1", headroom=roomy), FakeWorker("w2", headroom=roomier)]
    async with running(workers) as service:
        client = await service.client()
        session = await client.create_session()
        await client.append(session.session_id, "document")
        assert [len(worker.submits) for worker in workers] == [0, 1]
        workers[1].show(Headroom(**{**as_dict(roomier), "running_calls": 5, "device_free_bytes": 0}))
        await client.ask(session.session_id, "q", max_new_tokens=1)
        assert [len(worker.submits) for worker in workers] == [0, 2]


def as_dict(headroom: Headroom) -> dict[str, object]:
    return {name: getattr(headroom, name) for name in Headroom.__dataclass_fields__}


async def test_a_worker_that_started_again_is_found_again(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    await client.append(session.session_id, "document")
    await service.worker.kill()
    await service.connected(0)
    with pytest.raises(Unavailable):
        await client.ask(session.session_id, "q")
    again = FakeWorker("w1")
    service.workers.append(again)
    await again.start(service.store)
    await service.connected(1)
    await client.ask(session.session_id, "q", max_new_tokens=1)
    assert bytes(again.submits[0].base_token_ids) == b"document"


async def test_without_a_worker_calls_are_unavailable() -> None:
    async with running([]) as service:
        client = await service.client()
        with pytest.raises(Unavailable, match="no worker is connected") as caught:
            await client.create_session()
        assert caught.value.retry_after_s == 1.0


# The rest


async def test_a_recipe_may_be_overridden_by_one_that_needs_nothing_dropped(service: Service) -> None:
    client = await service.client()
    session = await client.create_session(recipe="recall")
    answer = await client.ask(session.session_id, "q", recipe="exact", max_new_tokens=1)
    assert answer.started.recipe == service.worker.submits[-1].recipe == "exact"
    await client.ask(session.session_id, "q", recipe="recall", max_new_tokens=1)
    with pytest.raises(FailedPrecondition, match="'recall' can't answer with 'dense'"):
        await client.ask(session.session_id, "q", recipe="dense")
    with pytest.raises(NotFound, match="unknown recipe 'x'"):
        await client.ask(session.session_id, "q", recipe="x")


async def test_an_empty_prompt_goes_on_from_a_session_that_holds_tokens(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    with pytest.raises(InvalidRequest, match="so is the session"):
        await client.ask(session.session_id, "")
    await client.append(session.session_id, token_ids=[1, 2, 3])
    answer = await client.ask(session.session_id, "", max_new_tokens=2)
    assert answer.finished.num_tokens == 5
    assert list(service.worker.submits[-1].generate.prompt_token_ids) == []


async def test_text_and_token_ids_exclude_each_other(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    with pytest.raises(InvalidRequest, match="not both"):
        await anext(client.generate(session.session_id, "q", prompt_token_ids=[1]))
    with pytest.raises(InvalidRequest, match="prompt_token_ids holds 300"):
        await anext(client.generate(session.session_id, prompt_token_ids=[300]))


async def test_purge_is_passed_on_and_tenants_are_hidden_behind_a_tag(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    await client.append(session.session_id, "x")
    await client.close_session(session.session_id, purge=True)
    dropped, release = service.worker.releases
    assert (dropped.purge, release.purge) == (False, True)
    assert len(release.tenant_tag) == 16
    assert release.tenant_tag == service.worker.submits[0].tenant_tag
    assert b"local" not in release.tenant_tag


async def test_purge_leaves_the_frames_that_a_fork_reads_until_the_fork_goes_too(service: Service) -> None:
    client, ledger, tenant = await service.client(), service.store.ledger, TenantId("local")
    parent, fork = await client.create_session(), await client.create_session()
    at = await ledger.acquire_session(tenant, parent.session_id, WorkerId("w1"), 1e6)
    old_tag = b"t" * 16
    manifest = Manifest(parent.session_id, tenant, old_tag, b"f" * 16, at.epoch, 0, 0, 16)
    await ledger.publish_manifest(manifest, at, bytes_by_home={parent.session_id: 100}, ttl_s=1e6)
    manifest = replace(manifest, session_id=fork.session_id, epoch=0)
    shared = {parent.session_id: 100, fork.session_id: 10}
    await ledger.publish_manifest(manifest, Position(), bytes_by_home=shared, ttl_s=1e6)
    await client.close_session(parent.session_id, purge=True)
    await client.close_session(fork.session_id, purge=True)
    released = [(release.session_id, release.purge) for release in service.worker.releases]
    assert released[:2] == [(parent.session_id, False), (fork.session_id, False)]
    # Under the tag of now, and under the one that the manifest has: of a secret that the service had before.
    assert sorted(released[2:]) == sorted(2 * [(parent.session_id, True), (fork.session_id, True)])
    assert sum(release.tenant_tag == old_tag for release in service.worker.releases) == 2
    assert (await ledger.tenant_bytes(tenant)).stored_bytes == 0


async def test_get_renews_a_session_now_and_then(service: Service) -> None:
    client = await service.client()
    session = await client.create_session(ttl_s=100)
    service.clock.now += 9
    assert (await client.get(session.session_id)).expires_at == session.expires_at
    service.clock.now += 2
    assert (await client.get(session.session_id)).expires_at == session.expires_at + 11


async def test_purge_without_a_worker_keeps_the_session(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    await service.worker.kill()
    await service.connected(0)
    with pytest.raises(Unavailable, match="close without `purge`"):
        await client.close_session(session.session_id, purge=True)
    assert await client.get(session.session_id)
    assert await client.close_session(session.session_id) == (0, 0)


async def test_a_session_is_taken_back_and_forked_once_for_a_request_id(service: Service) -> None:
    client = await service.client()
    session = (await client.create_session()).session_id
    await client.append(session, "document")
    fork = await client.fork_session(session, expected_num_tokens=8, request_id="r1")
    assert await client.fork_session(session, expected_num_tokens=8, request_id="r1") == fork
    assert (await client.truncate_session(session, 3, request_id="r2")).num_tokens == 3
    assert (await client.truncate_session(session, 3, request_id="r2")).num_tokens == 3
    assert (await client.get(fork.session_id)).num_tokens == 8
    with pytest.raises(Conflict, match="holds 3 tokens"):
        await client.fork_session(session, expected_num_tokens=8)
    with pytest.raises(InvalidRequest, match="give 0 to 3"):
        await client.truncate_session(session, 4)
    assert len([each async for each in client.list()]) == 2


async def test_a_document_begins_sessions_of_any_recipe(service: Service) -> None:
    client = await service.client()
    source = (await client.create_session(recipe="recall", ttl_s=1000)).session_id
    await client.append(source, "document")
    await client.append(source, " goes on")
    await client.ask(source, "question?", max_new_tokens=2)
    await client.append(source, "no document any more")
    shown = await client.get(source)
    assert (shown.document_tokens, shown.document_id) == (16, "")
    same = await client.create_session(document_id=source, request_id="r1", ttl_s=500)
    assert await client.create_session(document_id=source, request_id="r1", ttl_s=500) == same
    other = await client.create_session(document_id=source, recipe="exact")
    for each, recipe in ((same, "recall"), (other, "exact")):
        assert (each.recipe, each.num_tokens, each.document_tokens, each.document_id) == (recipe, 16, 16, source)
        assert each.worker_id == shown.worker_id
    assert same.expires_at - same.created_at == pytest.approx(500)
    asked = [(fork.num_tokens, fork.is_document, fork.stored_only) for fork in service.worker.forks]
    assert asked == [(16, True, False), (16, True, True)]
    # A document that began as another's is one itself, and grows on its own.
    await client.append(same.session_id, "more")
    assert (await client.get(same.session_id)).document_tokens == 20
    assert (await client.get(source)).document_tokens == 16
    fork = await client.fork_session(other.session_id)
    assert (fork.document_id, fork.document_tokens) == (source, 16)
    assert not service.worker.forks[-1].is_document
    assert (await client.truncate_session(source, 5)).document_tokens == 5


async def test_what_is_no_document_begins_no_session(service: Service) -> None:
    client = await service.client()
    asked = (await client.create_session()).session_id
    await client.ask(asked, "question?", max_new_tokens=2)
    await client.append(asked, "too late")
    with pytest.raises(FailedPrecondition, match="has no document"):
        await client.create_session(document_id=asked)
    with pytest.raises(NotFound, match="unknown session"):
        await client.create_session(document_id="another")
    source = (await client.create_session()).session_id
    await client.append(source, "document")
    with pytest.raises(InvalidRequest, match="is of model 'toy'"):
        await client.create_session(document_id=source, model="other")
    with pytest.raises(KVServiceError, match="recipe"):
        await client.create_session(document_id=source, recipe="nothing")
    assert service.worker.forks == []


async def test_a_session_moves_to_no_worker_that_is_not_there(service: Service) -> None:
    client = await service.client()
    session = (await client.create_session()).session_id
    with pytest.raises(NotFound, match="unknown worker 'w9'"):
        await client.move_session(session, "w9")


async def test_a_record_that_moved_under_a_call_is_not_overwritten(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    service.worker.pause_after = 1
    answer = asyncio.create_task(client.ask(session.session_id, "q", max_new_tokens=2))
    await service.worker.wait_for("submits")
    record = await service.store.get_session(SessionId(session.session_id))
    await service.store.update_session(record)
    service.worker.go.set()
    with pytest.raises(Conflict):
        await answer
    assert (await client.get(session.session_id)).num_tokens == 0


async def test_answers_are_a_function_of_the_seed(service: Service) -> None:
    client = await service.client()
    session = await client.create_session()
    answer = await client.ask(session.session_id, "q", seed=7, max_new_tokens=4)
    assert list(answer.token_ids) == answer_tokens(7, 4)


async def test_the_sampling_parameter_at_fault_is_named(service: Service) -> None:
    stub = await service.sessions()
    client = await service.client()
    session = await client.create_session()
    request = sessions_pb2.SessionServiceGenerateRequest(session_id=session.session_id, prompt="q")
    request.sampling.n = 2
    from kvservice.client.errors import error_from_rpc

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(stub.Generate(request)))
    error = error_from_rpc(caught.value, "")
    assert isinstance(error, InvalidRequest)
    assert error.field == "sampling.n"
