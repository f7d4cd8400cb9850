"""Sampling parameters as a caller writes them. What isn't given takes the server's default."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from kvservice.errors import InvalidRequest
from kvservice.v1 import common_pb2


class Sampling(TypedDict, total=False):
    """Keyword arguments of every call that generates; see SamplingParams in common.proto."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    max_new_tokens: int
    stop: Sequence[str]
    ignore_eos: bool
    n: int
    logprobs: int
    json_schema: str | Mapping[str, Any]
    """The answer is JSON that fits it; its text, or what `json.loads` gives for that."""
    regex: str
    """The whole answer matches it."""


def sampling_to_proto(sampling: Sampling) -> common_pb2.SamplingParams:
    """Only the fields that were given are set.

    Raises:
        InvalidRequest: both a schema and a regex.
    """
    if "json_schema" in sampling and "regex" in sampling:
        raise InvalidRequest("give json_schema or regex, not both", field="sampling.grammar")
    fields: dict[str, Any] = {name: value for name, value in sampling.items() if name not in ("json_schema", "regex")}
    if "json_schema" in sampling:
        schema = sampling["json_schema"]
        text = schema if isinstance(schema, str) else json.dumps(schema)
        fields["grammar"] = common_pb2.Grammar(json_schema=text)
    elif "regex" in sampling:
        fields["grammar"] = common_pb2.Grammar(regex=sampling["regex"])
    return common_pb2.SamplingParams(**fields)
