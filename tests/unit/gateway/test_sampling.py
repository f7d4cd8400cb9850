from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.config.limits import Limits
from kvservice.errors import InvalidRequest, NotImplementedYet
from kvservice.gateway import convert
from kvservice.types import SamplingParams
from kvservice.v1 import common_pb2

LIMITS = Limits()


def checked(**fields) -> SamplingParams:
    return convert.sampling(common_pb2.SamplingParams(**fields), LIMITS, seed=42)


def test_what_is_not_set_takes_the_default() -> None:
    assert checked() == SamplingParams(seed=42)


def test_what_is_set_is_kept_also_when_it_is_zero() -> None:
    params = checked(temperature=0.0, top_k=0, min_p=0.0, seed=0, top_p=0.5, max_new_tokens=4096, stop=["x"])
    assert params == SamplingParams(seed=0, top_p=0.5, max_new_tokens=4096, stop=("x",))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [math.nan, -0.1, math.inf, 10.1]),
        ("top_p", [math.nan, -1.0, 0.0, 1.1]),
        ("min_p", [math.nan, -0.1, 1.1]),
        ("typical_p", [math.nan, -0.5, 0.0]),
        ("repetition_penalty", [math.nan, 0.0, -1.0]),
        ("frequency_penalty", [math.nan, math.inf]),
        ("presence_penalty", [math.nan]),
        ("max_new_tokens", [0, 4097]),
        ("n", [0]),
        ("stop", [["x"] * 9, [""], ["x" * 65], ["€" * 22]]),
    ],
)
def test_values_that_no_release_could_accept_are_refused_by_name(name: str, values: list) -> None:
    for value in values:
        with pytest.raises(InvalidRequest) as caught:
            checked(**{name: value})
        assert caught.value.field == f"sampling.{name}"
        assert f"sampling.{name}" in caught.value.message


@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [
        ("typical_p", 0.9, 1.0),
        ("repetition_penalty", 1.1, 1.0),
        ("frequency_penalty", 0.5, 0.0),
        ("presence_penalty", -0.5, 0.0),
        ("n", 2, 1),
        ("logprobs", 5, 0),
        ("logit_bias", {3: 1.0}, {}),
        ("grammar", common_pb2.Grammar(regex="a+"), None),
    ],
)
def test_what_this_release_does_not_do_is_refused_by_name_and_neutral_values_pass(
    name: str, value: object, neutral: object
) -> None:
    with pytest.raises(NotImplementedYet) as caught:
        checked(**{name: value})
    assert caught.value.field == f"sampling.{name}"
    if neutral is not None:
        checked(**{name: neutral})


@given(st.floats(), st.floats(), st.floats())
def test_accepted_numbers_are_always_in_range(temperature: float, top_p: float, min_p: float) -> None:
    try:
        params = checked(temperature=temperature, top_p=top_p, min_p=min_p)
    except InvalidRequest:
        return
    assert 0 <= params.temperature <= 10
    assert 0 < params.top_p <= 1
    assert 0 <= params.min_p <= 1


@pytest.mark.parametrize("code", [3, 99, -1])
def test_an_unknown_enum_value_is_refused(code: int) -> None:
    with pytest.raises(InvalidRequest, match="RAW or CHAT"):
        convert.prompt_format(code)
    if code != 3:
        with pytest.raises(InvalidRequest, match="RECOMPUTE, FAIL or PARTIAL"):
            convert.on_miss(code)
