"""Sampling parameters as a caller writes them. What isn't given takes the server's default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from kvservice.v1 import common_pb2


class Sampling(TypedDict, total=False):
    """Keyword arguments of every call that generates; see SamplingParams in common.proto."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    max_new_tokens: int
    stop: Sequence[str]
    ignore_eos: bool


def sampling_to_proto(sampling: Sampling) -> common_pb2.SamplingParams:
    """Only the fields that were given are set."""
    return common_pb2.SamplingParams(**sampling)
