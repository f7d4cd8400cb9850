from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.engine.pacing import (
    CHUNK_TOKENS,
    FIRST_GUESS_LAYERS,
    LEAST_TOKENS,
    MOST_STRETCH,
    PROBE_STEPS,
    Pace,
    fair_stretch,
)
from kvservice.engine.scheduler import QUESTIONS_COST, share_prefill, share_questions, sort_out
from kvservice.recall.reach import Reach


@dataclass(eq=False)
class Sequence:
    """As much of a RunningSequence as the scheduler looks at."""

    num_pending: int = 1
    generated: tuple = ()
    reach: Reach = Reach.FULL
    tenant: bytes = b""

    @property
    def is_decoding(self):
        return bool(self.generated)

    def next_reach(self):
        return self.reach, self.num_pending


def decoding():
    return Sequence(1, generated=(7,))


def shared(sequences, tokens=100):
    return sorted((sequences.index(item.sequence), item.num_tokens) for item in share_prefill(sequences, tokens))


def test_every_decoding_sequence_gets_one_token_and_the_others_have_to_read():
    sequences = [decoding(), Sequence(500), decoding(), Sequence(0)]
    decodes, reading = sort_out(sequences)
    assert [(sequences.index(item.sequence), item.num_tokens, item.completes) for item in decodes] == [
        (0, 1, True),
        (2, 1, True),
    ]
    assert reading == [sequences[1]]


def test_an_answers_first_token_is_read_with_its_prompt():
    assert sort_out([Sequence(1)])[0] == []


def test_prefills_share_the_tokens_in_order():
    assert shared([Sequence(30), Sequence(500), Sequence(40)]) == [(0, 30), (1, 70)]


def test_a_question_need_not_wait_for_the_document_before_it():
    assert shared([Sequence(5000), Sequence(20), Sequence(10)]) == [(0, 70), (1, 20), (2, 10)]


def test_the_first_has_half_however_many_are_shorter():
    assert shared([Sequence(5000), Sequence(80), Sequence(40)]) == [(0, 50), (1, 10), (2, 40)]


def test_nothing_is_shared_where_nothing_is_allowed_or_asked_for():
    assert shared([Sequence(10)], tokens=0) == []
    assert shared([]) == []


@given(st.lists(st.builds(Sequence, st.integers(1, 900)), max_size=20), st.integers(0, 512))
def test_a_share_keeps_to_its_bounds_and_wastes_nothing(sequences, tokens):
    plan = share_prefill(sequences, tokens)
    assert len({id(item.sequence) for item in plan}) == len(plan)
    assert all(0 < item.num_tokens <= item.sequence.num_pending for item in plan)
    assert all(item.completes == (item.num_tokens == item.sequence.num_pending) for item in plan)
    assert sum(item.num_tokens for item in plan) == min(tokens, sum(each.num_pending for each in sequences))
    if sequences:
        first = sum(item.num_tokens for item in plan if item.sequence is sequences[0])
        assert first >= min(sequences[0].num_pending, tokens - tokens // 2)


def test_short_questions_are_read_beside_decoding_the_shortest_first_and_a_few_at_a_time() -> None:
    sequences = [Sequence(500), Sequence(40, reach=Reach.SELECT), Sequence(24, reach=Reach.SELECT), Sequence(60)]
    plan = share_questions(sequences, 512)
    assert [(sequences.index(item.sequence), item.num_tokens, item.completes) for item in plan] == [
        (2, 24, True),
        (1, 24, False),
    ]
    assert sum(item.cost for item in plan) <= QUESTIONS_COST


def test_questions_take_no_more_tokens_than_there_are_for_them() -> None:
    assert [item.num_tokens for item in share_questions([Sequence(60), Sequence(50)], 70)] == [50, 20]
    assert share_questions([Sequence(60)], 0) == []


LAYERS = 30


def a_pace(decode_s, token_layer_s):
    """One that has measured four sequences that decode, and prefill."""
    pace = Pace(1.25, LAYERS)
    pace.note_decodes(4, decode_s)
    pace.note_prefill(100, 100 * token_layer_s)
    return pace


def test_prefill_alone_takes_the_whole_budget_through_all_layers():
    pace = a_pace(0.1, 1e-5)
    assert pace.chunk_tokens(0, 1, 512) == 512
    assert pace.layers(0, 1, 512) == LAYERS


def test_before_anything_was_measured_prefill_beside_decoding_is_a_guess():
    pace = Pace(1.25, LAYERS)
    assert pace.chunk_tokens(3, 1, 512) == CHUNK_TOKENS
    assert pace.layers(3, 1, CHUNK_TOKENS) == FIRST_GUESS_LAYERS


@pytest.mark.parametrize(
    ("token_layer_s", "tokens", "layers"),
    [
        (1e-6, 512, LAYERS),  # cheap: as much as there may be in a step, whole
        (1e-5, CHUNK_TOKENS, 19),
        (1e-4, CHUNK_TOKENS, 1),
        (5e-4, 50, 1),  # so dear that a layer of a whole chunk is too much
        (1e-2, LEAST_TOKENS, 1),
    ],
)
def test_prefill_beside_decoding_stretches_a_step_as_far_as_allowed(token_layer_s, tokens, layers):
    pace = a_pace(0.1, token_layer_s)
    assert abs(pace.chunk_tokens(4, 1, 512) - tokens) <= 1
    assert pace.layers(4, 1, tokens) == layers
    if LEAST_TOKENS < tokens < 512:
        assert tokens * layers * token_layer_s <= 0.25 * 0.1 * 1.01


def test_prefill_goes_along_with_those_that_decode_once_it_is_known_what_they_take_alone():
    pace = a_pace(0.1, 1e-5)
    assert pace.may_merge(0)
    assert pace.may_merge(4)
    assert not pace.may_merge(5)
    pace.note_decodes(5, 0.11)
    assert pace.may_merge(5)
    assert not pace.may_merge(4)


def test_now_and_then_a_step_keeps_prefill_apart_to_learn_what_each_takes():
    pace = a_pace(0.1, 1e-5)
    for _ in range(PROBE_STEPS):
        assert pace.may_merge(4)
        pace.note_merged()
    assert not pace.may_merge(4)
    pace.note_decodes(4, 0.1)
    assert pace.may_merge(4)


def test_a_pace_follows_when_prefill_becomes_slower():
    pace = a_pace(0.1, 1e-5)
    quick = pace.layers(4, 1, CHUNK_TOKENS)
    for _ in range(30):
        pace.note_prefill(512, 512 * 2e-5)
    assert pace.layers(4, 1, CHUNK_TOKENS) < quick


def test_a_pace_follows_at_once_when_more_decode():
    pace = a_pace(0.1, 1e-5)
    before = pace.layers(4, 1, CHUNK_TOKENS)
    pace.note_decodes(8, 0.15)
    assert pace.layers(8, 1, CHUNK_TOKENS) >= 1.4 * before


def test_one_that_waits_may_take_what_the_limit_says_whoever_decodes() -> None:
    assert [fair_stretch(1.25, decodes, 1) for decodes in (1, 4, 32)] == [1.25, 1.25, 1.25]


def test_several_that_wait_get_as_much_as_those_that_decode_but_never_make_them_slower_than_people_read() -> None:
    assert fair_stretch(1.25, 1, 4) == 4.25
    assert fair_stretch(1.25, 16, 13) == 2.0
    assert fair_stretch(1.25, 1, 100) == MOST_STRETCH
    assert fair_stretch(100.0, 1, 1) == 100.0


@given(st.integers(1, 64), st.integers(1, 64))
def test_more_that_wait_never_get_less_and_more_that_decode_never_wait_longer(decodes: int, waiting: int) -> None:
    stretch = fair_stretch(1.25, decodes, waiting)
    assert fair_stretch(1.25, decodes, waiting + 1) >= stretch
    assert fair_stretch(1.25, decodes + 1, waiting) <= stretch
