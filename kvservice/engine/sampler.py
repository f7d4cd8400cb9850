"""Choosing the next token. A pure function of logits, parameters and position."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from kvservice.errors import InternalError
from kvservice.types import SamplingParams


def sample(logits: Tensor, params: SamplingParams, position: int) -> int:
    """The token at `position`.

    Args:
        logits: fp32 `[vocab]`.
        params: `temperature` 0 takes the most likely token; else one is drawn by (seed, position).
        position: position of the token to choose.

    Raises:
        InternalError: a logit is NaN or every one is minus infinity.
    """
    best = logits.max()
    if not math.isfinite(float(best)):
        raise InternalError(f"the model gave no finite logits for position {position}")
    if params.temperature == 0.0:
        return int(logits.argmax())
    probabilities = _truncate((logits / params.temperature).softmax(-1), params)
    generator = torch.Generator().manual_seed(_seed_at(params.seed, position))
    # One uniform number against the cumulative sum: the draw doesn't depend on how torch splits work over threads.
    threshold = torch.rand(1, generator=generator, dtype=torch.float64).item()
    cumulative = probabilities.double().cpu().cumsum(0)
    token = int(torch.searchsorted(cumulative, threshold * float(cumulative[-1]), right=True))
    return min(token, int(probabilities.nonzero()[-1]))


def _truncate(probabilities: Tensor, params: SamplingParams) -> Tensor:
    """Zeroes what top-k, min-p and top-p exclude, in that order. The most likely token always stays."""
    if 0 < params.top_k < probabilities.numel():
        least = probabilities.topk(params.top_k).values[-1]
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if params.min_p > 0.0:
        probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0.0)
    if params.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(0) - ordered
        excluded = before >= params.top_p * ordered.sum()
        excluded[0] = False
        probabilities = probabilities.scatter(0, order, ordered.masked_fill(excluded, 0.0))
    return probabilities


def _seed_at(seed: int, position: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
