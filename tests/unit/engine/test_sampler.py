import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvservice.engine.sampler import sample
from kvservice.errors import InternalError
from kvservice.types import SamplingParams

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0, 2.5])


def drawn(params, positions=400, logits=LOGITS):
    return [sample(logits, params, position) for position in range(positions)]


def test_temperature_zero_takes_the_most_likely_token():
    assert set(drawn(SamplingParams(), 5)) == {1}


def test_a_token_is_a_function_of_seed_and_position():
    params = SamplingParams(temperature=1.0, seed=11)
    assert drawn(params) == drawn(params)
    assert drawn(params) != drawn(SamplingParams(temperature=1.0, seed=12))


def test_draws_follow_the_distribution():
    draws = drawn(SamplingParams(temperature=1.0, seed=3), 6000)
    expected = LOGITS.softmax(-1)
    share = torch.bincount(torch.tensor(draws), minlength=6) / 6000
    # Four standard errors of the most uncertain share.
    torch.testing.assert_close(share, expected, atol=4 * (0.25 / 6000) ** 0.5, rtol=0)


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


@given(
    seed=st.integers(0, 2**63),
    position=st.integers(0, 10**6),
    temperature=st.floats(0.01, 10),
    top_k=st.integers(0, 70),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
)
def test_any_parameters_give_a_token_of_the_vocabulary(seed, position, temperature, top_k, top_p, min_p):
    logits = torch.randn(64, generator=torch.Generator().manual_seed(position)) * 5
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    assert 0 <= sample(logits, params, position) < 64


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_not_a_token(bad, temperature):
    with pytest.raises(InternalError, match="position 7"):
        sample(torch.tensor([1.0, bad]), SamplingParams(temperature=temperature), 7)


def test_forbidden_tokens_are_never_drawn():
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 1.0])
    assert set(drawn(SamplingParams(temperature=3.0), logits=logits)) == {1, 3}
