"""What holds for every method of the registry that drops tokens, and for each one to come."""

import re
from dataclasses import replace

import pytest
import torch

from kvservice.compression.methods import EMPTY, METHODS, Held, Seen, stages_of
from kvservice.config import recipes as config
from kvservice.config.recipes import DENSE, EVICTING, RECALL
from kvservice.engine import Engine  # noqa: F401 -- discovers the methods
from kvservice.errors import ConfigError, FailedPrecondition, NotFound
from kvservice.models.tiny import tiny_model
from kvservice.types import Distant, SamplingParams, SessionId, footprint
from tests.unit.engine.driving import PLENTY, Drive, answering, device_bytes, make_engine, tokens

FP32_LOGITS = 1e-3
KEPT, READ = 64, 160


def kept_by(recipe):
    """In the bytes of 64 tokens there is no room for packed ones beside the latest."""
    return KEPT if recipe.eviction.codec is None else 2 * KEPT


RECIPES = {recipe.name: recipe for recipe in EVICTING}
METHODS.discover("kvservice.methods")


def small(recipe, kept=None, read=READ):
    """The same for short texts."""
    kept = kept_by(recipe) if kept is None else kept
    return replace(recipe, eviction=replace(recipe.eviction, kept_tokens=kept, read_tokens=read))


@pytest.fixture(params=sorted(RECIPES))
def recipe(request):
    return small(RECIPES[request.param])


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=0, row_block=32)


@pytest.fixture(scope="module")
def fast_model():
    return tiny_model(seed=0)


def memory_of(drive, session="s"):
    return drive.engine._sequences.get(SessionId(session))


def answer_of(drive, call="s", index=0):
    return drive.answers[call, index]


# -- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [40, 65, 161, 400])
def test_budgets_are_kept_in_tokens_and_in_bytes(fast_model, recipe, length):
    drive = Drive(make_engine(fast_model))
    call = drive.submit("s", recipe, document=tokens(length), sampling=answering(40))
    while call not in drive.finished:
        drive.step()
        memory = memory_of(drive)
        reads = memory.num_computed < length
        assert memory.held.num_held <= (READ if reads else recipe.eviction.kept_tokens)
        limit = footprint(fast_model.spec.shape, recipe, length + 40, length if reads else 0)
        assert memory.device_bytes <= limit.device_bytes
    assert drive.engine.stats().window_bytes == memory.device_bytes


def test_blocks_of_dropped_tokens_are_free_for_others(fast_model, recipe):
    """Three documents that would not fit together whole, one after the other."""
    steady = footprint(fast_model.spec.shape, recipe, 400).device_bytes
    reading = footprint(fast_model.spec.shape, recipe, 300, 300).device_bytes
    drive = Drive(make_engine(fast_model, room=2 * steady + reading, host_bytes=0))
    for session in "abc":
        drive.ask(session, recipe, document=tokens(300))
    assert all(memory_of(drive, session).num_computed == 300 for session in "abc")
    assert drive.engine.stats().idle_dropped == 0
    for session in "abc":
        drive.engine.release(SessionId(session))
    assert drive.engine.stats().window_bytes == 0


def test_what_is_remembered_of_tokens_is_bounded(fast_model, recipe):
    drive = Drive(make_engine(fast_model))
    drive.ask("s", recipe, document=tokens(400), sampling=answering(30))
    memory, shape = memory_of(drive), fast_model.spec.shape
    numbers = len(memory.held.stages.scorer.remembers) * memory.held.num_slots
    assert memory.held.remembered_bytes == 4 * numbers * shape.num_layers * shape.num_kv_heads


# -- what is computed ------------------------------------------------------------------------------------------------


def test_a_budget_of_all_tokens_is_dense(fast_model, recipe):
    drive = Drive(make_engine(fast_model))
    whole = small(recipe, kept=400, read=500)
    for session, kept in (("dense", DENSE), ("s", whole)):
        drive.ask(session, kept, document=tokens(300))
    scored = [drive.engine.score(SessionId(session), tokens(30, 1)) for session in ("dense", "s")]
    torch.testing.assert_close(scored[1], scored[0], atol=FP32_LOGITS, rtol=FP32_LOGITS)
    assert memory_of(drive).held.num_dropped == 0


def test_a_small_budget_is_not(fast_model, recipe):
    """A negative control: if nothing was dropped, the test above would prove nothing."""
    drive = Drive(make_engine(fast_model))
    for session, kept in (("dense", DENSE), ("s", recipe)):
        drive.ask(session, kept, document=tokens(300))
    scored = [drive.engine.score(SessionId(session), tokens(10, 1)) for session in ("dense", "s")]
    assert (scored[1] - scored[0]).abs().max() > 10 * FP32_LOGITS


@pytest.mark.parametrize("length", [1, 3, 17])
def test_a_text_below_the_sinks_is_dense(fast_model, recipe, length):
    drive = Drive(make_engine(fast_model))
    for session, kept in (("dense", DENSE), ("s", recipe)):
        drive.ask(session, kept, prompt=tokens(length), sampling=answering(20))
    assert [token for token, _ in answer_of(drive)] == [token for token, _ in answer_of(drive, "dense")]


# -- beside others, and through whatever may happen -------------------------------------------------------------------

LOGPROBS = SamplingParams(max_new_tokens=24, ignore_eos=True, logprobs=2)
DOCUMENT, QUESTION = tokens(200), tokens(20, 1)


@pytest.fixture
def alone(model, recipe):
    """Tokens and log-probabilities of an answer with nobody else there."""
    drive = Drive(make_engine(model))
    drive.ask("s", recipe, document=DOCUMENT, prompt=QUESTION, sampling=LOGPROBS)
    return answer_of(drive)


def test_a_row_of_a_batch_is_the_row_alone(model, recipe, alone):
    drive = Drive(make_engine(model, step_tokens=64, max_prefills=8))
    drive.submit("dense", DENSE, document=tokens(90, 2), sampling=answering(40))
    drive.submit("recall", RECALL, document=tokens(350, 2), prompt=QUESTION, sampling=answering(40))
    drive.submit("s", recipe, document=DOCUMENT, prompt=QUESTION, sampling=LOGPROBS)
    for number, other in enumerate(("h2o", "d2o", "streaming_llm")):
        drive.submit(f"other {number}", small(RECIPES[other]), document=tokens(120, number), sampling=answering(30))
    drive.run()
    assert not drive.failed
    assert answer_of(drive) == alone


def test_the_same_again_is_the_same_bit_for_bit(fast_model, recipe):
    answers = []
    for _ in range(2):
        drive = Drive(make_engine(fast_model))
        drive.ask("s", recipe, document=DOCUMENT, prompt=QUESTION, sampling=LOGPROBS)
        answers.append(answer_of(drive))
    assert answers[0] == answers[1]


def test_one_that_makes_room_in_host_memory_goes_on_as_if_nothing_had_happened(model, recipe, alone):
    room = device_bytes(model, 420) + footprint(model.spec.shape, recipe, 264).device_bytes // 2
    drive = Drive(make_engine(model, room=room))
    drive.submit("s", recipe, document=DOCUMENT, prompt=QUESTION, sampling=LOGPROBS)
    drive.until(lambda: len(drive.answers.get(("s", 0), ())) > 4)
    drive.submit("urgent", DENSE, document=tokens(400, 3), sampling=answering(12), priority=1)
    drive.run()
    assert drive.engine.stats().swapped_out == 1
    assert answer_of(drive) == alone
    assert drive.finished["s"].usage.recomputed_tokens == 0


def test_one_that_must_forget_says_what_it_computed_again(model, recipe):
    room = device_bytes(model, 420) + footprint(model.spec.shape, recipe, 264).device_bytes // 2
    drive = Drive(make_engine(model, room=room, host_bytes=0))
    drive.submit("s", recipe, document=DOCUMENT, prompt=QUESTION, sampling=LOGPROBS)
    drive.until(lambda: len(drive.answers.get(("s", 0), ())) > 4)
    drive.submit("urgent", DENSE, document=tokens(400, 3), sampling=answering(12), priority=1)
    drive.run()
    assert drive.engine.stats().forgotten == 1
    assert drive.finished["s"].usage.recomputed_tokens >= len(DOCUMENT) + len(QUESTION)
    assert len(answer_of(drive)) == 24


def test_forks_answer_alike_and_each_for_itself(model, recipe):
    drive = Drive(make_engine(model))
    drive.ask("s", recipe, document=DOCUMENT)
    drive.engine.fork(SessionId("s"), SessionId("twin"))
    shared = memory_of(drive).device_bytes
    assert drive.engine.stats().window_bytes == shared
    for session in ("twin", "s"):
        drive.ask(session, recipe, base=DOCUMENT, prompt=QUESTION, sampling=LOGPROBS)
    assert answer_of(drive, "twin") == answer_of(drive, "s")
    assert memory_of(drive).held.num_held <= recipe.eviction.kept_tokens


def test_a_fork_at_an_earlier_token_is_computed_again_and_says_so(model, recipe):
    drive = Drive(make_engine(model))
    drive.ask("s", recipe, document=DOCUMENT)
    drive.engine.fork(SessionId("s"), SessionId("twin"), 150)
    finished = drive.ask("twin", recipe, base=DOCUMENT[:150], prompt=QUESTION, sampling=LOGPROBS)
    assert finished.usage.recomputed_tokens == 150
    drive.ask("fresh", recipe, document=DOCUMENT[:150], prompt=QUESTION, sampling=LOGPROBS)
    assert answer_of(drive, "twin") == answer_of(drive, "fresh")


def test_each_of_several_answers_drops_tokens_for_itself(model, recipe):
    drive = Drive(make_engine(model))
    several = answering(20, n=3, temperature=1.0, seed=5, logprobs=1)
    drive.ask("s", recipe, document=DOCUMENT, prompt=QUESTION, sampling=several)
    again = Drive(make_engine(model, step_tokens=64))
    again.submit("other", recipe, document=tokens(70, 9), sampling=answering(40))
    again.ask("s", recipe, document=DOCUMENT, prompt=QUESTION, sampling=several)
    for index in range(3):
        assert answer_of(drive, "s", index) == answer_of(again, "s", index)
    assert answer_of(drive, "s", 0) != answer_of(drive, "s", 1)


def test_a_cancelled_answer_leaves_a_session_that_is_computed_again(model, recipe):
    drive = Drive(make_engine(model))
    drive.ask("s", recipe, document=DOCUMENT)
    call = drive.submit("s", recipe, DOCUMENT, prompt=QUESTION, call="cancelled", sampling=LOGPROBS)
    drive.until(lambda: len(drive.answers.get((call, 0), ())) > 3)
    drive.engine.cancel(call)
    drive.run()
    finished = drive.ask("s", recipe, base=DOCUMENT, prompt=QUESTION, sampling=LOGPROBS)
    assert finished.usage.recomputed_tokens == len(DOCUMENT)
    drive.ask("fresh", recipe, document=DOCUMENT, prompt=QUESTION, sampling=LOGPROBS)
    assert answer_of(drive) == answer_of(drive, "fresh")


def test_a_session_goes_on_turn_after_turn_without_computing_anything_again(fast_model, recipe):
    drive = Drive(make_engine(fast_model))
    base = drive.ask("s", recipe, document=DOCUMENT).appended_tokens
    for turn in range(4):
        finished = drive.ask("s", recipe, base=base, prompt=tokens(9, turn), sampling=answering(15))
        assert finished.usage.recomputed_tokens == 0
        base += finished.appended_tokens
        assert memory_of(drive).held.num_held <= recipe.eviction.kept_tokens
    other = Drive(make_engine(fast_model))
    finished = other.ask("s", recipe, base=base, prompt=tokens(9, 9), sampling=answering(3))
    assert finished.usage.recomputed_tokens >= len(base) - 1


def test_a_session_cannot_answer_with_another_recipe(fast_model, recipe):
    drive = Drive(make_engine(fast_model))
    drive.ask("s", recipe, document=DOCUMENT)
    with pytest.raises(FailedPrecondition, match="can't use 'dense' on it"):
        drive.submit("s", DENSE, DOCUMENT, prompt=QUESTION, sampling=answering(3))


# -- methods by themselves -------------------------------------------------------------------------------------------


def made_up(num_kv=2, group=2, count=3, width=40):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_kv, group, count, width, generator=generator)
    positions = torch.stack([torch.randperm(width, generator=generator) for _ in range(num_kv)])
    return Seen(0, logits, logits.softmax(-1), positions, width, 0, 0)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_nothing_that_a_method_is_given_is_changed(name):
    scorer, seen = stages_of(RECIPES[name]).scorer, made_up()
    remembered = {each: torch.rand(2, 40) for each in scorer.remembers}
    held = Held(seen.positions, 43, tokens(43), torch.tensor([20, 20]), 2, remembered, frozenset(range(100)))
    tensors = [seen.logits, seen.probs, seen.positions, held.limits, *remembered.values()]
    before = [tensor.clone() for tensor in tensors]
    told = scorer.observe(seen, remembered)
    scores = scorer.score(held)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))
    assert scores.shape == (2, 40)
    assert not scores.isnan().any()
    assert set(told) == set(scorer.remembers)
    assert all(numbers.shape == (2, 40) and numbers.dtype == torch.float32 for numbers in told.values())


def test_every_method_names_its_paper_and_a_recipe_uses_it():
    every = config.RECIPES.values()
    used = {each.eviction.scorer for each in every if each.eviction} | {each.reuse.plan for each in every if each.reuse}
    for name, method in METHODS:
        assert not method.is_published or re.search(r"arXiv:\d{4}\.\d{5}", method.paper), name
        assert method.summary
        assert method.saves
        assert method.costs
        assert method.deviates
        assert name in used


def test_an_empty_slot_is_the_same_to_methods_and_to_memory():
    from kvservice.kv import sequence

    assert sequence.EMPTY == EMPTY


# -- what can't be ---------------------------------------------------------------------------------------------------

H2O = RECIPES["h2o"]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (replace(H2O, distant=Distant.RESIDENT), "if and only if"),
        (replace(H2O, eviction=None), "if and only if"),
        (replace(H2O, index="key_index", recalled_tokens=64), "can't be recalled"),
        (replace(H2O, shares_keys=True), "must keep the same tokens"),
        (small(H2O, kept=64, read=64), "below read_tokens=64"),
        (small(H2O, kept=0), "at least 1"),
        (replace(H2O, eviction=replace(H2O.eviction, positions="h2o")), "'h2o' has no positions"),
        (replace(H2O, eviction=replace(H2O.eviction, params=(("sinks", 3),))), "no setting 'sinks'"),
        (replace(H2O, eviction=replace(H2O.eviction, codec="h2o", bits=4)), "'h2o' has no codec"),
        (replace(H2O, eviction=replace(H2O.eviction, bits=4)), "0 without"),
        (replace(H2O, eviction=replace(H2O.eviction, codec="more_tokens", bits=3)), "bits=3: must be one of"),
        (replace(H2O, eviction=replace(H2O.eviction, codec="more_tokens", bits=4, merger="d2o")), "in few bits can't"),
    ],
)
def test_impossible_recipes_are_refused_with_the_reason(wrong, why):
    with pytest.raises(ConfigError, match=why):
        stages_of(wrong)


def test_an_unknown_method_is_answered_with_the_known_ones():
    with pytest.raises(NotFound, match="unknown method 'h3o': known are"):
        stages_of(replace(H2O, eviction=replace(H2O.eviction, scorer="h3o")))


def test_a_recipe_that_cannot_be_carried_out_ends_the_start(fast_model, monkeypatch):
    wrong = {"wrong": replace(H2O, name="wrong", shares_keys=True)}
    monkeypatch.setattr("kvservice.engine.engine.RECIPES", wrong)
    with pytest.raises(ConfigError, match="recipe 'wrong'"):
        make_engine(fast_model, room=PLENTY)
