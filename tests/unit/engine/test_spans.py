"""What goes through the layers a span a step: prefill beside decoding, and decoding that reads all host KV."""

import pytest

from kvservice.config.recipes import DENSE, EXACT, RECALL
from kvservice.engine.pacing import Pace
from kvservice.errors import InternalError
from kvservice.models.tiny import tiny_model
from kvservice.types import FinishReason, SessionId
from tests.unit.engine.driving import PLENTY, Drive, answering, device_bytes, group_bytes, make_engine, tokens

LAYERS = 3
RECIPES = [DENSE, EXACT, RECALL]


@pytest.fixture(scope="module")
def model():
    """Computes every row in blocks of one size: no bit may depend on spans."""
    return tiny_model(seed=0, num_layers=LAYERS, row_block=32)


@pytest.fixture(autouse=True)
def a_layer_a_step(monkeypatch):
    """Whatever is read beside decoding is read in chunks of 48 tokens, a layer a step."""
    monkeypatch.setattr(Pace, "chunk_tokens", lambda self, num_decodes, num_waiting, budget, **_: min(budget, 48))
    monkeypatch.setattr(
        Pace, "layers", lambda self, num_decodes, num_waiting, num_tokens, **_: 1 if num_decodes else LAYERS
    )


def decoding(model, **settings):
    """An engine in which a session decodes, and goes on for long."""
    drive = Drive(make_engine(model, **settings))
    drive.submit("talking", DENSE, document=tokens(40, seed=1), sampling=answering(300))
    drive.until(lambda: drive.answers)
    return drive


def ask(drive, name="asking", recipe=DENSE, length=400, new=12, **more):
    return drive.submit(
        name,
        recipe,
        document=tokens(length, seed=2),
        prompt=tokens(9, seed=3),
        sampling=answering(new, logprobs=2, temperature=0.8, seed=5),
        **more,
    )


def generated(drive):
    return len(drive.answers["talking", 0])


def chunk_of(drive):
    return drive.engine._planner._prefill


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_what_is_read_in_spans_is_answered_bit_for_bit_as_alone(model, recipe):
    alone = Drive(make_engine(model))
    call = ask(alone, recipe=recipe)
    alone.run()
    beside = decoding(model)
    ask(beside, recipe=recipe)
    beside.until(lambda: call in beside.finished)
    assert beside.answers[call, 0] == alone.answers[call, 0]


def test_who_decodes_gets_a_token_in_every_step_while_a_chunk_goes_a_layer_further(model):
    drive = decoding(model)
    ask(drive, length=96, new=1)
    layers = []
    for _ in range(LAYERS):
        before = generated(drive)
        drive.step()
        assert generated(drive) == before + 1
        layers.append(chunk_of(drive).passing.next_layer)
    assert layers == [1, 2, 3]
    assert "asking" not in drive.progress
    drive.step()
    assert drive.progress["asking"] == [(48, 105)]


def test_a_question_joins_the_next_chunk_of_a_document(model):
    drive = decoding(model)
    ask(drive, "document", length=2000, new=1)
    drive.step()
    drive.submit("question", DENSE, document=tokens(20, seed=4), sampling=answering(1))
    drive.until(lambda: "question" in drive.finished, at_most=2 * LAYERS + 2)


def test_when_nobody_decodes_any_more_a_chunk_goes_through_at_once(model):
    drive = decoding(model)
    ask(drive, length=96)
    drive.step()
    drive.engine.cancel("talking")
    drive.step()
    assert drive.progress["asking"] == [(48, 105)]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_call_that_is_cancelled_between_two_spans_leaves_nothing(model, steps):
    drive = decoding(model)
    before = drive.engine.headroom()
    ask(drive, recipe=RECALL, retain=False)
    for _ in range(steps):
        drive.step()
    drive.engine.cancel("asking")
    drive.step()
    assert drive.finished["asking"].finish_reasons == (FinishReason.CANCELLED,)
    drive.engine.release(SessionId("asking"))
    assert drive.engine.headroom().device_free_bytes >= before.device_free_bytes - device_bytes(model, 64)
    drive.step()
    assert chunk_of(drive) is None


def test_a_session_forked_between_two_spans_is_what_was_committed(model):
    drive = decoding(model)
    drive.submit("asking", DENSE, document=tokens(100, seed=2))
    drive.until(lambda: "asking" in drive.finished)
    call = drive.submit("asking", DENSE, base=tokens(100, seed=2), document=tokens(100, seed=6), call="more")
    drive.step()
    drive.engine.fork(SessionId("asking"), SessionId("twin"))
    drive.until(lambda: call in drive.finished)
    for name, base in (("asking", (*tokens(100, seed=2), *tokens(100, seed=6))), ("twin", tokens(100, seed=2))):
        asked = Drive(make_engine(model)).ask("alone", DENSE, base=base, prompt=(7,), sampling=answering(8))
        answer = drive.ask(name, DENSE, base=base, prompt=(7,), sampling=answering(8), call=f"ask {name}")
        assert answer.appended_tokens == asked.appended_tokens
        assert answer.usage.recomputed_tokens == 0


@pytest.mark.parametrize("host_bytes", [0, PLENTY], ids=["forgets", "swaps"])
def test_a_sequence_that_makes_room_between_two_spans_reads_its_chunk_again(model, host_bytes):
    alone = Drive(make_engine(model))
    ask(alone, recipe=DENSE, length=200)
    alone.run()
    room = device_bytes(model, 40 + 128, 290)
    drive = decoding(model, room=room, host_bytes=host_bytes)
    ask(drive, length=200)
    for _ in range(LAYERS + 2):
        drive.step()
    drive.submit("urgent", DENSE, document=tokens(200, seed=8), sampling=answering(4), priority=1)
    while not {"urgent", "asking"} <= set(drive.finished):
        drive.step()
        # Nor does it take more than was reserved while it is on its way: not the room that the chunk had.
        drive.engine.check()
    stats = drive.engine.stats()
    assert (stats.swapped_out if host_bytes else stats.forgotten) > 0
    assert drive.answers["asking", 0] == alone.answers["asking", 0]


def test_a_step_that_breaks_fails_the_calls_of_the_chunk_too(model, monkeypatch):
    drive = decoding(model)
    ask(drive)
    drive.step()
    forward = type(model).forward

    def broken(self, x, positions, attend, layers=None):
        if layers is not None:
            raise RuntimeError("out of luck")
        return forward(self, x, positions, attend, layers)

    monkeypatch.setattr(type(model), "forward", broken)
    drive.step()
    monkeypatch.undo()
    assert isinstance(drive.failed["asking"], InternalError)
    assert isinstance(drive.failed["talking"], InternalError)
    assert not drive.engine.has_work
    drive.ask("asking", DENSE, document=tokens(20), sampling=answering(2), call="again")


# -- decoding that reads all host KV -----------------------------------------------------------------------------------


def both_decoding(model, **settings):
    drive = Drive(make_engine(model, **settings))
    drive.submit("near", RECALL, document=tokens(500, seed=1), sampling=answering(200))
    ask(drive, "far", EXACT, length=700, new=10)
    drive.until(lambda: len(drive.answers) == 2)
    return drive


def test_an_exact_session_doesnt_hold_up_its_neighbours_and_answers_bit_for_bit_as_alone(model):
    alone = Drive(make_engine(model))
    ask(alone, "far", EXACT, length=700, new=10)
    alone.run()
    num_groups = (700 + 9 - 16 - 256) // 64
    drive = both_decoding(model, step_host_bytes=group_bytes(model, num_groups) // LAYERS)
    steps, near = 0, len(drive.answers["near", 0])
    while "far" not in drive.finished:
        drive.step()
        steps += 1
        assert len(drive.answers["near", 0]) == near + steps
    assert steps >= 9 * LAYERS
    assert drive.answers["far", 0] == alone.answers["far", 0]


def test_within_the_limit_exact_sessions_decode_with_the_others(model):
    drive = both_decoding(model)
    before = len(drive.answers["far", 0])
    drive.step()
    assert len(drive.answers["far", 0]) == before + 1


def test_exact_sessions_among_themselves_hold_nobody_up(model):
    drive = Drive(make_engine(model, step_host_bytes=1))
    for name in ("a", "b"):
        ask(drive, name, EXACT, length=500, new=150)
    drive.until(lambda: len(drive.answers) == 2)
    before = {key: len(answer) for key, answer in drive.answers.items()}
    drive.step()
    assert {key: len(answer) - before[key] for key, answer in drive.answers.items()} == {("a", 0): 1, ("b", 0): 1}
