"""Sessions whose layers share distant keys: what the tier below is given of them, and going on from that elsewhere."""

from __future__ import annotations

import pytest
import torch

from kvservice.compression.layer_groups import LayerGroups
from kvservice.compression.sharing import SharingPlan
from kvservice.config.engine import EngineConfig
from kvservice.config.recipes import POD, POD_EXACT
from kvservice.engine import Engine
from kvservice.engine.ports import NoWriter
from kvservice.models.rows import DETERMINISTIC_ROWS
from kvservice.models.tiny import tiny_model
from kvservice.types import CallId, EngineCall, SamplingParams, SessionId
from tests.unit.engine.test_arrivals import Coming, Keeper
from tests.unit.engine.test_engine import append, generate, tokens

LAYERS = 4
# An odd number of followers, so that the last row is half empty.
PLAN = SharingPlan(LayerGroups(((0, 1, 1, 1), (0, 0, 2, 3))))
TAG = b"t" * 16
S = SessionId("s")
DOCUMENT, QUESTION, NEXT, LAST = tokens(450), tokens(12, seed=3), tokens(9, seed=4), tokens(3, seed=5)
RECIPES = pytest.mark.parametrize("recipe", [POD, POD_EXACT], ids=lambda recipe: recipe.name)


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=0, num_layers=LAYERS, row_block=DETERMINISTIC_ROWS)


def engine_of(model, writer=None, *, deterministic=True):
    config = EngineConfig(kv_bytes=64 << 20, host_bytes=64 << 20, step_tokens=128, deterministic=deterministic)
    return Engine(model, config, writer or NoWriter(), sharing=PLAN)


class Asked:
    """A session that was asked once, and the tier below then."""

    def __init__(self, model, recipe) -> None:
        self.recipe, self.keeper = recipe, Keeper()
        self.engine = engine_of(model, self.keeper)
        append(self.engine, "s", recipe, DOCUMENT, tenant_tag=TAG)
        first = generate(self.engine, "s", recipe, DOCUMENT, QUESTION, tenant_tag=TAG)
        self.base = (*DOCUMENT, *first.appended_tokens)
        self.coming = Coming(self.keeper, first.reached)

    def ask(self, engine, session="s", base=None, **more):
        """The end of the call, and what is said next."""
        base = base or self.base
        answer = generate(engine, session, self.recipe, base, NEXT, tenant_tag=TAG, **more)
        following = generate(engine, session, self.recipe, (*base, *answer.appended_tokens), LAST, tenant_tag=TAG)
        return answer, answer.appended_tokens, following.appended_tokens


def kv_of(engine, session="s"):
    memory = engine._sequences.get(SessionId(session))
    return memory.stored_groups(0, memory.num_stored_groups), memory.stored_window()


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@RECIPES
def test_groups_are_stored_without_followers_keys_and_the_window_with_all(model, recipe):
    asked = Asked(model, recipe)
    memory = asked.engine._sequences.get(S)
    groups, window = kv_of(asked.engine)
    assert torch.equal(asked.coming.groups, groups)
    assert groups.shape == (memory.num_stored_groups, 5 + 2, 64, 2, 16)
    assert torch.equal(asked.keeper.window[2], window)
    assert window.shape[:2] == (LAYERS, 2)


@RECIPES
def test_a_session_that_came_whole_goes_on_bit_for_bit(model, recipe):
    asked = Asked(model, recipe)
    elsewhere = engine_of(model)
    answer, *resumed = asked.ask(elsewhere, restored=asked.coming.come())
    assert answer.usage.recomputed_tokens == 0
    asked.engine.fork(S, SessionId("fork"))
    elsewhere.fork(S, SessionId("later"), len(asked.base))
    warm, *went_on = asked.ask(asked.engine)
    assert resumed == went_on
    assert answer.reached == warm.reached
    assert equal(kv_of(elsewhere), kv_of(asked.engine))
    assert elsewhere.telemetry(S).host_bytes == asked.engine.telemetry(S).host_bytes
    _, *forked = asked.ask(asked.engine, "fork")
    assert forked == went_on
    assert equal(kv_of(asked.engine, "fork"), kv_of(asked.engine))
    # Taken back to where keys are in the window yet.
    shorter = asked.base[:-5]
    taken_back = [asked.ask(engine, "s", shorter)[1:] for engine in (asked.engine, elsewhere)]
    assert taken_back[0] == taken_back[1]
    assert equal(kv_of(elsewhere), kv_of(asked.engine))
    for engine in (asked.engine, elsewhere):
        engine.check()


def test_kv_comes_while_others_compute(model):
    asked = Asked(model, POD)
    engine, coming = engine_of(model, deterministic=False), asked.coming
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    engine.submit(EngineCall(CallId("c"), S, POD, asked.base, (), NEXT, sampling, tenant_tag=TAG, restored=coming))
    append(engine, "other", POD, tokens(100))
    for groups in range(len(coming.groups)):
        coming.come(groups=groups, is_done=False)
        engine.step()
        engine.check()
        # They can't be near again, so each has its place at once.
        assert engine._sequences.get(S).num_adopted == groups


@RECIPES
@pytest.mark.parametrize("groups", [None, 1])
def test_without_its_window_a_session_is_computed_behind_its_groups(model, recipe, groups):
    asked = Asked(model, recipe)
    coming = asked.coming.come(window=False, groups=groups)
    engine = engine_of(model, deterministic=False)
    answer, *_ = asked.ask(engine, restored=coming)
    assert answer.usage.recomputed_tokens == len(asked.base) - 1 - 64 * coming.num_arrived
    assert torch.equal(kv_of(engine)[0][: coming.num_arrived], asked.coming.groups[: coming.num_arrived])
    engine.check()


@RECIPES
@pytest.mark.parametrize(("window", "groups"), [(False, None), (True, 1)])
def test_what_must_be_the_same_bit_for_bit_is_computed_whole(model, recipe, window, groups):
    """A window that begins empty isn't what it was: keys of hidden states that saw less."""
    asked = Asked(model, recipe)
    engine = engine_of(model)
    answer, *resumed = asked.ask(engine, restored=asked.coming.come(window=window, groups=groups))
    assert answer.usage.recomputed_tokens == len(asked.base) - 1 - (16 if window else 0)
    _, *went_on = asked.ask(asked.engine)
    assert resumed == went_on
    assert equal(kv_of(engine), kv_of(asked.engine))
    engine.check()


def test_a_session_that_was_taken_back_brings_no_groups_of_its_window(model):
    """More groups are stored than are distant of what is left."""
    asked = Asked(model, POD)
    engine = engine_of(model, deterministic=False)
    base = asked.base[:400]
    answer, *_ = asked.ask(engine, "s", base, restored=asked.coming.come(window=False))
    distant = POD.distant_groups(400)
    assert len(asked.coming.groups) > distant > 0
    assert answer.usage.recomputed_tokens == len(base) - 64 * distant
    engine.check()


def test_what_a_cancelled_call_stored_isnt_taken(model):
    asked = Asked(model, POD)
    engine = asked.engine
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    engine.submit(EngineCall(CallId("c"), S, POD, asked.base, (), tokens(200, seed=6), sampling, tenant_tag=TAG))
    before = len(asked.keeper.groups)
    while len(asked.keeper.groups) == before:
        engine.step()
    engine.cancel(CallId("c"))
    (ended,) = engine.step()
    assert len(asked.keeper.groups) > before
    elsewhere = engine_of(model)
    answer, *resumed = asked.ask(elsewhere, restored=Coming(asked.keeper, ended.reached).come())
    assert answer.usage.recomputed_tokens == 0
    _, *went_on = asked.ask(engine)
    assert resumed == went_on
    assert equal(kv_of(elsewhere), kv_of(engine))
