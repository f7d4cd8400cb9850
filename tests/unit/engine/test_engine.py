from dataclasses import replace

import pytest
import torch

from kvservice.config.engine import EngineConfig
from kvservice.config.recipes import DENSE, EXACT, RECALL
from kvservice.engine import Engine
from kvservice.engine.ports import NoWriter
from kvservice.errors import (
    BudgetTooSmall,
    ConfigError,
    Conflict,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
)
from kvservice.models.tiny import tiny_model
from kvservice.types import (
    CallId,
    EngineCall,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    OnMiss,
    ProgressEvent,
    SamplingParams,
    SessionId,
    TokenEvent,
    footprint,
)
from tests.unit.engine.reference_model import ReferenceSequence

FP32_LOGITS = 1e-3
RECIPES = [DENSE, EXACT, RECALL]


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=0)


def make_engine(model, **settings):
    defaults = {"kv_bytes": 64 << 20, "host_bytes": 64 << 20, "step_tokens": 128}
    return Engine(model, EngineConfig(**{**defaults, **settings}), NoWriter())


@pytest.fixture
def engine(model):
    engine = make_engine(model)
    yield engine
    engine.check()


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 250, (count,), generator=generator).tolist())


def run(engine, *call_ids):
    """Steps until the calls have ended; returns all events."""
    events, open_calls = [], set(call_ids)
    while open_calls:
        assert engine.has_work
        for event in engine.step():
            events.append(event)
            if isinstance(event, FinishedEvent | FailedEvent):
                open_calls.discard(event.call_id)
        engine.check()
    return events


def append(engine, session, recipe, document, base=(), call="append", **more):
    engine.submit(EngineCall(CallId(call), SessionId(session), recipe, base, document_tokens=document, **more))
    return run(engine, call)[-1]


def generate(engine, session, recipe, base, prompt, new=8, call="generate", sampling=None, **more):
    sampling = sampling or SamplingParams(max_new_tokens=new, ignore_eos=True)
    engine.submit(
        EngineCall(CallId(call), SessionId(session), recipe, base, prompt_tokens=prompt, sampling=sampling, **more)
    )
    return run(engine, call)[-1]


# -- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("length", [5, 16, 17, 336, 337, 700])
def test_logits_equal_the_slow_reference(engine, model, recipe, length):
    document, continuation = tokens(length), tokens(70, seed=1)
    append(engine, "s", recipe, document)
    ours = engine.score(SessionId("s"), continuation)
    reference = ReferenceSequence(model, recipe)
    reference.read(document, selects=False)
    torch.testing.assert_close(ours, reference.read(continuation, selects=True), atol=FP32_LOGITS, rtol=FP32_LOGITS)


def test_exact_equals_dense(engine):
    document, continuation = tokens(900), tokens(30, seed=1)
    append(engine, "d", DENSE, document)
    append(engine, "e", EXACT, document)
    torch.testing.assert_close(
        engine.score(SessionId("e"), continuation),
        engine.score(SessionId("d"), continuation),
        atol=FP32_LOGITS,
        rtol=FP32_LOGITS,
    )


def test_recall_of_few_tokens_differs_from_dense(engine):
    """A negative control: were every token attended to, the tests above would prove nothing."""
    sparse = replace(RECALL, recalled_tokens=16)
    document, continuation = tokens(900), tokens(10, seed=1)
    append(engine, "d", DENSE, document)
    append(engine, "r", sparse, document)
    difference = engine.score(SessionId("r"), continuation) - engine.score(SessionId("d"), continuation)
    assert difference.abs().max() > 10 * FP32_LOGITS


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("question", [1, 24, 150])
def test_a_question_read_in_chunks_equals_one_read_token_by_token(engine, model, recipe, question):
    document, prompt = tokens(660), tokens(question, seed=2)
    append(engine, "s", recipe, document)
    finished = generate(engine, "s", recipe, document, prompt, new=6)
    reference = ReferenceSequence(model, recipe)
    reference.read(document, selects=False)
    logits = reference.read(prompt, selects=True)[-1:]
    answer = []
    for _ in range(6):
        answer.append(int(logits[-1].argmax()))
        logits = reference.read(answer[-1:], selects=True)
    assert finished.appended_tokens == (*prompt, *answer)


@pytest.mark.parametrize("chunk", [64, 100, 512])
def test_prefill_gives_the_same_answer_whatever_the_chunk(model, chunk):
    engine = make_engine(model, step_tokens=chunk)
    document = tokens(700)
    append(engine, "s", RECALL, document)
    answer = generate(engine, "s", RECALL, document, tokens(20, seed=3)).appended_tokens
    other = make_engine(model, step_tokens=256)
    append(other, "s", RECALL, document)
    assert answer == generate(other, "s", RECALL, document, tokens(20, seed=3)).appended_tokens


def test_sequences_of_all_recipes_share_a_step_without_touching_one_another(model):
    lengths = {"dense": (DENSE, 400), "exact": (EXACT, 650), "recall": (RECALL, 777), "short": (RECALL, 30)}
    alone = {}
    for name, (recipe, length) in lengths.items():
        engine = make_engine(model)
        append(engine, name, recipe, tokens(length, seed=length))
        prompt = tokens(10, seed=9)
        alone[name] = generate(engine, name, recipe, tokens(length, seed=length), prompt, new=90).appended_tokens
    engine = make_engine(model)
    for name, (recipe, length) in lengths.items():
        append(engine, name, recipe, tokens(length, seed=length))
    for name, (recipe, length) in lengths.items():
        engine.submit(
            EngineCall(
                CallId(name),
                SessionId(name),
                recipe,
                tokens(length, seed=length),
                prompt_tokens=tokens(10, seed=9),
                sampling=SamplingParams(max_new_tokens=90, ignore_eos=True),
            )
        )
    events = run(engine, *lengths)
    together = {e.call_id: e.appended_tokens for e in events if isinstance(e, FinishedEvent)}
    assert together == alone


def test_a_second_question_goes_on_where_the_first_answer_ended(engine, model):
    document, first, second = tokens(500), tokens(12, seed=4), tokens(9, seed=5)
    append(engine, "s", RECALL, document)
    answer = generate(engine, "s", RECALL, document, first).appended_tokens
    finished = generate(engine, "s", RECALL, document + answer, second)
    assert finished.usage.cached_tokens == len(document + answer)
    assert finished.usage.recomputed_tokens == 0
    reference = ReferenceSequence(model, RECALL)
    reference.read(document, selects=False)
    reference.read(answer, selects=True)
    logits = reference.read(second, selects=True)
    assert finished.appended_tokens[len(second)] == int(logits[-1].argmax())


def test_empty_question_goes_on_from_the_document(engine, model):
    document = tokens(400)
    append(engine, "s", RECALL, document)
    finished = generate(engine, "s", RECALL, document, (), new=1)
    reference = ReferenceSequence(model, RECALL)
    reference.read(document[:-1], selects=False)
    assert finished.appended_tokens == (int(reference.read(document[-1:], selects=True)[-1].argmax()),)


def test_one_call_may_read_a_document_answer_and_leave_nothing(engine):
    document, prompt = tokens(700), tokens(8, seed=6)
    append(engine, "kept", RECALL, document)
    expected = generate(engine, "kept", RECALL, document, prompt)
    engine.release(SessionId("kept"))
    engine.submit(
        EngineCall(
            CallId("c"),
            SessionId("once"),
            RECALL,
            (),
            document_tokens=document,
            prompt_tokens=prompt,
            sampling=SamplingParams(max_new_tokens=8, ignore_eos=True),
            retain=False,
        )
    )
    finished = run(engine, "c")[-1]
    assert finished.appended_tokens == document + expected.appended_tokens
    assert engine.headroom().device_free_bytes == engine.headroom().device_capacity_bytes


# -- the cache of a session ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_session_the_engine_never_saw_is_recomputed_and_says_so(model, recipe):
    document, prompt = tokens(600), tokens(10, seed=7)
    warm, cold = make_engine(model), make_engine(model)
    append(warm, "s", recipe, document)
    expected = generate(warm, "s", recipe, document, prompt)
    finished = generate(cold, "s", recipe, document, prompt)
    assert finished.appended_tokens == expected.appended_tokens
    assert (finished.usage.recomputed_tokens, expected.usage.recomputed_tokens) == (600, 0)


def test_kv_of_a_changed_history_is_not_used(engine, model):
    document = tokens(600)
    append(engine, "s", RECALL, document)
    changed = document[:450] + tokens(100, seed=8)
    finished = generate(engine, "s", RECALL, changed, tokens(5, seed=9))
    assert finished.usage.recomputed_tokens == 100
    fresh = make_engine(model)
    append(fresh, "s", RECALL, changed)
    assert finished.appended_tokens == generate(fresh, "s", RECALL, changed, tokens(5, seed=9)).appended_tokens


def test_missing_kv_fails_the_call_when_the_session_says_so(engine):
    with pytest.raises(FailedPrecondition, match="600 tokens is held nowhere"):
        generate(engine, "s", RECALL, tokens(600), tokens(5), on_miss=OnMiss.FAIL)
    assert engine.headroom().resident_sessions == 0


def test_idle_sessions_make_room_for_a_new_one_and_come_back(model):
    one = footprint(model.spec.shape, DENSE, 700).device_bytes
    engine = make_engine(model, step_tokens=64)
    room = engine.headroom().device_capacity_bytes
    engine = make_engine(model, step_tokens=64, kv_bytes=(64 << 20) - room + 2 * one)
    for name in "abc":
        append(engine, name, DENSE, tokens(650, seed=ord(name)))
    assert engine.stats().idle_swapped_out == 1
    assert engine.headroom().resident_sessions == 3
    for name in "acb":
        finished = generate(engine, name, DENSE, tokens(650, seed=ord(name)), tokens(5), new=4)
        assert finished.usage.recomputed_tokens == 0


def test_idle_sessions_are_dropped_where_the_host_has_no_room_either(model):
    one = footprint(model.spec.shape, DENSE, 700).device_bytes
    engine = make_engine(model, step_tokens=64)
    room = engine.headroom().device_capacity_bytes
    engine = make_engine(model, step_tokens=64, kv_bytes=(64 << 20) - room + 2 * one, host_bytes=one // 2)
    for name in "abc":
        append(engine, name, DENSE, tokens(650, seed=ord(name)))
    assert engine.headroom().resident_sessions == 2
    assert engine.stats().idle_dropped == 1
    finished = generate(engine, "a", DENSE, tokens(650, seed=ord("a")), tokens(5), new=4)
    assert finished.usage.recomputed_tokens == 650
    assert generate(engine, "c", DENSE, tokens(650, seed=ord("c")), tokens(5), new=4).usage.recomputed_tokens == 0


def test_release_frees_all_bytes_of_a_session(engine):
    append(engine, "s", RECALL, tokens(700))
    device, host = engine.release(SessionId("s"))
    assert device > 0
    assert host == RECALL.distant_groups(700) * 64 * engine.info.shape.kv_bytes_per_token
    assert engine.headroom().device_free_bytes == engine.headroom().device_capacity_bytes
    assert engine.release(SessionId("s")) == (0, 0)


# -- cancel, stop, fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("steps", [0, 1, 2, 70])
def test_a_cancelled_answer_leaves_the_session_as_before(engine, recipe, steps):
    document, prompt = tokens(600), tokens(10, seed=1)
    append(engine, "s", recipe, document)
    before = engine.stats()
    sampling = SamplingParams(max_new_tokens=100, ignore_eos=True)
    engine.submit(EngineCall(CallId("c"), SessionId("s"), recipe, document, prompt_tokens=prompt, sampling=sampling))
    for _ in range(steps):
        engine.step()
    engine.cancel(CallId("c"))
    after = engine.stats()
    assert (after.window_bytes, after.index_bytes, after.host_bytes) == (
        before.window_bytes,
        before.index_bytes,
        before.host_bytes,
    )
    assert after.headroom.device_free_bytes == before.headroom.device_free_bytes
    finished = engine.step()[-1]
    assert (finished.finish_reason, finished.appended_tokens) == (FinishReason.CANCELLED, ())
    finished = generate(engine, "s", recipe, document, prompt)
    assert finished.usage.recomputed_tokens == 0


def test_an_answer_after_a_cancelled_one_is_that_of_a_session_that_never_saw_it(engine, model):
    document, prompt = tokens(600), tokens(10, seed=1)
    append(engine, "s", RECALL, document)
    sampling = SamplingParams(max_new_tokens=200, ignore_eos=True)
    engine.submit(
        EngineCall(CallId("c"), SessionId("s"), RECALL, document, prompt_tokens=tokens(30, 5), sampling=sampling)
    )
    for _ in range(150):
        engine.step()
    engine.cancel(CallId("c"))
    engine.step()
    fresh = make_engine(model)
    append(fresh, "s", RECALL, document)
    expected = generate(fresh, "s", RECALL, document, prompt, new=80)
    assert generate(engine, "s", RECALL, document, prompt, new=80).appended_tokens == expected.appended_tokens


def test_a_cancelled_prefill_leaves_the_session_as_before(engine):
    document = tokens(500)
    append(engine, "s", RECALL, document)
    before = engine.stats()
    engine.submit(EngineCall(CallId("c"), SessionId("s"), RECALL, document, document_tokens=tokens(900, seed=2)))
    engine.step()
    engine.step()
    engine.cancel(CallId("c"))
    engine.check()
    assert (engine.stats().host_bytes, engine.stats().window_bytes) == (before.host_bytes, before.window_bytes)


def test_a_cancelled_recompute_keeps_what_is_done_and_counts_the_rest(engine):
    document = tokens(600)
    sampling = SamplingParams(max_new_tokens=4, ignore_eos=True)
    engine.submit(EngineCall(CallId("c"), SessionId("s"), RECALL, document, prompt_tokens=tokens(5), sampling=sampling))
    engine.step()
    engine.cancel(CallId("c"))
    engine.step()
    finished = generate(engine, "s", RECALL, document, tokens(5), new=4)
    assert 0 < finished.usage.recomputed_tokens < 600
    fresh = generate(engine, "t", RECALL, document, tokens(5), new=4)
    assert finished.appended_tokens == fresh.appended_tokens


def test_keep_partial_keeps_what_was_generated(engine):
    document, prompt = tokens(400), tokens(6, seed=1)
    append(engine, "s", RECALL, document)
    sampling = SamplingParams(max_new_tokens=50, ignore_eos=True)
    call = EngineCall(
        CallId("c"), SessionId("s"), RECALL, document, prompt_tokens=prompt, sampling=sampling, keep_partial=True
    )
    engine.submit(call)
    seen = []
    while len(seen) < 7:
        seen += [event.token_id for event in engine.step() if isinstance(event, TokenEvent)]
    engine.cancel(CallId("c"))
    finished = engine.step()[-1]
    assert finished.appended_tokens == (*prompt, *seen)
    following = generate(engine, "s", RECALL, document + finished.appended_tokens, prompt)
    assert following.usage.recomputed_tokens == 0


def test_stop_keeps_the_answer_so_far(engine):
    document = tokens(100)
    append(engine, "s", RECALL, document)
    sampling = SamplingParams(max_new_tokens=50, ignore_eos=True)
    engine.submit(EngineCall(CallId("c"), SessionId("s"), RECALL, document, prompt_tokens=(5,), sampling=sampling))
    engine.step()
    engine.step()
    engine.stop(CallId("c"))
    finished = engine.step()[-1]
    assert finished.finish_reason is FinishReason.STOP
    assert len(finished.appended_tokens) == 3


def test_eos_ends_the_answer_and_is_no_part_of_it(model):
    engine = make_engine(model)
    document = tokens(60)
    append(engine, "s", DENSE, document)
    answer = generate(engine, "s", DENSE, document, (7,), new=12).appended_tokens[1:]
    ending = replace(model.spec, eos_token_ids=frozenset({answer[5]}))
    first = answer.index(answer[5])
    model_with_eos = tiny_model(seed=0)
    model_with_eos.spec = ending
    engine = make_engine(model_with_eos)
    append(engine, "s", DENSE, document)
    finished = generate(engine, "s", DENSE, document, (7,), sampling=SamplingParams(max_new_tokens=12))
    assert finished.finish_reason is FinishReason.EOS
    assert finished.appended_tokens == (7, *answer[:first])


def test_a_step_that_breaks_fails_its_calls_and_the_session_stays_usable(engine, monkeypatch):
    document = tokens(500)
    append(engine, "s", RECALL, document)
    before = engine.stats()

    def broken(*_):
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patched:
        patched.setattr(engine._model, "logits", broken)
        engine.submit(
            EngineCall(CallId("c"), SessionId("s"), RECALL, document, prompt_tokens=(5,), sampling=SamplingParams())
        )
        failed = engine.step()[-1]
    assert isinstance(failed, FailedEvent)
    assert isinstance(failed.error, InternalError)
    assert "secret" not in str(failed.error)
    assert engine.stats().window_bytes == before.window_bytes
    assert generate(engine, "s", RECALL, document, (5,)).usage.recomputed_tokens == 0


# -- refusals --------------------------------------------------------------------------------------------------------


def refused(engine, error, **call):
    before = (engine.headroom(), engine.stats())
    defaults = {"call_id": CallId("x"), "session_id": SessionId("x"), "recipe": RECALL, "base_tokens": ()}
    with pytest.raises(error) as caught:
        engine.submit(EngineCall(**{**defaults, **call}))
    assert (engine.headroom(), engine.stats()) == before, "a refusal changes nothing"
    return str(caught.value)


def test_more_tokens_than_positions_are_refused(engine, model):
    limit = model.spec.shape.max_positions
    message = refused(engine, PromptTooLong, document_tokens=tokens(limit + 1))
    assert f"{limit} positions" in message
    refused(engine, PromptTooLong, document_tokens=tokens(limit), prompt_tokens=(5,), sampling=SamplingParams())


def test_no_tokens_at_all_are_refused(engine):
    refused(engine, InvalidRequest)
    refused(engine, InvalidRequest, base_tokens=tokens(5))
    refused(engine, InvalidRequest, sampling=SamplingParams())


def test_token_ids_outside_the_vocabulary_are_refused(engine):
    assert "token id 100000" in refused(engine, InvalidRequest, document_tokens=(5, 100000))


def test_a_second_call_on_a_busy_session_is_refused(engine):
    engine.submit(EngineCall(CallId("c"), SessionId("x"), RECALL, (), document_tokens=tokens(50)))
    refused(engine, Conflict, document_tokens=tokens(5))
    engine.cancel(CallId("c"))


def test_a_sequence_that_can_never_fit_is_told_how_much_it_needs(model):
    room = make_engine(model, step_tokens=64).headroom().device_capacity_bytes
    enough = footprint(model.spec.shape, RECALL, 500).device_bytes
    engine = make_engine(model, step_tokens=64, kv_bytes=(64 << 20) - room + enough)
    needed = footprint(model.spec.shape, DENSE, 2000)
    message = refused(engine, BudgetTooSmall, recipe=DENSE, document_tokens=tokens(2000))
    assert str(needed.device_bytes) in message
    append(engine, "s", RECALL, tokens(500))


def test_host_bytes_bound_the_tier(model):
    engine = make_engine(model, host_bytes=0)
    message = refused(engine, BudgetTooSmall, recipe=RECALL, document_tokens=tokens(700))
    assert "host_bytes" in message
    append(engine, "s", RECALL, tokens(300))


def test_a_sequence_that_fits_later_is_refused_as_retryable(model):
    engine = make_engine(model, step_tokens=64)
    room = engine.headroom().device_capacity_bytes
    one = footprint(model.spec.shape, DENSE, 700).device_bytes
    engine = make_engine(model, step_tokens=64, kv_bytes=(64 << 20) - room + one)
    engine.submit(EngineCall(CallId("c"), SessionId("a"), DENSE, (), document_tokens=tokens(700)))
    refused(engine, Overloaded, recipe=DENSE, document_tokens=tokens(700))
    run(engine, "c")
    append(engine, "b", DENSE, tokens(700))


def test_an_arena_without_room_for_the_workspace_is_refused_at_the_start(model):
    with pytest.raises(ConfigError, match="prefill workspace alone takes"):
        make_engine(model, kv_bytes=1 << 16)


def test_a_recipe_that_needs_what_was_dropped_is_refused(engine):
    document = tokens(600)
    append(engine, "x", RECALL, document)
    message = refused(
        engine,
        FailedPrecondition,
        recipe=DENSE,
        base_tokens=document,
        prompt_tokens=(5,),
        sampling=SamplingParams(),
    )
    assert "'recall'" in message


def test_a_recall_session_answers_exactly_when_asked_to(engine, model):
    document, prompt = tokens(700), tokens(10, seed=2)
    append(engine, "s", RECALL, document)
    append(engine, "d", DENSE, document)
    exact = generate(engine, "s", EXACT, document, prompt, new=5)
    dense = generate(engine, "d", DENSE, document, prompt, new=5)
    assert exact.appended_tokens == dense.appended_tokens
    assert exact.telemetry.streamed_bytes > 0


def test_a_recall_session_that_was_gone_when_it_answered_exactly_recalls_again_afterwards(engine):
    document, prompt = tokens(700), tokens(10, seed=2)
    exact = generate(engine, "s", EXACT, document, prompt, new=5)
    assert exact.usage.recomputed_tokens == 700
    record = document + exact.appended_tokens
    finished = generate(engine, "s", RECALL, record, prompt, new=5)
    assert finished.usage.recomputed_tokens == len(record)
    assert finished.appended_tokens == generate(engine, "t", RECALL, record, prompt, new=5).appended_tokens


# -- sight -----------------------------------------------------------------------------------------------------------


def test_progress_counts_up_to_all_tokens(engine):
    engine.submit(EngineCall(CallId("c"), SessionId("s"), RECALL, (), document_tokens=tokens(300)))
    progress = [(e.done_tokens, e.total_tokens) for e in run(engine, "c") if isinstance(e, ProgressEvent)]
    assert progress == [(128, 300), (256, 300), (300, 300)]


def test_telemetry_counts_only_what_moves(engine):
    document = tokens(900)
    append(engine, "s", RECALL, document)
    finished = generate(engine, "s", RECALL, document, tokens(4, seed=1), new=20)
    kv, shape = finished.telemetry, engine.info.shape
    cells = shape.num_layers * shape.num_kv_heads
    # 4 question tokens recall through staging; the first token of the answer comes from the last of them.
    assert kv.recall_lookups == 19 * cells * 128
    assert 0 < kv.recall_hits < kv.recall_lookups
    row_bytes = 2 * shape.head_dim * shape.dtype_bytes
    assert kv.recalled_bytes == (kv.recall_lookups - kv.recall_hits + 4 * cells * 128) * row_bytes
    assert kv.streamed_bytes == 0
    assert kv.host_bytes == RECALL.distant_groups(923) * 64 * shape.kv_bytes_per_token


def test_host_kv_is_really_what_recall_reads(engine):
    """A negative control: with host KV poisoned, the logits change."""
    document = tokens(900)
    append(engine, "s", RECALL, document)
    clean = engine.score(SessionId("s"), (5,))
    append(engine, "t", RECALL, document)
    engine._sequences._host._groups.zero_()
    assert not torch.allclose(engine.score(SessionId("t"), (5,)), clean, atol=FP32_LOGITS)


class StuckWriter(NoWriter):
    """A tier that is behind."""

    def __init__(self):
        self.room = False
        self.waits = 0

    def has_room(self, num_groups):
        return self.room

    def begins_at(self, tenant_tag, session_id, recipe, first_group):
        return first_group

    def wait_for_room(self, num_groups, timeout_s):
        self.waits += 1


def test_prefill_waits_while_the_tier_is_behind_and_decoding_goes_on(model):
    writer = StuckWriter()
    writer.room = True
    engine = Engine(model, EngineConfig(kv_bytes=64 << 20, host_bytes=64 << 20, step_tokens=128), writer)
    append(engine, "s", RECALL, tokens(100))
    sampling = SamplingParams(max_new_tokens=5, ignore_eos=True)
    engine.submit(EngineCall(CallId("g"), SessionId("s"), RECALL, tokens(100), prompt_tokens=(5,), sampling=sampling))
    engine.step()
    writer.room = False
    engine.submit(EngineCall(CallId("p"), SessionId("t"), RECALL, (), document_tokens=tokens(300)))
    events = run(engine, "g")
    assert not any(event.call_id == "p" for event in events)
    engine.step()
    assert writer.waits == 1
    writer.room = True
    run(engine, "p")
