from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.engine.pacing import FIRST_GUESS_TOKENS, LEAST_TOKENS, Pace
from kvservice.engine.scheduler import schedule
from kvservice.recall.reach import Reach


@dataclass(eq=False)
class Sequence:
    """As much of a RunningSequence as the scheduler looks at."""

    num_pending: int = 1
    generated: tuple = ()

    @property
    def is_decoding(self):
        return bool(self.generated)

    def next_reach(self):
        return Reach.FULL, self.num_pending


def decoding():
    return Sequence(1, generated=(7,))


def planned(sequences, tokens=100, max_prefills=2):
    plan = schedule(sequences, max_prefills, lambda _: tokens)
    return [(sequences.index(item.sequence), item.num_tokens) for item in plan]


def test_every_decoding_sequence_gets_one_token_in_each_step():
    assert planned([decoding(), Sequence(500), decoding()]) == [(0, 1), (2, 1), (1, 100)]


def test_prefills_share_the_tokens_in_order():
    assert planned([Sequence(30), Sequence(500), Sequence(9)], max_prefills=3) == [(0, 30), (1, 70)]


def test_only_so_many_prefill_at_a_time():
    assert planned([Sequence(10), Sequence(20), Sequence(30)]) == [(0, 10), (1, 20)]


def test_decoding_goes_on_while_prefill_must_wait():
    assert planned([decoding(), Sequence(10)], tokens=0) == [(0, 1)]


def test_the_budget_is_asked_for_beside_that_many_decodes_and_only_if_something_is_to_be_read():
    asked = []
    for sequences in ([decoding()], [decoding(), Sequence(5), decoding()]):
        schedule(sequences, 2, lambda decodes: asked.append(decodes) or 100)
    assert asked == [2]


def test_nothing_to_do_is_an_empty_plan():
    assert planned([]) == []


@given(
    st.lists(st.one_of(st.builds(decoding), st.builds(Sequence, st.integers(1, 900))), max_size=20),
    st.integers(0, 512),
    st.integers(1, 4),
)
def test_a_plan_keeps_to_its_bounds_and_wastes_nothing(sequences, tokens, max_prefills):
    plan = schedule(sequences, max_prefills, lambda _: tokens)
    assert sum(item.sequence.is_decoding for item in plan) == sum(each.is_decoding for each in sequences)
    prefills = [item for item in plan if not item.sequence.is_decoding]
    assert len(prefills) <= max_prefills
    assert all(0 < item.num_tokens <= item.sequence.num_pending for item in plan)
    asked = [each.num_pending for each in sequences if not each.is_decoding][:max_prefills]
    assert sum(item.num_tokens for item in prefills) == min(tokens, sum(asked))


def test_prefill_alone_takes_the_whole_budget():
    assert Pace(1.25).prefill_tokens(0, 512) == 512


def test_before_anything_was_measured_prefill_beside_decoding_is_a_guess():
    assert Pace(1.25).prefill_tokens(3, 512) == FIRST_GUESS_TOKENS


@pytest.mark.parametrize(("token_s", "expected"), [(0.0005, 50), (0.00005, 400), (0.01, LEAST_TOKENS)])
def test_prefill_beside_decoding_stretches_a_step_as_far_as_allowed(token_s, expected):
    pace = Pace(1.25)
    for _ in range(50):
        pace.note(4, 0, 0.1)
        pace.note(4, 40, 0.1 + 40 * token_s)
    assert abs(pace.prefill_tokens(4, 400) - expected) <= 1


def test_a_pace_follows_when_steps_become_slower():
    pace = Pace(1.25)
    pace.note(1, 0, 0.1)
    for _ in range(60):
        pace.note(1, 40, 0.1 + 40 * 0.001)
    quick = pace.prefill_tokens(1, 512)
    for _ in range(60):
        pace.note(1, 40, 0.1 + 40 * 0.002)
    assert pace.prefill_tokens(1, 512) < quick
