"""Which tokens stay in the draw: top-k, typical-p, top-p, min-p. Knows nothing of calls, seeds or grammars.

Weights are probabilities as whole multiples of 2^-52 in fp64. Sums of them are exact, whatever the order, so what is
kept depends neither on the rows beside a row nor on how a device splits its sums. Of equally likely tokens all stay or
none: what is kept is a matter of values, never of the order in which a sort left them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

WEIGHT_ONE = 2.0**52
"""The weight of a certain token. A row's weights add up to about this."""


def keep_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """`[n, vocab]` with minus infinity for all but the `top_k` `[n]` largest of a row, as in HF's TopKLogitsWarper.

    Ties with the last one stay.
    """
    largest = logits.topk(int(top_k.max())).values
    return logits.masked_fill(logits < largest.gather(1, top_k[:, None] - 1), -torch.inf)


def weights_of(logits: Tensor) -> Tensor:
    """Weights `[n, vocab]` of fp32 logits."""
    # Softmax goes over a row in one and the same order, alone or in a batch.
    return logits.softmax(-1).double().mul_(WEIGHT_ONE).round_()


def keep_typical(weights: Tensor, log_weights: Tensor, mass: Tensor) -> Tensor:
    """Keeps the tokens whose surprise is nearest to the row's entropy, the fewest that have `mass` `[n]` of all weight.

    Locally Typical Sampling, Meister et al., arXiv:2202.00666; as in HF's TypicalLogitsWarper.

    Args:
        weights: `[n, vocab]`.
        log_weights: logarithms of the same probabilities, fp32.
        mass: fp64, above 0.
    """
    surprise = -log_weights.double()
    # Rounded to whole numbers as the weights are: so this sum is exact too. The entropy of any vocabulary is below 16.
    parts = torch.where(weights > 0, weights * surprise / 16, 0.0).round_()
    entropy = parts.sum(-1, keepdim=True) * (16 / WEIGHT_ONE)
    distance = torch.where(weights > 0, (surprise - entropy).abs_(), torch.inf)
    order = _argsort(distance)
    num_before = (weights.gather(1, order).cumsum(-1) < _needed(weights, mass)).sum(-1, keepdim=True)
    cut = distance.gather(1, order.gather(1, num_before.clamp_(max=weights.shape[1] - 1)))
    return weights.masked_fill(distance > cut, 0.0)


def keep_top_p(weights: Tensor, mass: Tensor) -> Tensor:
    """Keeps the fewest of the likeliest tokens that have `mass` `[n]` of all weight, at least one.

    Nucleus sampling, Holtzman et al., arXiv:1904.09751; as in HF's TopPLogitsWarper.
    """
    ordered = _sort(weights)
    sums = ordered.cumsum(-1)
    # Of each weight and all that aren't less.
    reached = sums[:, -1:] - sums + ordered
    num_enough = (reached >= _needed(weights, mass)).sum(-1, keepdim=True)
    return weights.masked_fill(weights < ordered.gather(1, num_enough - 1), 0.0)


def keep_min_p(weights: Tensor, share: Tensor) -> Tensor:
    """Keeps the tokens that have at least `share` `[n]` of the likeliest one's weight.

    Min-p sampling, Nguyen et al., arXiv:2407.01082; as in HF's MinPLogitsWarper.
    """
    return weights.masked_fill(weights < share[:, None] * weights.amax(-1, keepdim=True), 0.0)


def _needed(weights: Tensor, mass: Tensor) -> Tensor:
    return (mass * weights.sum(-1))[:, None]


def _sort(values: Tensor) -> Tensor:
    """Each row in ascending order."""
    if values.device.type == "cpu":
        # Ten times as fast as torch's, which also finds the order.
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(-1).values


def _argsort(values: Tensor) -> Tensor:
    """The order that sorts each row; that of equal values is anybody's guess."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.argsort(values.numpy(), axis=-1))
    return values.argsort(-1)
