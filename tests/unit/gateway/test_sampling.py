from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.config.limits import Limits
from kvservice.errors import InvalidRequest
from kvservice.gateway import convert
from kvservice.internal.convert import sampling_to_proto
from kvservice.types import Grammar, GrammarKind, SamplingParams
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
        ("typical_p", [math.nan, -0.5, 0.0, 1.1]),
        ("repetition_penalty", [math.nan, 0.0, -1.0, 10.1]),
        ("frequency_penalty", [math.nan, math.inf, -2.1, 2.1]),
        ("presence_penalty", [math.nan, -2.1, 2.1]),
        ("max_new_tokens", [0, 4097]),
        ("n", [0, 9]),
        ("logprobs", [21]),
        ("logit_bias", [{3: 100.1}, {3: math.nan}, dict.fromkeys(range(1025), 1.0)]),
        (
            "grammar",
            [
                common_pb2.Grammar(),
                common_pb2.Grammar(regex=""),
                common_pb2.Grammar(json_schema="x" * (16 * 1024 + 1)),
            ],
        ),
        ("stop", [["x"] * 9, [""], ["x" * 65], ["€" * 22]]),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, values: list) -> None:
    for value in values:
        with pytest.raises(InvalidRequest) as caught:
            checked(**{name: value})
        assert caught.value.field == f"sampling.{name}"
        assert f"sampling.{name}" in caught.value.message


def test_every_parameter_reaches_the_worker_as_it_was_sent() -> None:
    sent = common_pb2.SamplingParams(
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        typical_p=0.8,
        repetition_penalty=1.1,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        seed=7,
        max_new_tokens=9,
        stop=["x"],
        logit_bias={9: 1.0, 3: -100.0},
        grammar=common_pb2.Grammar(regex="a+"),
        n=2,
        logprobs=0,
        ignore_eos=False,
    )
    params = convert.sampling(sent, LIMITS, seed=42)
    assert params.logit_bias == ((3, -100.0), (9, 1.0))
    assert params.grammar == Grammar(GrammarKind.REGEX, "a+")
    assert sampling_to_proto(params) == sent


def test_no_logprobs_and_zero_of_them_are_different_wishes() -> None:
    assert checked().logprobs is None
    assert checked(logprobs=0).logprobs == 0


def test_several_answers_need_a_temperature() -> None:
    assert checked(n=8, temperature=0.1).n == 8
    with pytest.raises(InvalidRequest, match="all answers are alike"):
        checked(n=2)


def test_an_answer_under_a_grammar_cannot_ignore_its_end() -> None:
    grammar = common_pb2.Grammar(json_schema="{}")
    assert checked(grammar=grammar).grammar == Grammar(GrammarKind.JSON_SCHEMA, "{}")
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        checked(grammar=grammar, ignore_eos=True)


def test_a_bias_on_a_token_that_the_model_does_not_have_is_refused() -> None:
    params = checked(logit_bias={10: 1.0})
    convert.check_vocabulary(params, 11)
    with pytest.raises(InvalidRequest, match="holds 10: the model's token ids are 0 to 9") as caught:
        convert.check_vocabulary(params, 10)
    assert caught.value.field == "sampling.logit_bias"


@pytest.mark.parametrize("value", [-101, 101])
def test_a_priority_out_of_range_is_refused(value: int) -> None:
    assert convert.priority(-100) == -100
    with pytest.raises(InvalidRequest, match="-100 to 100"):
        convert.priority(value)


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
