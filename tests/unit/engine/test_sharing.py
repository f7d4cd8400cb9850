from dataclasses import replace

import pytest
import torch

from kvservice.compression.layer_groups import LayerGroups, uniform_groups
from kvservice.compression.sharing import SharingMode, SharingPlan
from kvservice.config.engine import EngineConfig
from kvservice.config.recipes import EXACT, POD, POD_EXACT, RECALL
from kvservice.engine import Engine
from kvservice.engine.ports import NoWriter
from kvservice.errors import ConfigError, FailedPrecondition, InvalidRequest
from kvservice.models.rows import DETERMINISTIC_ROWS
from kvservice.models.tiny import tiny_model
from kvservice.types import CallId, EngineCall, SessionId, footprint
from tests.unit.engine.driving import Drive, answering, tokens
from tests.unit.engine.shared_reference import SharedReference

FP32_LOGITS = 1e-3
LAYERS = 4

# Layer 1 has an anchor and a follower, layer 2 a follower of layer 0 and an anchor, layer 3 followers alone.
MIXED = LayerGroups(((0, 1, 1, 1), (0, 0, 2, 2)))
# By whole layers, and an odd number of followers in one KV head only.
WHOLE = LayerGroups(((0, 0, 2, 2), (0, 0, 2, 2)))
ODD = LayerGroups(((0, 1, 2, 2), (0, 1, 2, 3)))
ALONE = uniform_groups(LAYERS, 2, LAYERS * 2)

RECIPES = [POD_EXACT, POD]

# With a short window, so that the slow reference has little to read.
SMALL = [replace(POD_EXACT, window_tokens=64), replace(POD, window_tokens=64, recalled_tokens=32)]


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=0, num_layers=LAYERS)


@pytest.fixture(scope="module")
def fixed_model():
    return tiny_model(seed=0, num_layers=LAYERS, row_block=DETERMINISTIC_ROWS)


def make_engine(model, groups=MIXED, mode=SharingMode.SCORE, skip_above=None, **settings):
    settings = {"kv_bytes": 64 << 20, "host_bytes": 64 << 20, "step_tokens": 128, **settings}
    config = EngineConfig(deterministic=model.is_deterministic, **settings)
    plan = None if groups is None else SharingPlan(groups, mode, skip_above)
    return Engine(model, config, NoWriter(), sharing=plan)


def read(engine, recipe, document, session="s"):
    Drive(engine).ask(session, recipe, document=document)
    return SessionId(session)


def scores(engine, recipe, document, continuation):
    session = read(engine, recipe, document)
    logits = engine.score(session, continuation)
    engine.check()
    return logits


# -- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shared", "plain"), [(POD_EXACT, EXACT), (POD, RECALL)], ids=["exact", "recall"])
def test_where_every_cell_is_its_own_anchor_nothing_changes_in_any_bit(model, shared, plain):
    """A map of delta above 1. Keys, values, index, slots: all lie and are read as sharing has it."""
    document, continuation = tokens(500), tokens(5, seed=1)
    expected = scores(make_engine(model, None), plain, document, continuation)
    for mode in SharingMode:
        assert torch.equal(scores(make_engine(model, ALONE, mode), shared, document, continuation), expected)


@pytest.mark.parametrize("recipe", SMALL, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("mode", SharingMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("groups", [MIXED, WHOLE, ODD], ids=["mixed", "whole", "odd"])
def test_logits_equal_the_slow_reference(model, recipe, mode, groups):
    document, continuation = tokens(180), tokens(70, seed=1)
    ours = scores(make_engine(model, groups, mode), recipe, document, continuation)
    reference = SharedReference(model, recipe, SharingPlan(groups, mode))
    reference.read(document, selects=False)
    torch.testing.assert_close(ours, reference.read(continuation, selects=True), atol=FP32_LOGITS, rtol=FP32_LOGITS)


def test_sharing_changes_what_is_computed(model):
    """A negative control: were nothing shared, the tests above would prove nothing."""
    document, continuation = tokens(460), tokens(3, seed=1)
    dense = scores(make_engine(model), EXACT, document, continuation)
    by_score = scores(make_engine(model), POD_EXACT, document, continuation)
    by_key = scores(make_engine(model, mode=SharingMode.KEY), POD_EXACT, document, continuation)
    assert (by_score - dense).abs().max() > 10 * FP32_LOGITS
    assert (by_key - by_score).abs().max() > 10 * FP32_LOGITS


@pytest.mark.parametrize("recipe", SMALL, ids=lambda recipe: recipe.name)
def test_a_question_is_answered_as_the_slow_reference_does(model, recipe):
    """Its tokens come in one step, so that several queries recall at a time."""
    document, question = tokens(180), tokens(30, seed=1)
    drive = Drive(make_engine(model))
    drive.ask("s", recipe, document=document)
    answer = drive.submit("s", recipe, document, prompt=question, call="q", sampling=answering(4, logprobs=0))
    drive.run()
    reference = SharedReference(model, recipe, SharingPlan(MIXED))
    reference.read(document, selects=False)
    logits = reference.read(question, selects=True)[-1:]
    for token, logprobs in drive.answers[answer, 0]:
        assert token == int(logits.argmax())
        assert logprobs[0].logprob == pytest.approx(float(logits.log_softmax(-1).max()), abs=FP32_LOGITS)
        logits = reference.read([token], selects=True)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_no_bit_depends_on_how_a_document_was_cut_into_steps(fixed_model, recipe):
    document, continuation = tokens(400), tokens(5, seed=1)
    logits = [
        scores(make_engine(fixed_model, step_tokens=step), recipe, document, continuation) for step in (64, 192, 512)
    ]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_several_sequences_share_one_step(model):
    """Anchors' queries of all of them wait in one workspace."""
    drive = Drive(make_engine(model, step_tokens=256))
    plan = [("a", POD, 400), ("b", POD_EXACT, 350), ("c", RECALL, 350), ("d", POD, 10)]
    for name, recipe, length in plan:
        drive.submit(name, recipe, document=tokens(length), prompt=tokens(5, 1), sampling=answering(4))
    together = drive.run().answers
    for name, recipe, length in plan:
        alone = Drive(make_engine(model))
        alone.submit(name, recipe, document=tokens(length), prompt=tokens(5, 1), sampling=answering(4))
        alone.run()
        assert [token for token, _ in together[name, 0]] == [token for token, _ in alone.answers[name, 0]]


# -- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", SMALL, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("skip_above", [0.4, 0.6])
def test_rows_that_hardly_look_far_skip_it_as_in_the_slow_reference(model, recipe, skip_above):
    document, continuation = tokens(180), tokens(12, seed=1)
    engine = make_engine(model, skip_above=skip_above)
    ours = scores(engine, recipe, document, continuation)
    reference = SharedReference(model, recipe, SharingPlan(MIXED, skip_above=skip_above))
    reference.read(document, selects=False)
    torch.testing.assert_close(ours, reference.read(continuation, selects=True), atol=FP32_LOGITS, rtol=FP32_LOGITS)
    counters = engine._sequences.get(SessionId("s")).counters
    assert 0 < counters.skipped < counters.gated


def test_a_gate_that_isnt_known_beforehand_is_refused():
    with pytest.raises(ConfigError, match="with sharing 'key'"):
        SharingPlan(MIXED, SharingMode.KEY, skip_above=0.7)
    with pytest.raises(ConfigError, match=r"skip_above=1\.5"):
        SharingPlan(MIXED, skip_above=1.5)


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [MIXED, WHOLE, ODD], ids=["mixed", "whole", "odd"])
def test_bytes_of_a_session_fall_by_the_identity(model, groups):
    document = tokens(1500)
    kept = {}
    for recipe in (RECALL, POD):
        engine = make_engine(model, groups)
        read(engine, recipe, document)
        engine.score(SessionId("s"), tokens(3, 1))
        kept[recipe.name] = engine.telemetry(SessionId("s"))
        promised = footprint(engine.info.shape, recipe, 1503)
        assert kept[recipe.name].host_bytes <= promised.host_bytes
        assert kept[recipe.name].slot_bytes == promised.slot_bytes
        assert engine.stats().host_bytes == kept[recipe.name].host_bytes
    whole, shared = kept["recall"], kept["pod"]
    row = 64 * 16 * 4 * POD.distant_groups(1503)
    # Of an odd number of followers, one has a row of two to itself.
    odd = row * ((LAYERS * 2 - groups.num_groups) % 2)
    assert 1 - (shared.host_bytes - odd) / whole.host_bytes == pytest.approx(groups.saved_fraction())
    assert shared.index_bytes / whole.index_bytes == groups.num_groups / groups.num_cells
    assert 1 - shared.slot_bytes / whole.slot_bytes == pytest.approx(groups.saved_fraction())
    assert shared.window_bytes == whole.window_bytes


def test_followers_own_no_distant_key(model):
    """By looking at what is there: every number of the groups in host memory is some value, or an anchor's key."""
    engine = make_engine(model, MIXED)
    whole = make_engine(model, MIXED)
    read(engine, POD_EXACT, tokens(460))
    memory = engine._sequences.get(SessionId("s"))
    stored = memory.distant.load_last(memory.distant.num_groups)
    assert stored.shape[1:] == (6, 64, 2, 16)  # 4 pairs of K and V, 4 values
    # The same tokens, whole: what left a window of the same engine before it was packed.
    packed = []
    original = type(memory.shared.groups).pack
    memory.shared.groups.__class__.pack = lambda self, groups: packed.append(groups) or original(self, groups)
    try:
        read(whole, POD_EXACT, tokens(460))
    finally:
        memory.shared.groups.__class__.pack = original
    groups = torch.cat(packed)
    for layer in range(LAYERS):
        for head in range(2):
            sides = stored.permute(0, 1, 3, 2, 4).flatten(1, 2)
            has_key = any(torch.equal(sides[:, i], groups[:, layer, head, :, 0]) for i in range(12))
            has_value = any(torch.equal(sides[:, i], groups[:, layer, head, :, 1]) for i in range(12))
            assert (has_key, has_value) == (MIXED.stores_distant_key(layer, head), True)


def test_the_index_and_the_slots_of_keys_are_the_anchors(model):
    engine = make_engine(model, MIXED)
    read(engine, POD, tokens(460))
    engine.score(SessionId("s"), tokens(1, 1))
    memory = engine._sequences.get(SessionId("s"))
    assert memory.index.codes_table.shape[0] == MIXED.num_groups
    table = memory.slots().table.view(LAYERS, 2, 2, -1)
    for layer in range(LAYERS):
        for head in range(2):
            anchor = MIXED.anchor(layer, head)
            assert torch.equal(table[layer, 0, head], table[anchor, 0, head])
    assert memory.slots().blocks().unique().numel() == (LAYERS * 2 + MIXED.num_groups) * table.shape[-1]


def test_followers_fetch_values_alone(model):
    fetched = {}
    for recipe in (RECALL, POD):
        engine = make_engine(model, WHOLE)
        read(engine, recipe, tokens(700))
        engine.score(SessionId("s"), tokens(1, 1))
        fetched[recipe.name] = engine.telemetry(SessionId("s")).recalled_bytes
    # Nothing was there before, so all is fetched: half of the cells fetch half.
    assert fetched["pod"] == 0.75 * fetched["recall"]


# -- rolling back, going on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", SMALL, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("steps", [1, 150])
def test_a_cancelled_answer_rolls_back_bit_for_bit(fixed_model, recipe, steps):
    """After 150 steps, all that was in the window when the call began has left it."""
    document = tokens(200)
    drive, fresh = Drive(make_engine(fixed_model)), Drive(make_engine(fixed_model))
    for each in (drive, fresh):
        each.ask("s", recipe, document=document)
    before = drive.engine.stats()
    call = drive.submit("s", recipe, document, prompt=tokens(20, 5), call="c", sampling=answering(500))
    for _ in range(steps):
        drive.engine.step()
    drive.engine.check()
    drive.engine.cancel(call)
    drive.engine.check()
    after = drive.engine.stats()
    assert (after.window_bytes, after.index_bytes, after.host_bytes) == (
        before.window_bytes,
        before.index_bytes,
        before.host_bytes,
    )
    memory, other = (each.engine._sequences.get(SessionId("s")) for each in (drive, fresh))
    resident = memory.state.num_resident
    for layer in range(LAYERS):
        for ours, theirs in zip(memory.state.read(layer, resident), other.state.read(layer, resident), strict=True):
            assert torch.equal(ours, theirs)
    drive.step()
    answers = [
        each.ask("s", recipe, document, prompt=tokens(5, 1), call="d", sampling=answering(5)) for each in (drive, fresh)
    ]
    assert answers[0].appended_tokens == answers[1].appended_tokens
    assert answers[0].usage.recomputed_tokens == 0


def test_keys_are_dropped_once_the_call_has_ended(model):
    document, recipe = tokens(200), SMALL[1]
    drive = Drive(make_engine(model))
    drive.ask("s", recipe, document=document)
    group = drive.engine.telemetry(SessionId("s")).host_bytes // recipe.distant_groups(200)
    drive.submit("s", recipe, document, prompt=tokens(3, 1), call="c", sampling=answering(100))
    for _ in range(99):
        drive.engine.step()
    drive.engine.check()
    memory = drive.engine._sequences.get(SessionId("s"))
    assert memory.host_bytes > memory.distant.num_groups * group
    drive.run()
    assert memory.host_bytes == memory.distant.num_groups * group


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_session_taken_back_to_where_keys_were_dropped_computes_its_window_again(model, recipe):
    document = tokens(900)
    drive = Drive(make_engine(model))
    drive.ask("s", recipe, document=document)
    shorter = document[:500]
    finished = drive.ask("s", recipe, shorter, prompt=tokens(5, 1), call="c", sampling=answering(5))
    assert finished.usage.recomputed_tokens == 500 - recipe.window_start(500)
    again = drive.ask("s", recipe, (*shorter, *finished.appended_tokens), prompt=(7,), call="d", sampling=answering(5))
    assert again.usage.recomputed_tokens == 0


def test_a_session_taken_back_within_its_window_computes_nothing_again(model):
    document = tokens(900)
    drive = Drive(make_engine(model))
    drive.ask("s", POD, document=document)
    # Both have the same window.
    assert POD.window_start(890) == POD.window_start(900)
    finished = drive.ask("s", POD, document[:890], prompt=tokens(5, 1), call="c", sampling=answering(5))
    assert finished.usage.recomputed_tokens == 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_an_answer_is_the_same_after_a_stay_in_host_memory(fixed_model, recipe):
    """A window under pressure is taken to the host whole, keys included."""
    document = tokens(600)
    one = footprint(fixed_model.spec.shape, recipe, 900).device_bytes
    # Room for one session, and not for two.
    spare = make_engine(fixed_model).headroom().device_capacity_bytes
    drive = Drive(make_engine(fixed_model, kv_bytes=(64 << 20) - spare + one * 3 // 2))
    fresh = Drive(make_engine(fixed_model))
    answers = []
    for each in (drive, fresh):
        each.ask("s", recipe, document=document)
        if each is drive:
            each.ask("other", recipe, document=tokens(700, 9))
            assert each.engine.stats().idle_swapped_out == 1
        asked = each.ask("s", recipe, document, prompt=tokens(10, 1), call="q", sampling=answering(20))
        assert asked.usage.recomputed_tokens == 0
        answers.append(asked.appended_tokens)
    assert answers[0] == answers[1]


def test_a_cancelled_call_that_was_away_rolls_back_when_it_is_back(fixed_model):
    document, recipe = tokens(200), SMALL[1]
    drive, fresh = Drive(make_engine(fixed_model)), Drive(make_engine(fixed_model))
    for each in (drive, fresh):
        each.ask("s", recipe, document=document)
    call = drive.submit("s", recipe, document, prompt=tokens(20, 5), call="c", sampling=answering(500))
    for _ in range(60):
        drive.engine.step()
    sequences = drive.engine._sequences
    sequences._evict(SessionId("s"), for_host=False)
    sequences.wait_for_moves(10)
    drive.engine.cancel(call)
    drive.engine.check()
    answers = [
        each.ask("s", recipe, document, prompt=(5, 6), call="d", sampling=answering(5)) for each in (drive, fresh)
    ]
    assert answers[0].appended_tokens == answers[1].appended_tokens
    assert answers[0].usage.recomputed_tokens == 0


# -- refusals --------------------------------------------------------------------------------------------------------


def test_without_a_map_recipes_that_share_are_refused(model):
    engine = make_engine(model, None)
    assert "pod" not in engine.info.recipes
    with pytest.raises(InvalidRequest, match="no map of which: start it with --map"):
        engine.submit(EngineCall(CallId("c"), SessionId("s"), POD, (), document_tokens=(1, 2)))
    assert {"pod", "pod-exact"} <= set(make_engine(model).info.recipes)


def test_a_plan_for_another_shape_is_refused(model):
    with pytest.raises(ConfigError, match="for 3 layers of 2 KV heads, the model has 4 of 2"):
        make_engine(model, uniform_groups(3, 2, 6))


@pytest.mark.parametrize(("kept", "asked"), [(POD, EXACT), (RECALL, POD_EXACT), (POD, RECALL), (EXACT, POD)])
def test_a_session_isnt_answered_by_a_recipe_that_keeps_other_keys(model, kept, asked):
    drive = Drive(make_engine(model))
    document = tokens(400)
    drive.ask("s", kept, document=document)
    with pytest.raises(FailedPrecondition, match="keeps its KV as"):
        drive.ask("s", asked, document, prompt=(1,), call="c", sampling=answering(2))


def test_a_session_that_recalls_may_be_answered_exactly_with_the_keys_it_shares(model):
    drive = Drive(make_engine(model))
    document = tokens(600)
    drive.ask("s", POD, document=document)
    answered = drive.ask("s", POD_EXACT, document, prompt=(1, 2), call="c", sampling=answering(5))
    alone = Drive(make_engine(model))
    alone.ask("s", POD_EXACT, document=document)
    assert (
        answered.appended_tokens
        == alone.ask("s", POD_EXACT, document, prompt=(1, 2), call="c", sampling=answering(5)).appended_tokens
    )
