"""Sequences that together don't fit: they make room for one another, and nobody's answer shows it."""

import pytest

from kvservice.config.recipes import DENSE, EXACT, RECALL
from kvservice.models.tiny import tiny_model
from tests.unit.engine.driving import Drive, answering, device_bytes, group_bytes, make_engine, tokens

NAMES = "abcd"


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=0, num_layers=1)


@pytest.fixture(scope="module")
def fixed_model():
    """Computes every row in blocks of one size: no bit may depend on preemption."""
    return tiny_model(seed=0, num_layers=1, row_block=32)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Short answers outgrow their first bytes too."""
    monkeypatch.setattr("kvservice.engine.engine.GROWTH_TOKENS", 16)


def reading_and_answering(drive, name, recipe=DENSE, length=150, new=40, **more):
    return drive.submit(
        name,
        recipe,
        document=tokens(length, seed=ord(name)),
        prompt=tokens(10, seed=ord(name) + 1),
        sampling=answering(new, logprobs=2, temperature=0.8, seed=5),
        **more,
    )


def alone(model, recipe, **more):
    answers = {}
    for name in NAMES:
        drive = Drive(make_engine(model))
        reading_and_answering(drive, name, recipe, **more)
        answers |= drive.run().answers
    return answers


def only_tokens(answers):
    return {key: [token for token, _ in answer] for key, answer in answers.items()}


def assert_nothing_is_left(engine):
    engine.check()
    for session in engine._sequences.ids():
        engine.release(session)
    engine.check()
    headroom = engine.headroom()
    assert headroom.device_free_bytes == headroom.device_capacity_bytes
    assert headroom.host_free_bytes == headroom.host_capacity_bytes
    assert headroom.resident_sessions == 0


# Of `recall`, an answer that makes the window slide grows by the index and the slots.
LOADS = [(DENSE, 150, 40, 46 * 16), (EXACT, 230, 40, 68 * 16), (RECALL, 290, 60, 90 * 16)]
ids = pytest.mark.parametrize(("recipe", "length", "new", "room"), LOADS, ids=lambda each: getattr(each, "name", None))


# -- four sessions that exceed the arena -----------------------------------------------------------------------------


@ids
def test_four_sessions_that_exceed_the_arena_swap_and_answer_bit_for_bit_as_each_alone(
    fixed_model, recipe, length, new, room
):
    engine = make_engine(fixed_model, room=device_bytes(fixed_model, room), max_prefills=4)
    drive = Drive(engine)
    for name in NAMES:
        reading_and_answering(drive, name, recipe, length, new)
    drive.run()
    assert engine.stats().swapped_out > 0
    assert engine.stats().forgotten == 0
    assert drive.answers == alone(fixed_model, recipe, length=length, new=new)
    assert all(event.usage.recomputed_tokens == 0 for event in drive.finished.values())
    assert_nothing_is_left(engine)


@ids
def test_where_the_host_has_no_room_they_forget_and_compute_again(model, recipe, length, new, room):
    host_bytes = 4 * group_bytes(model) if recipe is RECALL else 0
    engine = make_engine(model, room=device_bytes(model, room), max_prefills=4, host_bytes=host_bytes)
    drive = Drive(engine)
    for name in NAMES:
        reading_and_answering(drive, name, recipe, length, new)
    drive.run()
    assert engine.stats().forgotten > 0
    assert engine.stats().swapped_out == 0
    recomputed = {name: drive.finished[name].usage.recomputed_tokens for name in NAMES}
    assert 0 < sum(recomputed.values()) == engine.stats().recomputed_tokens
    expected = only_tokens(alone(model, recipe, length=length, new=new))
    for name in NAMES:
        if recipe is not RECALL or not recomputed[name]:
            assert only_tokens(drive.answers)[name, 0] == expected[name, 0]
    assert_nothing_is_left(engine)
