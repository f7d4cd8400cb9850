"""Several answers to one prompt."""

from dataclasses import replace

import pytest
import torch

from kvservice.config.engine import EngineConfig
from kvservice.config.recipes import DENSE, EXACT, RECALL
from kvservice.engine import Engine
from kvservice.engine.ports import NoWriter
from kvservice.errors import BudgetTooSmall, InternalError, Overloaded
from kvservice.models.tiny import tiny_model
from kvservice.types import CallId, FinishReason, Grammar, GrammarKind, SamplingParams, SessionId, footprint
from tests.unit.engine.driving import PLENTY, Drive, answering, device_bytes, make_engine, tokens

RECIPES = [DENSE, EXACT, RECALL]
HOT = {"temperature": 0.9, "seed": 4}
DOCUMENT = tokens(150, seed=1)
PROMPT = (5, 6, 7)


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=0, num_layers=1, row_block=32)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Short answers outgrow their first bytes too."""
    monkeypatch.setattr("kvservice.engine.room.GROWTH_TOKENS", 8)


def asked(drive, sampling, recipe=DENSE, document=DOCUMENT, session="s", **more):
    return drive.submit(session, recipe, document=document, prompt=PROMPT, sampling=sampling, call="c", **more)


def answers(drive):
    return {index: [token for token, _ in answer] for (call, index), answer in drive.answers.items() if call == "c"}


def alone(model, sampling, recipe=DENSE, document=DOCUMENT):
    drive = Drive(make_engine(model))
    asked(drive, sampling, recipe, document)
    return drive.run()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("length", [150, 157, 420])
def test_the_first_answer_is_that_of_a_call_for_one_and_the_others_differ(model, recipe, length):
    """Whether the prompt ends with a block or in it, before or beyond the window."""
    sampling = answering(16, logprobs=2, n=3, **HOT)
    drive = alone(model, sampling, recipe, tokens(length))
    one = alone(model, replace(sampling, n=1), recipe, tokens(length))
    assert drive.answers["c", 0] == one.answers["c", 0]
    found = answers(drive)
    assert sorted(found) == [0, 1, 2]
    assert len({tuple(answer) for answer in found.values()}) == 3
    finished = drive.finished["c"]
    assert finished.finish_reasons == (FinishReason.LENGTH,) * 3
    assert finished.usage.completion_tokens == 48
    assert finished.appended_tokens == (*tokens(length), *PROMPT, *found[0])


def test_answers_drawn_without_heat_are_all_the_same(model):
    found = answers(alone(model, answering(12, n=3)))
    assert found[0] == found[1] == found[2]


def test_an_answer_that_joins_the_session_is_all_that_is_left(model):
    drive = alone(model, answering(20, n=4, **HOT), RECALL, tokens(420))
    engine = drive.engine
    assert engine.headroom().resident_sessions == 1
    finished = drive.finished.pop("c")
    following = drive.ask("s", RECALL, base=finished.appended_tokens, prompt=(9,), sampling=answering(3))
    assert following.usage.recomputed_tokens == 0
    engine.release(SessionId("s"))
    engine.check()
    assert engine.headroom().device_free_bytes == engine.headroom().device_capacity_bytes
    assert engine.headroom().host_free_bytes == engine.headroom().host_capacity_bytes


def test_answers_share_what_they_have_in_common(model):
    drive = Drive(make_engine(model))
    asked(drive, answering(30, n=4, **HOT))
    drive.until(lambda: ("c", 3) in drive.answers)
    column = device_bytes(model, 16)
    # 153 tokens in 10 columns; of the last one each answer has its own, the last forked or not.
    drive.step()
    assert drive.engine.stats().window_bytes == (9 + 4) * column


@pytest.mark.parametrize("index", [0, 1, 2])
def test_each_answer_can_be_stopped_and_the_others_go_on(model, index):
    sampling = answering(20, n=3, **HOT)
    whole = answers(alone(model, sampling))
    drive = Drive(make_engine(model))
    asked(drive, sampling)
    drive.until(lambda: len(drive.answers.get(("c", 2), [])) == 7)
    drive.engine.stop(CallId("c"), index)
    drive.engine.check()
    drive.engine.stop(CallId("c"), index)
    drive.engine.stop(CallId("c"), 9)
    drive.run()
    expected = [FinishReason.LENGTH] * 3
    expected[index] = FinishReason.STOP
    assert drive.finished["c"].finish_reasons == tuple(expected)
    whole[index] = whole[index][:7]
    assert answers(drive) == whole
    assert drive.finished["c"].appended_tokens == (*DOCUMENT, *PROMPT, *whole[0])


def test_each_answer_ends_with_its_own_end_token(model):
    sampling = answering(20, n=3, **HOT)
    whole = answers(alone(model, sampling))
    ending = tiny_model(seed=0, num_layers=1, row_block=32)
    ending.spec = replace(model.spec, eos_token_ids=frozenset({whole[1][4], whole[0][9]}))
    drive = alone(ending, replace(sampling, ignore_eos=False))
    ends = {whole[1][4], whole[0][9]}
    for index, answer in answers(drive).items():
        end = next((i for i, token in enumerate(whole[index]) if token in ends), None)
        assert answer == whole[index][:end]
        reason = drive.finished["c"].finish_reasons[index]
        assert reason is (FinishReason.LENGTH if end is None else FinishReason.EOS)
    assert FinishReason.EOS in drive.finished["c"].finish_reasons


def test_an_answer_may_end_with_its_first_token(model):
    first = answers(alone(model, answering(1)))[0][0]
    ending = tiny_model(seed=0, num_layers=1, row_block=32)
    ending.spec = replace(model.spec, eos_token_ids=frozenset({first}))
    drive = alone(ending, SamplingParams(max_new_tokens=5, n=2))
    assert drive.finished["c"].finish_reasons == (FinishReason.EOS, FinishReason.EOS)
    assert drive.finished["c"].appended_tokens == (*DOCUMENT, *PROMPT)
    assert drive.finished["c"].usage.completion_tokens == 0


@pytest.mark.parametrize("generated", [0, 5])
def test_a_cancelled_call_ends_all_its_answers(model, generated):
    drive = Drive(make_engine(model))
    drive.ask("s", document=DOCUMENT)
    before = drive.engine.headroom()
    sampling = answering(20, n=3, **HOT)
    drive.submit("s", base=DOCUMENT, prompt=PROMPT, sampling=sampling, call="c")
    drive.until(lambda: len(drive.answers.get(("c", 2), [])) >= generated)
    drive.engine.cancel(CallId("c"))
    assert drive.engine.headroom() == before
    drive.run()
    assert drive.finished["c"].finish_reasons == (FinishReason.CANCELLED,) * 3


def test_answers_that_ended_before_a_cancel_keep_their_reason(model):
    drive = Drive(make_engine(model))
    asked(drive, answering(20, n=3, **HOT), keep_partial=True)
    drive.until(lambda: len(drive.answers.get(("c", 2), [])) == 4)
    drive.engine.stop(CallId("c"), 1)
    drive.step()
    drive.engine.cancel(CallId("c"))
    drive.run()
    finished = drive.finished["c"]
    assert finished.finish_reasons == (FinishReason.CANCELLED, FinishReason.STOP, FinishReason.CANCELLED)
    assert finished.appended_tokens == (*DOCUMENT, *PROMPT, *answers(drive)[0])


def test_penalties_and_log_probabilities_are_of_each_answer_alone(model):
    sampling = answering(20, n=2, logprobs=3, frequency_penalty=2.0, repetition_penalty=1.3, **HOT)
    drive = alone(model, sampling)
    for index in (0, 1):
        for token, logprobs in drive.answers["c", index]:
            assert len(logprobs) == 4
            assert logprobs[0].token_id == token
            assert [each.logprob for each in logprobs[1:]] == sorted((e.logprob for e in logprobs[1:]), reverse=True)
            assert all(each.logprob <= 0 for each in logprobs)
    assert drive.answers["c", 0] == alone(model, replace(sampling, n=1)).answers["c", 0]
    assert answers(drive) != answers(alone(model, replace(sampling, frequency_penalty=0.0)))


class Deceived:
    """Allows everything, and takes it ill at the third token."""

    words = torch.full((8,), -1, dtype=torch.int32)
    is_complete = False

    def __init__(self):
        self.num_taken = 0

    def allowed(self):
        return self.words

    def accept(self, token_id):
        self.num_taken += 1
        if self.num_taken == 3:
            raise InternalError(f"token {token_id} doesn't match")


class Compiler:
    def compile(self, grammar):
        return Deceived()


def test_a_grammar_that_refuses_what_it_allowed_fails_its_call_alone(model):
    config = EngineConfig(kv_bytes=64 << 20, host_bytes=0, step_tokens=128, deterministic=model.is_deterministic)
    drive = Drive(Engine(model, config, NoWriter(), Compiler()))
    drive.submit("deceived", prompt=PROMPT, sampling=answering(6, grammar=Grammar(GrammarKind.REGEX, ".*")))
    drive.submit("other", prompt=PROMPT, sampling=answering(6))
    drive.run()
    assert isinstance(drive.failed["deceived"], InternalError)
    assert len(drive.answers["deceived", 0]) == 2
    assert len(drive.answers["other", 0]) == 6


# -- in little room --------------------------------------------------------------------------------------------------


def as_much_as_it_takes(model, recipe, length, num_answers, new):
    """The room below which a call is told that it can never fit."""
    engine = make_engine(model, room=device_bytes(model, 16))
    sampling = answering(new, n=num_answers, **HOT)
    with pytest.raises(BudgetTooSmall) as caught:
        asked(Drive(engine), sampling, recipe, tokens(length))
    return int(str(caught.value).split(" need ")[1].split()[0])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("length", [157, 315])
def test_a_call_for_several_answers_runs_in_exactly_the_room_that_it_was_promised(model, recipe, length):
    sampling = answering(24, n=3, **HOT)
    room = as_much_as_it_takes(model, recipe, length, 3, 24)
    whole = footprint(model.spec.shape, recipe, length + 3 + 24).device_bytes
    assert whole < room <= 3 * whole
    drive = Drive(make_engine(model, room=room))
    asked(drive, sampling, recipe, tokens(length))
    assert answers(drive.run()) == answers(alone(model, sampling, recipe, tokens(length)))
    assert (drive.engine.stats().swapped_out, drive.engine.stats().forgotten) == (0, 0)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("host_bytes", [PLENTY, 0])
def test_answers_that_were_displaced_come_back_one_by_one_where_they_no_longer_share(model, recipe, host_bytes):
    """Each takes room of its own then; the complete ones make room too, though their call isn't over."""
    length = 157
    sampling = answering(24, n=3, **HOT)
    drive = Drive(make_engine(model, room=as_much_as_it_takes(model, recipe, length, 3, 24), host_bytes=host_bytes))
    asked(drive, sampling, recipe, tokens(length))
    drive.until(lambda: len(drive.answers.get(("c", 2), [])) > 5)
    room = drive.engine.headroom().device_capacity_bytes
    drive.submit("high", document=tokens(room // device_bytes(model, 16) * 16), priority=1)
    drive.run()
    assert list(drive.finished) == ["high", "c"]
    assert answers(drive) == answers(alone(model, sampling, recipe, tokens(length)))
    stats = drive.engine.stats()
    assert (stats.swapped_out >= 3, stats.forgotten) == (True, 0) if host_bytes else stats.forgotten >= 3


def test_answers_are_forked_from_a_prefix_that_is_shared_itself_in_room_that_just_holds_it(model):
    room = as_much_as_it_takes(model, RECALL, 420, 3, 40)
    drive = Drive(make_engine(model, room=2 * room))
    drive.ask("other", RECALL, document=tokens(420), tenant_tag=b"one")
    sampling = answering(40, n=3, **HOT)
    asked(drive, sampling, RECALL, tokens(420), tenant_tag=b"one")
    drive.run()
    assert drive.finished["c"].usage.reused_tokens > 0
    assert answers(drive) == answers(alone(model, sampling, RECALL, tokens(420)))


def test_more_answers_than_the_batch_holds_are_refused(model):
    drive = Drive(make_engine(model, max_batch=4))
    asked(drive, answering(5, n=3))
    with pytest.raises(Overloaded, match=r"3 answers are under way, 3 of them this tenant.s; 4 may be"):
        asked(drive, answering(5, n=2), session="t")
    drive.run()


def test_a_step_that_breaks_fails_a_call_once_with_all_its_answers(model, monkeypatch):
    drive = Drive(make_engine(model))
    drive.ask("s", document=DOCUMENT)
    before = drive.engine.headroom()
    drive.submit("s", base=DOCUMENT, prompt=PROMPT, sampling=answering(20, n=3), call="c")
    drive.until(lambda: ("c", 2) in drive.answers)

    def broken(*_):
        raise RuntimeError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(drive.engine._model, "logits", broken)
        events = drive.step()
    assert len(events) == 1
    assert isinstance(drive.failed["c"], InternalError)
    assert drive.engine.headroom() == before
    assert not drive.engine.has_work
