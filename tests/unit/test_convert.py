from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.internal import convert
from kvservice.types import (
    FinishReason,
    Grammar,
    GrammarKind,
    Headroom,
    KvTelemetry,
    Load,
    ModelInfo,
    ModelShape,
    OnMiss,
    PromptFormat,
    SamplingParams,
    TextRole,
    TierStats,
    Usage,
    WorkerStats,
)

count = st.integers(0, 2**63)
number = st.floats(allow_nan=False, allow_infinity=False)
small = st.integers(1, 2**31)

samplings = st.builds(
    SamplingParams,
    temperature=number,
    top_k=small,
    top_p=number,
    min_p=number,
    seed=count,
    max_new_tokens=small,
    stop=st.lists(st.text()).map(tuple),
    ignore_eos=st.booleans(),
    typical_p=number,
    repetition_penalty=number,
    frequency_penalty=number,
    presence_penalty=number,
    logit_bias=st.dictionaries(small, number).map(lambda biases: tuple(sorted(biases.items()))),
    grammar=st.none() | st.builds(Grammar, st.sampled_from(GrammarKind), st.text()),
    n=small,
    logprobs=st.none() | st.integers(0, 20),
)
headrooms = st.builds(
    Headroom,
    *(count, count, count, count, count, count),
    st.integers(0, 2**31),
    st.integers(0, 2**31),
    st.booleans(),
    st.builds(Load, count, number, number, st.just((1, 2))),
)
shapes = st.builds(ModelShape, *[st.integers(1, 2**15)] * 9)
models = st.builds(ModelInfo, st.text(), shapes, st.lists(st.text()).map(tuple), st.text(), st.text())


@given(samplings)
def test_sampling_parameters_survive_the_wire(params: SamplingParams) -> None:
    assert convert.sampling_from_proto(convert.sampling_to_proto(params)) == params


def test_every_sampling_field_is_set_on_the_wire_even_when_it_is_zero() -> None:
    message = convert.sampling_to_proto(SamplingParams())
    assert all(message.HasField(name) for name in ("temperature", "top_k", "min_p", "seed", "ignore_eos"))


@given(headrooms)
def test_headroom_survives_the_wire(headroom: Headroom) -> None:
    returned = convert.headroom_from_proto(convert.headroom_to_proto(headroom), (1, 2))
    assert returned == headroom
    # Load is no room, so it isn't compared with it.
    assert returned.load == headroom.load


@given(models)
def test_a_model_survives_the_wire(info: ModelInfo) -> None:
    assert convert.model_from_proto(convert.model_to_proto(info)) == info


@pytest.mark.parametrize(
    ("enum", "codes", "names"),
    [
        (PromptFormat, convert.PROMPT_FORMAT_CODES, convert.PROMPT_FORMATS),
        (OnMiss, convert.ON_MISS_CODES, convert.ON_MISS),
        (TextRole, convert.TEXT_ROLE_CODES, convert.TEXT_ROLES),
        (FinishReason, convert.FINISH_REASON_CODES, convert.FINISH_REASONS),
    ],
)
def test_every_value_of_an_enum_has_a_code_of_its_own(enum, codes, names) -> None:
    assert set(codes) == set(enum)
    assert all(code != 0 and names[code] is value for value, code in codes.items())


def test_each_owner_of_bytes_has_its_own_field() -> None:
    numbers = {field.name: index + 1 for index, field in enumerate(fields(KvTelemetry))}
    message = convert.telemetry_to_proto(KvTelemetry(**numbers))
    owners = message.bytes
    assert [owners.device_window, owners.device_index, owners.device_slots, owners.host, owners.redis] == [
        numbers[f"{owner}_bytes"] for owner in ("window", "index", "slot", "host", "redis")
    ]
    assert (message.dense_bytes, message.recall_lookups, message.recall_hits) == (
        numbers["dense_bytes"],
        numbers["recall_lookups"],
        numbers["recall_hits"],
    )
    assert (message.recalled_bytes, message.streamed_bytes) == (numbers["recalled_bytes"], numbers["streamed_bytes"])
    assert (message.gated_rows, message.skipped_rows, message.follower_bytes) == (
        numbers["gated_rows"],
        numbers["skipped_rows"],
        numbers["follower_bytes"],
    )


def test_usage_keeps_its_four_counts_apart() -> None:
    message = convert.usage_to_proto(Usage(1, 2, 3, 4))
    counts = (message.cached_tokens, message.prompt_tokens, message.completion_tokens, message.recomputed_tokens)
    assert counts == (1, 2, 3, 4)


def test_statistics_carry_headroom_and_bytes_by_owner() -> None:
    headroom = Headroom(device_capacity_bytes=10, device_free_bytes=4, resident_sessions=3, running_calls=2)
    tier = TierStats(connected=True, written_frames=3, stored_bytes=5, failures={"timeout": 2})
    message = convert.stats_to_proto(WorkerStats(headroom, workspace_bytes=7, steps=9, tier=tier))
    assert (message.device_capacity_bytes, message.device_free_bytes) == (10, 4)
    assert (message.resident_sessions, message.running_calls, message.steps) == (3, 2, 9)
    assert (message.bytes.device_workspace, message.bytes.redis) == (7, 5)
    assert message.tier.connected
    assert (message.tier.written_frames, dict(message.tier.failures)) == (3, {"timeout": 2})
