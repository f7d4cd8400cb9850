import hashlib
import math
import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvservice.engine.sampler import SamplerRow, sample
from kvservice.errors import InternalError, InvalidRequest
from kvservice.types import SamplingParams
from tests.unit.engine import sampler_reference

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0, 2.5])

NEAR = 1e-5
"""Nearer than this to a border, fp32 and fp64 may differ in which side a token is on."""


class Allowing:
    """A matcher that always allows the same tokens."""

    def __init__(self, tokens, num_words=2):
        self.accepted = []
        self._words = torch.zeros(num_words, dtype=torch.int32)
        for token in tokens:
            self._words[token // 32] |= torch.tensor(1).bitwise_left_shift(token % 32).to(torch.int32)

    def allowed(self):
        return self._words

    def accept(self, token_id):
        self.accepted.append(token_id)

    @property
    def is_complete(self):
        return False


def row_of(params, context=(), answer=(), index=0, matcher=None):
    row = SamplerRow(params, index, context, matcher)
    for token in answer:
        row.accept(token)
    return row


def drawn(params, positions=400, logits=LOGITS, **row):
    rows = [row_of(params, **row)] * positions
    return [sampled.token_id for sampled in sample(logits.expand(positions, -1), rows, range(positions))]


def one(logits, row, position=0):
    [sampled] = sample(logits[None], [row], [position])
    return sampled


def uniform_of(seed, position):
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


# -- the draw ----------------------------------------------------------------------------------------------------------


def test_temperature_zero_takes_the_most_likely_token():
    assert set(drawn(SamplingParams(), 5)) == {1}


def test_a_token_is_a_function_of_seed_and_position():
    params = SamplingParams(temperature=1.0, seed=11)
    assert drawn(params) == drawn(params)
    assert drawn(params) != drawn(SamplingParams(temperature=1.0, seed=12))


def test_the_first_answer_is_that_of_a_single_one_and_the_others_differ():
    params = SamplingParams(temperature=1.0, seed=11)
    answers = [drawn(params, index=index) for index in range(3)]
    assert answers[0] == drawn(params)
    assert answers[0] != answers[1] != answers[2] != answers[0]


def test_draws_follow_the_distribution():
    draws = drawn(SamplingParams(temperature=1.0, seed=3), 6000)
    share = torch.bincount(torch.tensor(draws), minlength=6) / 6000
    # Four standard errors of the most uncertain share.
    torch.testing.assert_close(share, LOGITS.softmax(-1), atol=4 * (0.25 / 6000) ** 0.5, rtol=0)


def test_a_temperature_near_zero_is_greedy():
    assert set(drawn(SamplingParams(temperature=1e-40), 20)) == {1}


# -- truncation --------------------------------------------------------------------------------------------------------


def test_top_k_keeps_the_k_most_likely():
    assert set(drawn(SamplingParams(temperature=2.0, top_k=2))) == {1, 5}


def test_min_p_is_a_share_of_the_most_likely():
    # Shares of the best: 1, e^-0.5 = 0.61, e^-1 = 0.37, …
    assert set(drawn(SamplingParams(temperature=1.0, min_p=0.5))) == {1, 5}


def test_top_p_keeps_the_fewest_that_reach_it():
    # Probabilities 0.46, 0.28, 0.17, …: two reach 0.7, one reaches 0.4.
    assert set(drawn(SamplingParams(temperature=1.0, top_p=0.7))) == {1, 5}
    assert set(drawn(SamplingParams(temperature=1.0, top_p=0.4))) == {1}


def test_top_p_zero_is_greedy():
    assert set(drawn(SamplingParams(temperature=5.0, top_p=0.0), 30)) == {1}


def test_typical_p_may_leave_out_the_most_likely():
    # One token of probability 0.5 and 2,000 that share the rest: the typical surprise is that of neither alone.
    logits = torch.cat([torch.tensor([math.log(2000.0)]), torch.zeros(2000)])
    kept = set(drawn(SamplingParams(temperature=1.0, typical_p=0.2), 300, logits))
    assert kept == {0} or 0 not in kept


def test_equally_likely_tokens_stay_together():
    assert set(drawn(SamplingParams(temperature=1.0, top_p=0.1), logits=torch.zeros(8))) == set(range(8))
    assert set(drawn(SamplingParams(temperature=1.0, top_k=1), logits=torch.zeros(8))) == set(range(8))


def test_forbidden_tokens_are_never_drawn():
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 1.0])
    assert set(drawn(SamplingParams(temperature=3.0), logits=logits)) == {1, 3}


# -- what changes logits -----------------------------------------------------------------------------------------------


def test_a_bias_is_added():
    assert one(LOGITS, row_of(SamplingParams(logit_bias=((4, 4.5),)))).token_id == 4
    assert one(LOGITS, row_of(SamplingParams(logit_bias=((1, -100.0),)))).token_id == 5


def test_repetition_counts_context_and_answer():
    params = SamplingParams(repetition_penalty=2.0)
    # 3 becomes 1.5, 2.5 stays; then 2.5 becomes 1.25, 2 stays.
    assert one(LOGITS, row_of(params, context=[1])).token_id == 5
    assert one(LOGITS, row_of(params, context=[1], answer=[5])).token_id == 3
    # A negative logit is multiplied.
    assert one(torch.tensor([-1.0, -1.5]), row_of(params, answer=[0])).token_id == 1


def test_frequency_and_presence_count_the_answer_only():
    presence, frequency = SamplingParams(presence_penalty=0.6), SamplingParams(frequency_penalty=0.4)
    assert one(LOGITS, row_of(presence, context=[1])).token_id == 1
    assert one(LOGITS, row_of(presence, answer=[1])).token_id == 5
    assert one(LOGITS, row_of(frequency, answer=[1])).token_id == 1
    assert one(LOGITS, row_of(frequency, answer=[1, 1])).token_id == 5


def test_a_grammar_masks_what_cannot_follow():
    matcher = Allowing([2, 4])
    row = row_of(SamplingParams(temperature=3.0), matcher=matcher)
    tokens = {one(LOGITS, row, position).token_id for position in range(50)}
    assert tokens == {2, 4}
    row.accept(2)
    assert matcher.accepted == [2]


def test_tokens_beyond_the_mask_are_not_allowed():
    logits = torch.cat([torch.zeros(40), torch.ones(30)])
    assert one(logits, row_of(SamplingParams(), matcher=Allowing([31], num_words=1))).token_id == 31


# -- log-probabilities -------------------------------------------------------------------------------------------------


def test_logprobs_are_those_before_temperature_and_truncation():
    params = SamplingParams(temperature=0.1, top_k=1, logprobs=2)
    chosen, *likeliest = one(LOGITS, row_of(params)).logprobs
    expected = LOGITS.log_softmax(-1)
    assert [entry.token_id for entry in likeliest] == [1, 5]
    assert chosen == likeliest[0]
    assert [entry.logprob for entry in likeliest] == pytest.approx([float(expected[1]), float(expected[5])])


def test_logprobs_are_those_after_penalties_and_grammar():
    params = SamplingParams(presence_penalty=2.0, logprobs=3)
    row = row_of(params, answer=[1], matcher=Allowing([1, 2]))
    chosen, *likeliest = one(LOGITS, row).logprobs
    # 3 - 2 and 1 are alike; the lower id comes first. What is masked isn't told of.
    assert [entry.token_id for entry in likeliest] == [1, 2]
    assert chosen.token_id == 1
    assert chosen.logprob == pytest.approx(math.log(0.5))


def test_no_logprobs_unless_asked_for():
    assert one(LOGITS, row_of(SamplingParams())).logprobs == ()
    [chosen] = one(LOGITS, row_of(SamplingParams(logprobs=0))).logprobs
    assert chosen.token_id == 1


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[1.0, math.nan], [1.0, math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_finite_logits_fails_alone(bad, temperature):
    rows = [row_of(SamplingParams(temperature=temperature, logprobs=1)) for _ in range(3)]
    good = torch.tensor([-math.inf, 1.0])
    before, failed, after = sample(torch.stack([good, torch.tensor(bad), good]), rows, [5, 7, 9])
    assert before.token_id == after.token_id == 1
    assert isinstance(failed, InternalError)
    assert "position 7" in failed.message


class Stuck(Allowing):
    def allowed(self):
        raise InvalidRequest("the grammar is too complex here", field="sampling.grammar")


def test_a_matcher_that_fails_fails_its_row_alone():
    stuck, free = row_of(SamplingParams(), matcher=Stuck([])), row_of(SamplingParams(), matcher=Allowing([2]))
    failed, fine = sample(LOGITS.expand(2, -1), [stuck, free], [0, 0])
    assert isinstance(failed, InvalidRequest)
    assert fine.token_id == 2


def test_a_grammar_that_allows_nothing_fails_its_row_alone():
    stuck, free = row_of(SamplingParams(), matcher=Allowing([])), row_of(SamplingParams())
    failed, fine = sample(LOGITS.expand(2, -1), [stuck, free], [0, 0])
    assert isinstance(failed, InternalError)
    assert fine.token_id == 1


# -- against the reference, and alone against in a batch ---------------------------------------------------------------


@st.composite
def parameters(draw, vocab_size):
    def maybe(default, strategy):
        return draw(st.one_of(st.just(default), strategy))

    tokens = st.integers(0, vocab_size - 1)
    bias = st.dictionaries(tokens, st.floats(-5, 5), max_size=4)
    return SamplingParams(
        temperature=maybe(0.0, st.floats(0.05, 5)),
        top_k=maybe(0, st.integers(1, vocab_size + 5)),
        top_p=maybe(1.0, st.floats(0, 1)),
        min_p=maybe(0.0, st.floats(0, 1)),
        typical_p=maybe(1.0, st.floats(0.05, 1)),
        repetition_penalty=maybe(1.0, st.floats(0.5, 2)),
        frequency_penalty=maybe(0.0, st.floats(-2, 2)),
        presence_penalty=maybe(0.0, st.floats(-2, 2)),
        logit_bias=tuple(draw(bias).items()),
        seed=draw(st.integers(0, 2**63)),
        logprobs=draw(st.none() | st.integers(0, 5)),
    )


VOCAB = 37


@st.composite
def cases(draw):
    """Parameters, context, answer, allowed tokens or None, logits, position."""
    tokens = st.lists(st.integers(0, VOCAB - 1), max_size=6)
    seed = draw(st.integers(0, 2**32))
    # Rounded: so that some logits are equal.
    logits = (torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 12).round() / 4
    allowed = draw(st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=1))
    return draw(parameters(VOCAB)), draw(tokens), draw(tokens), allowed, logits, draw(st.integers(0, 10**6))


def row_of_case(case):
    params, context, answer, allowed, _, _ = case
    return row_of(params, context, answer, matcher=None if allowed is None else Allowing(allowed))


@settings(deadline=None, max_examples=300)
@given(cases())
def test_a_row_is_sampled_as_the_slow_reference_does(case):
    params, context, answer, allowed, logits, position = case
    sampled = one(logits, row_of_case(case), position)
    adjusted = sampler_reference.adjust(logits, params, context, answer, allowed)
    if params.temperature == 0.0:
        # Of equal ones, which may differ by rounding, any.
        assert adjusted[sampled.token_id] == pytest.approx(max(adjusted), abs=NEAR)
        logprobs = sampler_reference.log_softmax(dict(enumerate(adjusted)))
    else:
        choice = sampler_reference.choose(adjusted, params)
        expected, near = sampler_reference.draw(choice.kept, uniform_of(params.seed, position))
        assume(min(choice.margin, near) > NEAR)
        assert sampled.token_id == expected
        logprobs = choice.logprobs
    if params.logprobs is None:
        assert sampled.logprobs == ()
        return
    chosen, *likeliest = sampled.logprobs
    assert chosen.token_id == sampled.token_id
    assert [x.logprob for x in likeliest] == pytest.approx(
        sorted(logprobs.values(), reverse=True)[: params.logprobs], abs=1e-4
    )
    for entry in sampled.logprobs:
        assert entry.logprob == pytest.approx(logprobs[entry.token_id], abs=1e-4)


@settings(deadline=None, max_examples=60)
@given(st.lists(cases(), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_a_row_is_the_same_bits_alone_in_a_batch_and_in_another_order(batch, shuffler):
    def together(order):
        found = sample(
            torch.stack([batch[i][4] for i in order]),
            [row_of_case(batch[i]) for i in order],
            [batch[i][5] for i in order],
        )
        return dict(zip(order, found, strict=True))

    order = list(range(len(batch)))
    shuffled = order.copy()
    shuffler.shuffle(shuffled)
    expected = {i: one(case[4], row_of_case(case), case[5]) for i, case in enumerate(batch)}
    assert together(order) == expected
    assert together(shuffled) == expected


@pytest.mark.parametrize("vocab_size", [49_152, 50_257])
def test_neither_batch_nor_threads_show_in_a_big_vocabulary(vocab_size):
    kinds = [
        SamplingParams(logprobs=20),
        SamplingParams(temperature=1.0, logprobs=1),
        SamplingParams(temperature=3.0, top_p=0.95, seed=5),
        SamplingParams(temperature=0.8, typical_p=0.9, min_p=0.01, seed=6, logprobs=2),
        SamplingParams(temperature=1.2, top_k=50, top_p=0.9, repetition_penalty=1.2, seed=7),
    ]
    logits = torch.randn(len(kinds), vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    context = random.Random(3).choices(range(vocab_size), k=5000)

    def alone(i, position):
        return one(logits[i], row_of(kinds[i], context), position)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = [alone(i, 40 + i) for i in range(len(kinds))]
        torch.set_num_threads(2)
        assert [alone(i, 40 + i) for i in range(len(kinds))] == expected
        rows = [row_of(params, context) for params in kinds]
        assert sample(logits, rows, [40 + i for i in range(len(kinds))]) == expected
    finally:
        torch.set_num_threads(before)
