"""What holds for every method of the registry whose answers look at few of the tokens that are there."""

from dataclasses import replace

import pytest
import torch

from kvservice.compression.methods import METHODS, reuse_of
from kvservice.config.recipes import DENSE, RECALL, REUSING
from kvservice.errors import ConfigError
from kvservice.models.tiny import tiny_model
from kvservice.types import Distant, Reuse, SamplingParams, SessionId
from tests.unit.engine.driving import Drive, answering, device_bytes, make_engine, tokens

FP32_LOGITS = 1e-3
RECIPES = {recipe.name: recipe for recipe in REUSING}
METHODS.discover("kvservice.methods")

FOR_FOUR_LAYERS = {"tidal_decode": (("first", 0), ("correction", 2))}
LOGPROBS = SamplingParams(max_new_tokens=24, ignore_eos=True, logprobs=2)
DOCUMENT, QUESTION = tokens(200), tokens(20, 1)


def small(recipe, num_tokens=24):
    """The same for short texts and few layers."""
    params = (("tokens", num_tokens), *FOR_FOUR_LAYERS.get(recipe.name, ()))
    return replace(recipe, reuse=Reuse(recipe.reuse.plan, params))


@pytest.fixture(params=sorted(RECIPES))
def recipe(request):
    return small(RECIPES[request.param])


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=0, num_layers=4, row_block=32)


@pytest.fixture
def alone(model, recipe):
    drive = Drive(make_engine(model))
    drive.ask("s", recipe, document=DOCUMENT, prompt=QUESTION, sampling=LOGPROBS)
    return drive.answers["s", 0]


def scored(model, recipe):
    drive = Drive(make_engine(model))
    for session, kept in (("dense", DENSE), ("s", recipe)):
        drive.ask(session, kept, document=DOCUMENT)
    looking = drive.engine._sequences.get(SessionId("s")).looking
    return [drive.engine.score(SessionId(session), tokens(20, 2)) for session in ("dense", "s")], looking


def test_looking_at_as_many_tokens_as_there_are_is_dense(model, recipe):
    (dense, ours), looking = scored(model, small(recipe, 400))
    torch.testing.assert_close(ours, dense, atol=FP32_LOGITS, rtol=FP32_LOGITS)
    assert looking.num_reused > 0


def test_looking_at_few_is_not_and_most_queries_of_a_layer_do(model, recipe):
    (dense, ours), looking = scored(model, recipe)
    assert (ours - dense).abs().max() > 10 * FP32_LOGITS
    assert looking.num_looked + looking.num_reused == 20 * 4
    assert looking.num_reused >= looking.num_looked


def test_recycled_attention_that_always_looks_is_dense(model):
    always = replace(RECIPES["recycled_attention"], reuse=Reuse("recycled_attention", (("tokens", 24), ("stride", 1))))
    (dense, ours), looking = scored(model, always)
    torch.testing.assert_close(ours, dense, atol=FP32_LOGITS, rtol=FP32_LOGITS)
    assert looking.num_reused == 0


def test_a_row_of_a_batch_is_the_row_alone(model, recipe, alone):
    drive = Drive(make_engine(model, step_tokens=64, max_prefills=8))
    drive.submit("dense", DENSE, document=tokens(90, 2), sampling=answering(40))
    drive.submit("recall", RECALL, document=tokens(350, 2), prompt=QUESTION, sampling=answering(40))
    drive.submit("s", recipe, document=DOCUMENT, prompt=QUESTION, sampling=LOGPROBS)
    for number, other in enumerate(RECIPES.values()):
        drive.submit(f"other {number}", small(other), document=tokens(120, number), sampling=answering(30))
    drive.run()
    assert not drive.failed
    assert drive.answers["s", 0] == alone


def test_one_that_makes_room_in_host_memory_goes_on_as_if_nothing_had_happened(model, recipe, alone):
    drive = Drive(make_engine(model, room=device_bytes(model, 500)))
    drive.submit("s", recipe, document=DOCUMENT, prompt=QUESTION, sampling=LOGPROBS)
    drive.until(lambda: len(drive.answers.get(("s", 0), ())) > 4)
    drive.submit("urgent", DENSE, document=tokens(400, 3), sampling=answering(12), priority=1)
    drive.run()
    assert drive.engine.stats().swapped_out == 1
    assert drive.answers["s", 0] == alone


def test_a_cancelled_answer_was_never_asked(model, recipe):
    drive = Drive(make_engine(model))
    drive.ask("s", recipe, document=DOCUMENT)
    call = drive.submit("s", recipe, DOCUMENT, prompt=tokens(5, 7), call="cancelled", sampling=LOGPROBS)
    drive.until(lambda: len(drive.answers.get((call, 0), ())) > 3)
    drive.engine.cancel(call)
    drive.run()
    finished = drive.ask("s", recipe, base=DOCUMENT, prompt=QUESTION, sampling=LOGPROBS)
    assert finished.usage.recomputed_tokens == 0
    drive.ask("fresh", recipe, document=DOCUMENT, prompt=QUESTION, sampling=LOGPROBS)
    assert [token for token, _ in drive.answers["s", 0]] == [token for token, _ in drive.answers["fresh", 0]]


def test_a_fork_in_the_middle_goes_on_as_one_that_ended_there(model, recipe):
    drive = Drive(make_engine(model))
    drive.ask("s", recipe, document=DOCUMENT, sampling=answering(10))
    drive.engine.fork(SessionId("s"), SessionId("twin"), 200)
    finished = drive.ask("twin", recipe, base=DOCUMENT, prompt=QUESTION, sampling=LOGPROBS)
    assert finished.usage.recomputed_tokens == 0
    drive.ask("fresh", recipe, document=DOCUMENT, prompt=QUESTION, sampling=LOGPROBS)
    assert [token for token, _ in drive.answers["twin", 0]] == [token for token, _ in drive.answers["fresh", 0]]


def test_its_kv_is_nobody_elses(model, recipe):
    """Tokens of an answer saw few others."""
    drive = Drive(make_engine(model))
    drive.ask("s", recipe, document=DOCUMENT, tenant_tag=b"one")
    finished = drive.ask("other", recipe, document=DOCUMENT, tenant_tag=b"one")
    assert finished.usage.reused_tokens == 0


TIDAL = RECIPES["tidal_decode"]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (replace(TIDAL, distant=Distant.STREAM), "where all KV is on the device"),
        (replace(TIDAL, shares_keys=True), "a layer's own"),
        (replace(TIDAL, reuse=Reuse("h2o")), "'h2o' has no reuse plan"),
        (replace(TIDAL, reuse=Reuse("tidal_decode", (("sinks", 3),))), "no setting 'sinks'"),
        (replace(TIDAL, reuse=Reuse("tidal_decode", (("tokens", 0),))), "at least 1"),
    ],
)
def test_impossible_recipes_are_refused_with_the_reason(wrong, why):
    with pytest.raises(ConfigError, match=why):
        reuse_of(wrong)
