"""Which tokens stay in the draw: top-k, typical-p, top-p, min-p. Knows nothing of calls, seeds or grammars.

Weights are probabilities as whole multiples of 2^-52 in fp64. Sums of them are exact, whatever the order, so what is
kept depends neither on the rows beside a row nor on how a device splits its sums. Of equally likely tokens all stay or
none: what is kept is a matter of values, never of the order in which a sort left them.
"""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHT_ONE = 2.0**52
"""The weight of a certain token. A row's weights add up to about this."""

HEAD_TOKENS = 1024
"""The likeliest tokens of a row, which are looked at before all of it is sorted."""


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
    return weights.masked_fill(distance > _cut(distance, weights, mass), 0.0)


def keep_top_p(weights: Tensor, mass: Tensor) -> Tensor:
    """Keeps the fewest of the likeliest tokens that have `mass` `[n]` of all weight, at least one.

    Nucleus sampling, Holtzman et al., arXiv:1904.09751; as in HF's TopPLogitsWarper.
    """
    return weights.masked_fill(-weights > _cut(-weights, weights, mass), 0.0)


def keep_min_p(weights: Tensor, share: Tensor) -> Tensor:
    """Keeps the tokens that have at least `share` `[n]` of the likeliest one's weight.

    Min-p sampling, Nguyen et al., arXiv:2407.01082; as in HF's MinPLogitsWarper.
    """
    return weights.masked_fill(weights < share[:, None] * weights.amax(-1, keepdim=True), 0.0)


def _cut(key: Tensor, weights: Tensor, mass: Tensor) -> Tensor:
    """The least key `[n, 1]` of each row such that tokens of this key and lower ones have `mass` of the weight."""
    needed = (mass * weights.sum(-1))[:, None]
    if key.shape[1] <= HEAD_TOKENS:
        return _cut_among(*key.sort(-1), weights, needed)
    lowest, order = key.topk(HEAD_TOKENS, largest=False)
    cut = _cut_among(lowest, order, weights, needed)
    is_short = weights.gather(1, order).sum(-1) < needed[:, 0]
    if is_short.any():
        short = is_short.nonzero()[:, 0]
        cut[short] = _cut_among(*key[short].sort(-1), weights[short], needed[short])
    return cut


def _cut_among(ordered: Tensor, order: Tensor, weights: Tensor, needed: Tensor) -> Tensor:
    num_before = (weights.gather(1, order).cumsum(-1) < needed).sum(-1, keepdim=True)
    return ordered.gather(1, num_before.clamp_(max=ordered.shape[1] - 1))
