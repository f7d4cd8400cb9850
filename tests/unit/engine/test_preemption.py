"""Sequences that together don't fit: they make room for one another, and nobody's answer shows it."""

import pytest

from kvservice.config.recipes import DENSE, EXACT, RECALL
from kvservice.errors import DeadlineExceeded, InternalError, Overloaded
from kvservice.models.tiny import tiny_model
from kvservice.recall.parking import Place
from kvservice.tier.swap import _copy_on_cpu
from kvservice.types import CallId, FinishReason, SessionId
from tests.unit.engine.driving import PLENTY, Drive, answering, device_bytes, group_bytes, make_engine, tokens

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
    monkeypatch.setattr("kvservice.engine.room.GROWTH_TOKENS", 8)


def reading_and_answering(drive, name, recipe=DENSE, length=150, new=40, **more):
    seed = sum(name.encode())
    return drive.submit(
        name,
        recipe,
        document=tokens(length, seed=seed),
        prompt=tokens(10, seed=seed + 1),
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
LOADS = [(DENSE, 150, 24, 46 * 16), (EXACT, 230, 24, 66 * 16), (RECALL, 310, 30, 90 * 16)]
ids = pytest.mark.parametrize(("recipe", "length", "new", "room"), LOADS, ids=lambda each: getattr(each, "name", None))


# All documents are read before the first answer outgrows its bytes.
QUICK = {"step_tokens": 512, "max_prefills": 4, "max_decode_stretch": 100.0}


# -- four sessions that exceed the arena -----------------------------------------------------------------------------


@ids
def test_four_sessions_that_exceed_the_arena_swap_and_answer_bit_for_bit_as_each_alone(
    fixed_model, recipe, length, new, room
):
    engine = make_engine(fixed_model, room=device_bytes(fixed_model, room), **QUICK)
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
    engine = make_engine(model, room=device_bytes(model, room), host_bytes=host_bytes, **QUICK)
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


@pytest.mark.parametrize("to_host", [True, False], ids=["leaving", "returning"])
def test_a_move_that_fails_costs_the_call_of_that_sequence_alone(model, monkeypatch, to_host):
    failures = []

    def copy(*args, **way):
        if way["to_host"] is to_host and not failures:
            failures.append("no more memory")
            raise MemoryError(failures[0])
        _copy_on_cpu(*args, **way)

    monkeypatch.setattr("kvservice.tier.swap._copy_on_cpu", copy)
    engine = make_engine(model, room=device_bytes(model, LOADS[0][3]), **QUICK)
    drive = Drive(engine)
    for name in NAMES:
        reading_and_answering(drive, name, DENSE, 150, 24)
    drive.run()
    (lost,) = drive.failed
    assert isinstance(drive.failed[lost], InternalError)
    expected = only_tokens(alone(model, DENSE, length=150, new=24))
    for name in set(NAMES) - {lost}:
        assert only_tokens(drive.answers)[name, 0] == expected[name, 0]
    drive.failed.clear()
    reading_and_answering(drive, lost, DENSE, 150, 24, call="again")
    drive.run()
    assert only_tokens(drive.answers)["again", 0] == expected[lost, 0]
    assert_nothing_is_left(engine)


def test_an_idle_session_whose_move_fails_is_computed_again(model, monkeypatch):
    def copy(*_, **__):
        raise MemoryError("no more memory")

    monkeypatch.setattr("kvservice.tier.swap._copy_on_cpu", copy)
    engine = make_engine(model, room=device_bytes(model, 14 * 16, 8 * 16))
    drive = Drive(engine)
    for name in "ab":
        drive.ask(name, document=tokens(180))
    finished = drive.ask("a", base=tokens(180), prompt=(5,), sampling=answering(4))
    assert finished.usage.recomputed_tokens == 180
    assert not drive.failed
    assert_nothing_is_left(engine)


# -- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host_bytes", [PLENTY, 0])
def test_a_call_of_higher_priority_takes_the_room_of_running_ones_and_ends_first(fixed_model, host_bytes):
    """The one of its victims that came last goes first; both go on where they were."""
    engine = make_engine(fixed_model, room=device_bytes(fixed_model, 14 * 16, 14 * 16), host_bytes=host_bytes)
    drive, roomy = Drive(engine), Drive(make_engine(fixed_model))
    for name in "ab":
        reading_and_answering(drive, name, new=60)
    drive.until(lambda: all(len(drive.answers.get((name, 0), [])) > 5 for name in "ab"))
    reading_and_answering(drive, "c", new=20, priority=1)
    drive.until(lambda: drive.finished)
    assert set(drive.finished) == {"c"}
    assert len(drive.answers["b", 0]) < 10, "it made room at once"
    assert len(drive.answers["a", 0]) > len(drive.answers["b", 0]), "nobody makes room without need"
    drive.run()
    for name, new in (("a", 60), ("b", 60), ("c", 20)):
        reading_and_answering(roomy, name, new=new)
    assert drive.answers == roomy.run().answers
    assert (engine.stats().swapped_out, engine.stats().forgotten) == ((1, 0) if host_bytes else (0, 1))
    assert_nothing_is_left(engine)


def test_a_call_of_equal_priority_never_takes_the_room_of_running_ones(model):
    engine = make_engine(model, room=device_bytes(model, 13 * 16, 13 * 16))
    drive = Drive(engine)
    for name in "ab":
        reading_and_answering(drive, name)
    before = engine.headroom(), engine.stats()
    with pytest.raises(Overloaded):
        reading_and_answering(drive, "c")
    assert (engine.headroom(), engine.stats()) == before


def test_while_a_call_waits_for_room_later_ones_of_its_priority_are_refused(model):
    """Else a stream of small calls could keep a large one waiting for ever."""
    engine = make_engine(model, room=device_bytes(model, 32 * 16))
    drive = Drive(engine)
    for name in "abc":
        reading_and_answering(drive, name, length=100, new=60)
    drive.until(lambda: ("c", 0) in drive.answers)
    drive.submit("large", document=tokens(380), priority=1)
    with pytest.raises(Overloaded, match="wait for room"):
        drive.submit("small", document=tokens(16), priority=1)
    drive.submit("urgent", document=tokens(16), priority=2)
    drive.run()
    assert list(drive.finished)[:2] == ["urgent", "large"]


def test_an_answer_that_outgrows_its_first_bytes_doesnt_turn_new_calls_away(model):
    engine = make_engine(model)
    drive = Drive(engine)
    reading_and_answering(drive, "a", new=60)
    for number in range(60):
        call = drive.submit("b", document=(5,), call=f"b{number}", retain=False)
        drive.until(lambda call=call: call in drive.finished)


def test_a_sequence_that_forgot_computes_nothing_before_it_has_bytes_again(model):
    """One victim forgets, the other is on its way to the host: until that is there, nobody has room."""
    engine = make_engine(model, room=device_bytes(model, 8 * 16, 8 * 16), host_bytes=group_bytes(model, 1))
    drive = Drive(engine)
    # The host has room for four columns: for the KV of the second, and not for that of the first.
    reading_and_answering(drive, "a", length=90, new=10)
    reading_and_answering(drive, "b", length=40, new=10)
    drive.until(lambda: ("b", 0) in drive.answers)
    drive.submit("c", document=tokens(250), priority=1)
    drive.run()
    assert (engine.stats().swapped_out, engine.stats().forgotten) == (1, 1)
    assert next(iter(drive.finished)) == "c"


def test_idle_sequences_in_host_memory_make_room_there_for_running_ones(model):
    engine = make_engine(model, room=device_bytes(model, 22 * 16), host_bytes=group_bytes(model, 4))
    drive = Drive(engine)
    drive.ask("idle", document=tokens(180))
    drive.ask("gone", document=tokens(250), retain=False)
    assert drive.place("idle") in (Place.LEAVING, Place.PARKED)
    reading_and_answering(drive, "c", length=100)
    drive.until(lambda: ("c", 0) in drive.answers)
    drive.submit("d", document=tokens(340), priority=1)
    drive.run()
    assert (engine.stats().swapped_out, engine.stats().forgotten) == (1, 0)
    assert SessionId("idle") not in engine._sequences.ids()


# -- ends, wherever a call is ----------------------------------------------------------------------------------------


def waiting(drive):
    """It was admitted when it displaced another, and that one hasn't left."""
    reading_and_answering(drive, "low", length=150, new=60)
    drive.until(lambda: ("low", 0) in drive.answers)
    ask(drive, priority=1)
    assert drive.engine._sequences.reserved_tokens(SessionId("s")) == 0


def leaving(drive):
    ask(drive)
    drive.until(lambda: len(drive.answers.get(("c", 0), [])) > 3)
    drive.submit("high", document=tokens(300), priority=1)
    assert drive.place("s") is Place.LEAVING


def parked(drive):
    leaving(drive)
    drive.until(lambda: drive.place("s") is Place.PARKED)


def returning(drive):
    parked(drive)
    drive.until(lambda: drive.place("s") is Place.RETURNING)


def back(drive):
    returning(drive)
    drive.until(lambda: drive.place("s") is Place.DEVICE)


def prefilling(drive):
    ask(drive)
    drive.step()


BASE = tokens(120, seed=1)


def ask(drive, **more):
    """A call that reads on for a while in the middle of a block, then answers."""
    drive.submit(
        "s", base=BASE, document=tokens(150, seed=2), prompt=(5, 6, 7), call="c", sampling=answering(30), **more
    )


STAGES = [waiting, prefilling, leaving, parked, returning, back]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
@pytest.mark.parametrize("end", ["cancel", "release", "deadline"])
def test_a_call_may_end_wherever_it_is(model, stage, end):
    now = [0.0]
    engine = make_engine(model, room=device_bytes(model, 20 * 16), clock=lambda: now[0])
    drive = Drive(engine)
    drive.ask("s", document=BASE)
    expected = Drive(make_engine(model)).ask("s", document=BASE, prompt=(5,), sampling=answering(4)).appended_tokens
    stage(drive)
    if end == "cancel":
        engine.cancel(CallId("c"))
    elif end == "release":
        engine.release(SessionId("s"))
    else:
        engine._calls.running[CallId("c")].deadline = 7.0
        now[0] = 7.0
    engine.check()
    drive.run()
    if end == "deadline":
        assert isinstance(drive.failed["c"], DeadlineExceeded)
    else:
        assert drive.finished["c"].finish_reason is FinishReason.CANCELLED
        assert drive.finished["c"].appended_tokens == ()
    finished = drive.ask("s", base=BASE, prompt=(5,), sampling=answering(4))
    assert finished.usage.recomputed_tokens == (len(BASE) if end == "release" else 0), "the session is as before"
    assert BASE + finished.appended_tokens == expected
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("end", ["cancel", "release"])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_call_may_end_while_it_has_forgotten_or_computes_again(model, end, steps):
    engine = make_engine(model, room=device_bytes(model, 20 * 16), host_bytes=0, step_tokens=64)
    drive = Drive(engine)
    drive.ask("s", document=BASE)
    leaving_or_forgotten = drive
    ask(drive)
    drive.until(lambda: len(drive.answers.get(("c", 0), [])) > 3)
    drive.submit("high", document=tokens(300), priority=1)
    assert engine.stats().forgotten == 1
    if steps:
        drive.until(lambda: "high" in drive.finished)
        for _ in range(steps):
            leaving_or_forgotten.step()
    engine.cancel(CallId("c")) if end == "cancel" else engine.release(SessionId("s"))
    engine.check()
    drive.run()
    finished = drive.ask("s", base=BASE, prompt=(5,), sampling=answering(4))
    assert 0 <= finished.usage.recomputed_tokens <= len(BASE)
    assert (finished.usage.recomputed_tokens == len(BASE)) == (end == "release" or steps == 0)
    expected = Drive(make_engine(model)).ask("s", document=BASE, prompt=(5,), sampling=answering(4)).appended_tokens
    assert BASE + finished.appended_tokens == expected
    assert_nothing_is_left(engine)


def test_an_answer_stopped_while_it_computes_again_leaves_a_session_that_says_so(model):
    """What of it had no KV when the call ended is counted when it is computed, by the next call."""
    engine = make_engine(model, room=device_bytes(model, 20 * 16), host_bytes=0, step_tokens=64)
    drive = Drive(engine)
    drive.ask("s", document=BASE)
    ask(drive)
    drive.until(lambda: len(drive.answers.get(("c", 0), [])) > 3)
    drive.submit("high", document=tokens(300), priority=1)
    drive.until(lambda: "high" in drive.finished)
    drive.step()
    engine.stop(CallId("c"))
    drive.run()
    first = drive.finished["c"]
    assert first.finish_reason is FinishReason.STOP
    assert 0 < first.usage.recomputed_tokens <= 64
    record = BASE + first.appended_tokens
    second = drive.ask("s", base=record, prompt=(5,), sampling=answering(4))
    assert second.usage.recomputed_tokens == len(record) - first.usage.recomputed_tokens - 1
    cold = Drive(make_engine(model)).ask("s", base=record, prompt=(5,), sampling=answering(4))
    assert second.appended_tokens == cold.appended_tokens


def test_progress_never_goes_back(model):
    engine = make_engine(model, room=device_bytes(model, 20 * 16), host_bytes=0, step_tokens=64)
    drive = Drive(engine)
    drive.submit("s", document=tokens(250))
    drive.step()
    drive.step()
    drive.submit("high", document=tokens(300), priority=1)
    assert engine.stats().forgotten == 1
    drive.run()
    assert drive.progress["s"] == sorted(drive.progress["s"])
    assert [total for _, total in drive.progress["s"]] == [250] * len(drive.progress["s"])
    assert drive.finished["s"].usage.recomputed_tokens == 128


@pytest.mark.parametrize("steps", [0, 1, 6])
def test_a_deadline_in_waiting_prefill_and_answer_fails_the_call_and_leaves_the_session(model, steps):
    now = [0.0]
    engine = make_engine(model, clock=lambda: now[0], step_tokens=64)
    drive = Drive(engine)
    drive.ask("s", document=BASE)
    before = engine.stats().window_bytes, engine.headroom()
    ask(drive, deadline=5.0)
    for _ in range(steps):
        drive.step()
    now[0] = 4.9
    drive.step()
    assert not drive.failed
    now[0] = 5.0
    drive.step()
    assert isinstance(drive.failed["c"], DeadlineExceeded)
    assert (engine.stats().window_bytes, engine.headroom()) == before
    assert drive.ask("s", base=BASE, prompt=(5,), sampling=answering(2)).usage.recomputed_tokens == 0


# -- coming back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [DENSE, EXACT, RECALL], ids=lambda recipe: recipe.name)
def test_an_idle_session_in_host_memory_comes_back_bit_for_bit(fixed_model, recipe):
    base = tokens(400, seed=1)
    drive = Drive(make_engine(fixed_model, room=device_bytes(fixed_model, 40 * 16)))
    drive.ask("s", recipe, document=base)
    drive.ask("other", document=tokens(500))
    assert drive.place("s") in (Place.LEAVING, Place.PARKED)
    finished = drive.ask("s", recipe, base=base, prompt=(5, 6), sampling=answering(12, logprobs=3))
    assert finished.usage.recomputed_tokens == 0
    fresh = Drive(make_engine(fixed_model))
    fresh.ask("s", recipe, document=base)
    fresh.ask("s", recipe, base=base, prompt=(5, 6), sampling=answering(12, logprobs=3))
    assert drive.answers == fresh.answers


@pytest.mark.parametrize("recipe", [DENSE, RECALL], ids=lambda recipe: recipe.name)
def test_a_session_that_is_away_may_be_taken_back_to_an_earlier_token(fixed_model, recipe):
    """It comes back whole, and for that takes more than the call needs."""
    base = tokens(500, seed=1)
    drive = Drive(make_engine(fixed_model, room=device_bytes(fixed_model, 42 * 16)))
    drive.ask("s", recipe, document=base)
    drive.ask("other", document=tokens(500))
    assert drive.place("s") in (Place.LEAVING, Place.PARKED)
    finished = drive.ask("s", recipe, base=base[:70], prompt=(5, 6), sampling=answering(12, logprobs=3))
    assert finished.usage.recomputed_tokens == 0
    fresh = Drive(make_engine(fixed_model))
    fresh.ask("s", recipe, document=base[:70])
    fresh.ask("s", recipe, base=base[:70], prompt=(5, 6), sampling=answering(12, logprobs=3))
    assert drive.answers == fresh.answers
    assert_nothing_is_left(drive.engine)


def test_a_sequence_comes_back_although_host_memory_holds_no_more_than_the_two_parts_of_it(model):
    """Once back it needs less there than while it returned: its bytes are reserved for one place at a time."""
    # 4 distant groups at 592 tokens, 5 at 656; the device part (sinks, window, index) takes 6 more while it is away.
    engine = make_engine(model, room=device_bytes(model, 44 * 16), host_bytes=group_bytes(model, 4 + 6))
    drive = Drive(engine)
    drive.submit("s", RECALL, document=tokens(580), prompt=(5,), sampling=answering(90))
    drive.until(lambda: len(drive.answers.get(("s", 0), [])) > 5)
    drive.submit("high", document=tokens(44 * 16), priority=1)
    drive.run()
    assert (engine.stats().swapped_out, engine.stats().forgotten) == (1, 0)
    assert len(drive.answers["s", 0]) == 90


@pytest.mark.parametrize("recipe", [DENSE, EXACT, RECALL], ids=lambda recipe: recipe.name)
def test_what_was_forgotten_is_computed_again_as_it_was_bit_for_bit(fixed_model, recipe):
    """Documents with everything in sight, questions and answers with what they selected."""
    engine = make_engine(fixed_model, room=device_bytes(fixed_model, 44 * 16), host_bytes=group_bytes(fixed_model, 4))
    drive = Drive(engine)
    reading_and_answering(drive, "a", recipe, length=480, new=20)
    drive.until(lambda: len(drive.answers.get(("a", 0), [])) > 10)
    drive.submit("high", document=tokens(500), priority=1)
    drive.run()
    assert engine.stats().forgotten == 1
    assert drive.finished["a"].usage.recomputed_tokens > 490
    fresh = Drive(make_engine(fixed_model))
    reading_and_answering(fresh, "a", recipe, length=480, new=20)
    assert drive.answers == fresh.run().answers
