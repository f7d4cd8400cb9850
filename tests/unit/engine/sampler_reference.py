"""Sampling as the papers say it, one row and one token at a time, in fp64. Slow and obvious."""

import math
from dataclasses import dataclass


@dataclass
class Choice:
    """What the reference finds.

    Attributes:
        kept: probabilities of the tokens that may be drawn.
        logprobs: of every token that isn't masked.
        margin: how far the nearest comparison was from going the other way. Near 0, fp32 may decide otherwise.
    """

    kept: dict[int, float]
    logprobs: dict[int, float]
    margin: float


def adjust(logits, params, context, answer, allowed=None):
    """Logits after bias, penalties and grammar."""
    logits = [float(x) for x in logits]
    for token, bias in params.logit_bias:
        logits[token] += bias
    for token in set(context) | set(answer):
        penalty = params.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in set(answer):
        logits[token] -= params.frequency_penalty * answer.count(token) + params.presence_penalty
    if allowed is not None:
        logits = [x if token in allowed else -math.inf for token, x in enumerate(logits)]
    return logits


def choose(logits, params):
    """What may be drawn from adjusted logits, at a temperature above 0."""
    margin = math.inf
    logprobs = log_softmax(dict(enumerate(logits)))
    left = {token: x / params.temperature for token, x in enumerate(logits) if x > -math.inf}
    if 0 < params.top_k < len(left):
        least = sorted(left.values(), reverse=True)[params.top_k - 1]
        margin = min([margin, *(abs(x - least) for x in left.values() if x != least)])
        left = {token: x for token, x in left.items() if x >= least}
    logs = log_softmax(left)
    probabilities = {token: math.exp(x) for token, x in logs.items()}
    if params.typical_p < 1.0:
        entropy = -sum(p * logs[token] for token, p in probabilities.items())
        distances = {token: abs(-logs[token] - entropy) for token in left}
        probabilities, near = fewest(probabilities, distances, params.typical_p)
        margin = min(margin, near)
    if params.top_p < 1.0:
        probabilities, near = fewest(probabilities, {t: -p for t, p in probabilities.items()}, params.top_p)
        margin = min(margin, near)
    least = params.min_p * max(probabilities.values())
    margin = min([margin, *(abs(p - least) for p in probabilities.values() if params.min_p > 0)])
    probabilities = {token: p for token, p in probabilities.items() if p >= least}
    total = sum(probabilities.values())
    return Choice({token: p / total for token, p in probabilities.items()}, logprobs, margin)


def fewest(probabilities, keys, mass):
    """The tokens of the lowest keys that have `mass` of the probability; equal keys stay together."""
    needed = mass * sum(probabilities.values())
    reached, margin, cut = 0.0, math.inf, None
    levels = sorted(set(keys.values()))
    for level in levels:
        reached += sum(p for token, p in probabilities.items() if keys[token] == level)
        margin = min(margin, abs(reached - needed))
        cut = level
        if reached >= needed:
            break
    margin = min([margin, *(abs(level - cut) for level in levels if level != cut)])
    return {token: p for token, p in probabilities.items() if keys[token] <= cut}, margin


def draw(kept, uniform):
    """The token at `uniform` in [0, 1) of the kept ones in order of id, and how near the next one was."""
    reached, margin = 0.0, math.inf
    for token in sorted(kept):
        reached += kept[token]
        margin = min(margin, abs(reached - uniform))
        if uniform < reached:
            return token, margin
    return max(kept), 0.0


def log_softmax(logits):
    finite = {token: x for token, x in logits.items() if x > -math.inf}
    highest = max(finite.values())
    total = math.log(sum(math.exp(x - highest) for x in finite.values()))
    return {token: x - highest - total for token, x in finite.items()}
