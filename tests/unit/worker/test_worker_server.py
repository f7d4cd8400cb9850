"""The internal service over real gRPC on loopback, in front of a scripted engine."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvservice.config.recipes import get_recipe
from kvservice.config.worker import WorkerConfig
from kvservice.errors import ConfigError, InternalError, ModelError, Overloaded
from kvservice.internal.v1 import worker_pb2
from kvservice.internal.v1.worker_pb2_grpc import WorkerServiceStub
from kvservice.store.memory import MemoryStateStore
from kvservice.types import CallId, EngineCall, SessionId
from kvservice.v1 import common_pb2
from kvservice.worker.loop import EngineLoop
from kvservice.worker.server import SERVICE_NAME, WorkerServer
from tests.unit.worker.conftest import GatewaySide
from tests.unit.worker.scripted_engine import ScriptedEngine, ToyTokenizer


async def health(worker, service=SERVICE_NAME):
    stub = health_pb2_grpc.HealthStub(worker.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def stepping(engine, awaitable):
    """The awaitable's result, while the engine makes one step for each turn of the event loop."""
    task = asyncio.ensure_future(awaitable)
    while not task.done():
        engine.permits.release()
        await asyncio.sleep(0)
    return await task


async def in_step(worker, gateway, awaitable):
    """The awaitable's result, while the engine makes one step for each message that the gateway reads."""
    task = asyncio.ensure_future(awaitable)
    while not task.done():
        worker.engine.permits.release()
        await gateway.read()
    return await task


async def next_admission(worker, gateway):
    while True:
        worker.engine.permits.release()
        message = await gateway.read()
        if message.WhichOneof("event") == "admission":
            return message.admission


async def last_event(worker, gateway):
    """The end of the only call that runs."""
    while True:
        worker.engine.permits.release()
        for event in (await gateway.read()).step.events:
            if event.WhichOneof("event") in ("done", "failure"):
                return event


async def test_hello_is_answered_with_identity_model_and_headroom(start_worker):
    worker = await start_worker(recipe="exact")
    gateway = GatewaySide(worker.stub)
    message = await gateway.hello()
    assert message.welcome.worker_id == "worker-a"
    assert message.welcome.epoch == 1
    assert message.welcome.model.name == "scripted"
    assert message.welcome.model.default_recipe == "exact"
    assert list(message.welcome.model.recipes) == ["dense", "exact", "recall"]
    assert message.headroom.device_capacity_bytes == 1000


async def test_a_stream_that_begins_without_hello_is_refused(worker):
    gateway = GatewaySide(worker.stub)
    await gateway.send(cancel=worker_pb2.Cancel(call_id="x"))
    assert await gateway.call.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "Hello" in await gateway.call.details()


async def test_a_second_hello_ends_the_stream(worker):
    gateway = await worker.connect()
    await gateway.send(hello=worker_pb2.Hello())
    assert await gateway.call.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_generate_is_admitted_streamed_and_done(worker):
    gateway = await worker.connect()
    await gateway.generate("c1", "héllo")
    admission = await gateway.admission()
    assert (admission.call_id, admission.admitted) == ("c1", True)
    text, last = await gateway.answer("c1")
    assert text == "héllo"
    assert last.done.finish_reasons == [common_pb2.FINISH_REASON_LENGTH]
    assert last.done.usage.completion_tokens == 5
    assert last.done.kv.bytes.device_window == 64
    assert "".join(map(chr, last.done.appended_token_ids)) == "héllohéllo"
    assert (last.done.prefill_ms, last.done.decode_ms) == (1.5, 2.5)


async def test_an_append_reports_progress_and_hands_the_engine_all_it_needs(worker):
    gateway = await worker.connect()
    await gateway.submit(
        "c1",
        append=worker_pb2.AppendWork(token_ids=[7, 8]),
        base_token_ids=[5, 6],
        recipe="recall",
        tenant_tag=b"t" * 16,
        on_miss=common_pb2.ON_MISS_FAIL,
    )
    await gateway.admission()
    events = [event async for event in gateway.events("c1")]
    assert [event.WhichOneof("event") for event in events] == ["progress", "done"]
    call = worker.engine.submitted[0]
    assert (call.base_tokens, call.document_tokens, call.prompt_tokens) == ((5, 6), (7, 8), ())
    assert (call.recipe.name, call.on_miss.name, call.sampling) == ("recall", "FAIL", None)
    assert (call.tenant_tag, call.retain) == (b"t" * 16, True)


async def test_a_refusal_carries_code_reason_and_fresh_headroom(worker):
    gateway = await worker.connect()
    worker.engine.refusal = Overloaded("no room: 12 bytes are free, the call needs 20", reason="device_full")
    await gateway.generate("c1", "abc")
    message = await gateway.read()
    assert not message.admission.admitted
    assert message.admission.refusal == worker_pb2.Failure(
        code="RESOURCE_EXHAUSTED",
        reason="device_full",
        message="no room: 12 bytes are free, the call needs 20",
        retryable=True,
    )
    assert message.headroom.device_free_bytes == 1000


async def test_an_unknown_recipe_a_baseline_and_a_call_without_work_are_refused(worker):
    gateway = await worker.connect()
    append = worker_pb2.AppendWork(token_ids=[1])
    await gateway.submit("c1", recipe="magic", append=append)
    await gateway.submit("c2", recipe="recall-oracle", append=append)
    await gateway.submit("c3")
    reasons = [(await gateway.admission()).refusal.reason for _ in range(3)]
    assert reasons == ["unknown_recipe", "unknown_recipe", "invalid_request"]


async def test_an_unexpected_error_of_submit_refuses_the_call_and_says_nothing_of_the_inside(worker, caplog):
    gateway = await worker.connect()
    worker.engine.refusal = RuntimeError("secret detail")
    await gateway.generate("c1", "abc")
    refusal = (await gateway.admission()).refusal
    assert (refusal.code, refusal.retryable) == ("INTERNAL", False)
    assert "secret" not in refusal.message
    assert "submit_failed" in caplog.messages


async def test_a_stop_string_ends_the_call_in_the_engine_and_cuts_the_text(worker):
    gateway = await worker.connect()
    await gateway.generate("c1", "one STOP two", max_new_tokens=1000, stop=["STOP"])
    await gateway.admission()
    text, last = await gateway.answer("c1")
    assert text == "one "
    assert last.done.finish_reasons == [common_pb2.FINISH_REASON_STOP]
    assert len(worker.engine.stopped) == 1


async def test_a_stop_string_in_the_last_token_turns_the_finish_reason_to_stop(worker):
    gateway = await worker.connect()
    await gateway.generate("c1", "one END", stop=["END"])
    await gateway.admission()
    text, last = await gateway.answer("c1")
    assert text == "one "
    assert last.done.finish_reasons == [common_pb2.FINISH_REASON_STOP]
    assert worker.engine.stopped == []


async def test_text_held_back_for_a_stop_string_comes_before_done(worker):
    gateway = await worker.connect()
    await gateway.generate("c1", "one EN", stop=["END"])
    await gateway.admission()
    text, last = await gateway.answer("c1")
    assert text == "one EN"
    assert last.done.finish_reasons == [common_pb2.FINISH_REASON_LENGTH]


async def test_each_of_several_answers_has_its_own_text_stop_and_reason(worker):
    gateway = await worker.connect()
    # Answer i begins at token i: "a.bcd", ".bcda", "bcda.", of which the first stop string ends the first two.
    await gateway.generate("c1", "a.bcd", max_new_tokens=5, n=3, stop=[".", "xyz"])
    await gateway.admission()
    texts, events = {0: "", 1: "", 2: ""}, [event async for event in gateway.events("c1")]
    for event in events[:-1]:
        texts[event.tokens.index] += event.tokens.text
    assert texts == {0: "a", 1: "", 2: "bcda"}
    assert events[-1].done.finish_reasons == [common_pb2.FINISH_REASON_STOP] * 3
    # That of the last answer came with its last token, when the engine had ended it.
    assert [index for _, index in worker.engine.stopped] == [1, 0]
    assert "".join(map(chr, events[-1].done.appended_token_ids)) == "a.bcda."


async def test_text_held_back_of_any_answer_comes_before_done(worker):
    gateway = await worker.connect()
    await gateway.generate("c1", "xE", max_new_tokens=2, n=2, stop=["EN"])
    await gateway.admission()
    *tokens, last = [event async for event in gateway.events("c1")]
    assert [(event.tokens.index, event.tokens.text) for event in tokens if event.tokens.text] == [
        (0, "x"),
        (1, "Ex"),
        (0, "E"),
    ]
    assert last.done.finish_reasons == [common_pb2.FINISH_REASON_LENGTH] * 2


async def test_log_probabilities_come_with_their_token(worker):
    gateway = await worker.connect()
    await gateway.generate("c1", "\1\2", logprobs=1)
    await gateway.admission()
    *tokens, _ = [event.tokens async for event in gateway.events("c1")]
    likeliest = common_pb2.TokenLogprob(token_id=0, logprob=-1)
    assert [list(chunk.logprobs) for chunk in tokens] == [
        [common_pb2.TokenLogprobs(chosen=common_pb2.TokenLogprob(token_id=token, logprob=-1 - token), top=[likeliest])]
        for token in (1, 2)
    ]


async def test_priority_and_what_is_left_of_the_time_reach_the_engine(worker):
    gateway = await worker.connect()
    append = worker_pb2.AppendWork(token_ids=[1])
    before = time.monotonic()
    await gateway.submit("c1", append=append, priority=-3, deadline_s=60.0)
    await gateway.admission()
    await gateway.submit("c2", append=append)
    await gateway.answer("c2")
    hurried, patient = worker.engine.submitted
    assert (hurried.priority, patient.priority, patient.deadline) == (-3, 0, None)
    assert before + 60.0 <= hurried.deadline <= time.monotonic() + 60.0


async def test_events_of_two_calls_in_one_step_come_in_one_message(start_worker):
    worker = await start_worker(step_by_step=True)
    gateway = await worker.connect()
    await gateway.generate("c1", "ab", max_new_tokens=2**31)
    await gateway.admission()
    await gateway.generate("c2", "xy", max_new_tokens=2**31)
    together = set()
    while len(together) < 2:
        message = await stepping(worker.engine, gateway.read())
        if len(message.step.events) > 1:
            texts = {event.call_id: event.tokens.text for event in message.step.events}
            assert texts.keys() == {"c1", "c2"}
            together.add(texts["c2"])
    assert together == {"x", "y"}


async def test_a_cancelled_call_ends_as_cancelled(start_worker):
    worker = await start_worker(step_by_step=True)
    gateway = await worker.connect()
    await gateway.generate("c1", "abc", max_new_tokens=2**31)
    await gateway.admission()
    worker.engine.permits.release()
    await gateway.read()
    await gateway.send(cancel=worker_pb2.Cancel(call_id="c1"))
    _, last = await stepping(worker.engine, gateway.answer("c1"))
    assert last.done.finish_reasons == [common_pb2.FINISH_REASON_CANCELLED]
    assert list(last.done.appended_token_ids) == []


async def test_cancelling_a_call_that_has_ended_does_nothing(worker):
    gateway = await worker.connect()
    await gateway.generate("c1", "ab")
    await gateway.admission()
    await gateway.answer("c1")
    await gateway.send(cancel=worker_pb2.Cancel(call_id="c1"))
    await gateway.generate("c2", "ab")
    await gateway.admission()
    assert (await gateway.answer("c2"))[0] == "ab"
    assert worker.engine.cancelled == []


async def test_when_a_gateway_disconnects_its_calls_are_cancelled_and_others_go_on(start_worker):
    worker = await start_worker(step_by_step=True)
    leaving, staying = await worker.connect(), await worker.connect()
    await leaving.generate("same-id", "abc", max_new_tokens=2**31)
    await leaving.admission()
    await staying.generate("same-id", "abc", max_new_tokens=6)
    admission = await stepping(worker.engine, staying.admission())
    assert admission.admitted
    leaving.call.cancel()
    while not worker.engine.cancelled:
        await stepping(worker.engine, worker.stub.GetStats(worker_pb2.GetStatsRequest()))
    text, last = await stepping(worker.engine, staying.answer("same-id"))
    assert text == "abcabc"
    assert last.done.finish_reasons == [common_pb2.FINISH_REASON_LENGTH]
    assert len(worker.engine.cancelled) == 1


async def test_a_call_id_in_use_is_refused_and_the_first_call_goes_on(start_worker):
    worker = await start_worker(step_by_step=True)
    gateway = await worker.connect()
    await gateway.generate("c1", "a", max_new_tokens=2**31)
    await gateway.admission()
    await gateway.generate("c1", "x")
    refused = False
    while not refused:
        message = await stepping(worker.engine, gateway.read())
        refused = message.admission.refusal.reason == "call_id_in_use"
    message = await stepping(worker.engine, gateway.read())
    assert [event.tokens.text for event in message.step.events] == ["a"]


async def test_release_tells_what_was_freed(worker):
    gateway = await worker.connect()
    await gateway.generate("c1", "ab")
    await gateway.admission()
    await gateway.answer("c1")
    for freed in (100, 0):
        await gateway.send(release=worker_pb2.Release(session_id="session-c1"))
        released = (await gateway.read()).released
        assert (released.session_id, released.freed_device_bytes) == ("session-c1", freed)


async def test_every_gateway_hears_of_freed_bytes(worker):
    first, second = await worker.connect(), await worker.connect()
    await first.generate("c1", "ab")
    await first.admission()
    await first.answer("c1")
    # The call has ended: bytes are free that calls of the second gateway may wait for.
    message = await second.read()
    assert message.WhichOneof("event") == "step"
    assert len(message.step.events) == 0
    assert message.headroom.running_calls == 0
    await first.send(release=worker_pb2.Release(session_id="session-c1"))
    assert (await second.read()).WhichOneof("event") == "step"


async def test_release_with_purge_reaches_the_engine_with_the_tenants_tag(worker):
    gateway = await worker.connect()
    await gateway.send(release=worker_pb2.Release(session_id="s", tenant_tag=b"t" * 16, purge=True))
    await gateway.read()
    assert worker.engine.purged == [(b"t" * 16, "s")]


async def test_tokenize_knows_role_format_and_place(worker):
    request = worker_pb2.TokenizeRequest(
        text="hi",
        role=worker_pb2.TEXT_ROLE_QUESTION,
        prompt_format=common_pb2.PROMPT_FORMAT_CHAT,
        first=True,
    )
    response = await worker.stub.Tokenize(request)
    assert "".join(map(chr, response.token_ids)) == "^[hi]"


async def test_tokenize_without_a_role_is_refused(worker):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.stub.Tokenize(worker_pb2.TokenizeRequest(text="hi"))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert dict(caught.value.trailing_metadata())["kvservice-reason"] == "invalid_request"


async def test_a_text_that_takes_long_to_tokenize_keeps_nobody_else_waiting(worker):
    worker.tokenizer.may_encode.clear()
    tokenized = worker.stub.Tokenize(worker_pb2.TokenizeRequest(text="hi", role=worker_pb2.TEXT_ROLE_DOCUMENT))
    gateway = await worker.connect()
    await gateway.generate("c1", "ab")
    await gateway.admission()
    assert (await gateway.answer("c1"))[0] == "ab"
    worker.tokenizer.may_encode.set()
    assert "".join(map(chr, (await tokenized).token_ids)) == "hi"


async def test_stats_name_the_worker(worker):
    stats = (await worker.stub.GetStats(worker_pb2.GetStatsRequest())).stats
    assert (stats.worker_id, stats.address, stats.epoch) == ("worker-a", worker.server.address, 1)
    assert (stats.model, stats.device, stats.weight_bytes, stats.steps) == ("scripted", "cpu", 7, 3)
    assert stats.device_capacity_bytes == 1000


async def test_a_call_that_fails_leaves_the_others_and_the_worker_alone(worker):
    gateway = await worker.connect()
    worker.engine.call_error = Overloaded("the tier is full")
    await gateway.generate("c1", "ab")
    await gateway.admission()
    _, last = await gateway.answer("c1")
    assert (last.failure.code, last.failure.retryable) == ("RESOURCE_EXHAUSTED", True)
    worker.engine.call_error = None
    await gateway.generate("c2", "ab")
    await gateway.admission()
    assert (await gateway.answer("c2"))[0] == "ab"


async def test_a_step_that_raises_fails_the_running_calls_and_the_worker_serves_on(worker, caplog):
    gateway = await worker.connect()
    worker.engine.step_errors = [RuntimeError("secret detail")]
    await gateway.generate("c1", "ab")
    await gateway.admission()
    _, last = await gateway.answer("c1")
    assert last.failure.code == "INTERNAL"
    assert "secret" not in last.failure.message
    assert "step_failed" in caplog.messages
    await gateway.generate("c2", "ab")
    assert (await gateway.admission()).admitted
    assert (await gateway.answer("c2"))[0] == "ab"
    assert await health(worker) == health_pb2.HealthCheckResponse.SERVING


async def test_an_engine_that_fails_three_times_in_a_row_is_given_up(worker, caplog):
    gateway = await worker.connect()
    worker.engine.step_errors = [RuntimeError("broken")] * 3
    await fail_calls(gateway, 3)
    # Streams are told without being asked.
    assert (await gateway.read()).headroom.draining
    await gateway.generate("c4", "ab")
    refusal = (await gateway.admission()).refusal
    assert (refusal.code, refusal.reason, refusal.retryable) == ("UNAVAILABLE", "unhealthy", True)
    assert await health(worker) == health_pb2.HealthCheckResponse.NOT_SERVING
    assert "engine_given_up" in caplog.messages


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes")])
async def test_an_engine_that_is_refused_memory_refuses_calls_and_is_not_given_up(worker, error):
    gateway = await worker.connect()
    worker.engine.step_errors = [error] * 4
    for number in range(4):
        await gateway.generate(f"c{number}", "ab")
        assert (await gateway.admission()).admitted
        _, last = await gateway.answer(f"c{number}")
        failure = last.failure
        assert (failure.code, failure.reason, failure.retryable) == ("RESOURCE_EXHAUSTED", "out_of_memory", True)
    await gateway.generate("good", "ab")
    assert (await gateway.admission()).admitted
    assert (await gateway.answer("good"))[0] == "ab"
    assert await health(worker) == health_pb2.HealthCheckResponse.SERVING


async def test_an_engine_whose_books_are_wrong_when_it_is_idle_is_given_up(worker, caplog):
    gateway = await worker.connect()
    worker.engine.check_error = InternalError("3 blocks have no owner")
    await gateway.generate("c1", "ab")
    await gateway.admission()
    assert (await gateway.answer("c1"))[0] == "ab"
    assert (await gateway.read()).headroom.draining
    await gateway.generate("c2", "ab")
    assert (await gateway.admission()).refusal.reason == "unhealthy"
    assert worker.engine.checks == 1
    assert {"engine_check_failed", "engine_given_up"} <= set(caplog.messages)


async def test_an_engine_is_checked_when_it_becomes_idle_once_a_second_at_most():
    now, engines = [100.0], []

    def make_engine():
        engines.append(ScriptedEngine())
        return engines[0]

    loop = EngineLoop(make_engine, ToyTokenizer(), lambda: None, clock=lambda: now[0])
    await asyncio.wrap_future(loop.start())
    told = Told()
    loop.connect(told)

    async def checks_after_a_call(call_id):
        loop.submit(told, EngineCall(CallId(call_id), SessionId("s"), get_recipe("dense"), (), (1, 2)))
        await asyncio.wrap_future(loop.idle())
        # When this is answered, the loop has been around once more.
        await asyncio.wrap_future(loop.stats())
        return engines[0].checks

    assert await checks_after_a_call("c1") == 1
    assert await checks_after_a_call("c2") == 1
    now[0] += 1.0
    assert await checks_after_a_call("c3") == 2
    await asyncio.wrap_future(loop.stop())


class Told:
    def deliver(self, output, headroom):
        pass


async def test_a_failure_is_told_even_when_the_engine_cannot_say_what_is_left(worker, caplog):
    gateway = await worker.connect()
    worker.engine.permits = threading.Semaphore(0)
    await gateway.generate("c1", "ab")
    await gateway.admission()
    worker.engine.step_errors = [RuntimeError("broken")]
    worker.engine.headroom_error = RuntimeError("broken too")
    worker.engine.permits.release()
    message = await gateway.read()
    assert message.step.events[0].failure.code == "INTERNAL"
    assert message.headroom.device_capacity_bytes == 1000
    assert "headroom_failed" in caplog.messages


async def fail_calls(gateway, count):
    for number in range(count):
        await gateway.generate(f"failing-{number}", "ab")
        assert (await gateway.admission()).admitted
        _, last = await gateway.answer(f"failing-{number}")
        assert last.failure.code == "INTERNAL"


async def test_an_engine_that_reports_its_own_faults_is_given_up_too(worker):
    gateway = await worker.connect()
    worker.engine.call_error = InternalError("a step failed: RuntimeError")
    await fail_calls(gateway, 3)
    assert (await gateway.read()).headroom.draining


async def test_a_call_that_is_served_between_faults_keeps_the_engine_in_use(worker):
    gateway = await worker.connect()
    for _ in range(2):
        worker.engine.step_errors = [RuntimeError("broken")] * 2
        await fail_calls(gateway, 2)
        await gateway.generate("good", "ab")
        assert (await gateway.admission()).admitted
        assert (await gateway.answer("good"))[0] == "ab"


async def test_a_gateway_that_reads_no_more_loses_its_stream_and_its_calls(start_worker, caplog):
    worker = await start_worker(step_by_step=True, stream_queue_messages=100)
    # A receive window that doesn't grow, so that few messages fill it.
    channel = grpc.aio.insecure_channel(worker.server.address, options=[("grpc.http2.bdp_probe", 0)])
    slow = GatewaySide(WorkerServiceStub(channel), "slow")
    await slow.hello()
    for number in range(40):
        await slow.generate(f"c{number}", "x", max_new_tokens=2**31)
    admitted = 0
    while admitted < 40:
        worker.engine.permits.release()
        admitted += (await slow.read()).admission.admitted
    while len(worker.engine.cancelled) < 40:
        worker.engine.permits.release()
        # In this time the worker sends what the step gave, if it still can.
        await health(worker)
    assert "gateway_too_slow" in caplog.messages
    other = await stepping(worker.engine, worker.connect())
    await stepping(worker.engine, other.generate("c2", "ab"))
    await stepping(worker.engine, other.admission())
    assert (await stepping(worker.engine, other.answer("c2")))[0] == "ab"
    # What was on its way arrives, then the reason.
    with pytest.raises(grpc.aio.AioRpcError, match="reads too slowly") as caught:
        await slow.read_to_the_end()
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    await channel.close()


async def test_drain_refuses_new_calls_lets_running_ones_end_and_stops(start_worker):
    worker = await start_worker(step_by_step=True)
    gateway = await worker.connect()
    await gateway.generate("c1", "a", max_new_tokens=2**31)
    await gateway.admission()
    request = worker_pb2.DrainRequest(grace=Duration(seconds=60))
    response = await in_step(worker, gateway, worker.stub.Drain(request))
    assert response.running_calls == 1
    assert await health(worker) == health_pb2.HealthCheckResponse.NOT_SERVING
    await gateway.generate("c2", "x")
    refusal = (await next_admission(worker, gateway)).refusal
    assert (refusal.code, refusal.reason, refusal.retryable) == ("UNAVAILABLE", "draining", True)
    worker.engine.permits.release()
    message = await gateway.read()
    assert message.headroom.draining
    assert [event.tokens.text for event in message.step.events] == ["a"]
    await gateway.send(cancel=worker_pb2.Cancel(call_id="c1"))
    last = await last_event(worker, gateway)
    assert last.done.finish_reasons == [common_pb2.FINISH_REASON_CANCELLED]
    await worker.server.wait_stopped()
    assert worker.engine.closed
    assert await worker.store.list_workers() == []


async def test_calls_that_outlast_the_grace_are_ended_with_unavailable(start_worker):
    worker = await start_worker(step_by_step=True)
    gateway = await worker.connect()
    await gateway.generate("c1", "abcd", max_new_tokens=2**31)
    await gateway.admission()
    drain = asyncio.create_task(worker.server.drain(grace_s=0))
    last = await last_event(worker, gateway)
    assert (last.failure.code, last.failure.reason, last.failure.retryable) == ("UNAVAILABLE", "draining", True)
    await drain
    assert worker.engine.closed


async def test_the_worker_is_in_the_store_while_it_runs(worker):
    (record,) = await worker.store.list_workers()
    assert (record.worker_id, record.address, record.epoch) == ("worker-a", worker.server.address, 1)
    await worker.server.stop()
    assert await worker.store.list_workers() == []


async def test_stopping_twice_and_draining_afterwards_is_fine(worker):
    await asyncio.gather(worker.server.stop(), worker.server.stop())
    await worker.server.stop()
    await worker.server.drain()


async def test_draining_an_idle_worker_stops_it_at_once(worker):
    await asyncio.gather(worker.server.drain(), worker.server.drain())
    assert worker.engine.closed


async def test_a_stream_ends_when_the_worker_stops_and_its_calls_are_told(start_worker):
    worker = await start_worker(step_by_step=True)
    gateway = await worker.connect()
    await gateway.generate("c1", "abcd", max_new_tokens=2**31)
    await gateway.admission()
    stop = asyncio.create_task(worker.server.stop())
    last = await last_event(worker, gateway)
    assert (last.failure.code, last.failure.reason) == ("UNAVAILABLE", "stopped")
    assert await gateway.call.read() is grpc.aio.EOF
    assert await gateway.call.code() == grpc.StatusCode.OK
    await stop


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "example.com"])
async def test_a_host_beyond_loopback_is_refused(host):
    server = WorkerServer(WorkerConfig(host=host), ScriptedEngine, ToyTokenizer(), MemoryStateStore())
    with pytest.raises(ConfigError, match="loopback only"):
        await server.start()


async def test_a_busy_port_is_refused(worker):
    port = int(worker.server.address.rsplit(":", 1)[1])
    server = WorkerServer(WorkerConfig(port=port), ScriptedEngine, ToyTokenizer(), MemoryStateStore())
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
        await server.start()


async def test_an_engine_that_cannot_be_made_ends_the_start_with_its_error():
    def fail():
        raise ModelError("no such folder")

    store = MemoryStateStore()
    server = WorkerServer(WorkerConfig(), fail, ToyTokenizer(), store)
    with pytest.raises(ModelError, match="no such folder"):
        await server.start()
    await server.wait_stopped()
    assert await store.list_workers() == []


async def test_no_text_of_a_call_is_logged(worker, caplog):
    caplog.set_level(logging.DEBUG, "kvservice")
    gateway = await worker.connect()
    await gateway.generate("c1", "confidential")
    await gateway.admission()
    await gateway.answer("c1")
    assert not any("confidential" in str(vars(record)) for record in caplog.records)


async def test_worker_without_a_tier_has_nothing_to_verify(worker):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.stub.Verify(worker_pb2.VerifyRequest(tenant="ann", tenant_tag=b"t" * 16))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "--redis-url" in caught.value.details()
