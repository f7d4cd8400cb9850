"""Attention in which methods have a say, in torch: of sequences that drop tokens, or look at few. Knows no kernels.

KV heads of a sequence that drops tokens hold different ones, and different numbers of them, in slots of no order. Where
keys are taken to stand elsewhere, they are turned by the difference when they are used: RoPE turns by angles that add
up.

Deterministic attention computes one query at a time, over slots that follow from its position alone: then no bit of it
depends on the tokens that are computed with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvservice.compression.methods import EMPTY, PositionPolicy, Seen
from kvservice.errors import InternalError
from kvservice.recall.held import HeldTokens
from kvservice.recall.looking import Looking

MOST_SCORES = 1 << 21
"""Scores that are computed at a time: 8 MiB each of logits and weights."""


def attend_held(
    held: HeldTokens, layer: int, q: Tensor, turns: Tensor | None, *, deterministic: bool = False
) -> Tensor:
    """Attention over what each KV head holds, and over the step's own tokens, whose KV has been written.

    Args:
        held: the sequence's; its step is what is computed.
        layer: the layer.
        q: `[kv, n * g, d]`, rotated; row `i * g + j` is query i in head j of the KV head.
        turns: fp32 `[2, positions, d / 2]`, cosines and sines by which each position turns the pairs of a head; needed
            where keys are taken to stand elsewhere.
        deterministic: see the module.

    Returns:
        As `q`.
    """
    step, scorer = held.step, held.stages.scorer
    if step is None:
        raise InternalError("a sequence that drops tokens attends outside of a step")
    num_kv, num_rows, dim = q.shape
    count, first = step.num_tokens, held.state.num_computed
    rows = slice(layer * num_kv, (layer + 1) * num_kv)
    positions = step.positions[rows]
    queries = q.view(num_kv, count, num_rows // count, dim).transpose(1, 2).float()
    keys, values = (part.float() for part in held.state.read(layer, positions.shape[1]))
    if step.has_empty:
        # Anything may lie there.
        values = values.masked_fill((positions == EMPTY).unsqueeze(2), 0)
    if held.stages.positions is not None:
        if turns is None:
            raise InternalError("keys that stand elsewhere can't be turned: nobody said by how much a position does")
        queries, keys = _moved(held.stages.positions, queries, keys, positions, first, turns)
    remembered = {name: numbers.clone() for name, numbers in step.of_layer(rows).items()}
    at_once = 1 if deterministic else max(1, MOST_SCORES // (num_rows // count * num_kv * positions.shape[1]))
    outs = []
    for start in range(0, count, at_once):
        some = slice(start, min(start + at_once, count))
        near = slice(step.widest + some.stop)
        near_keys, near_values, own = keys[:, near], values[:, near], queries[:, :, some]
        if deterministic:
            # A product's bits may depend on how its operands lie.
            near_keys, near_values, own = near_keys.clone(), near_values.clone(), own.clone()
        logits = own @ near_keys.unsqueeze(1).transpose(2, 3) / math.sqrt(dim)
        if count > 1 or step.has_empty:
            logits.masked_fill_(_hidden(positions[:, near], first, some), -math.inf)
        probs = logits.softmax(-1)
        outs.append(probs @ near_values.unsqueeze(1))
        if remembered:
            seen = Seen(
                layer=layer,
                logits=logits,
                probs=probs,
                keys=keys[:, near],
                positions=positions[:, near],
                first=first + start,
                num_after=step.num_after + count - some.stop,
                num_answered=max(0, first + start - held.read_until),
            )
            told = scorer.observe(seen, {name: numbers[:, near] for name, numbers in remembered.items()})
            for name, numbers in told.items():
                remembered[name][:, near] = numbers
    step.learn(rows, remembered)
    return torch.cat(outs, 2).transpose(1, 2).reshape(q.shape).to(q.dtype)


def _hidden(positions: Tensor, first: int, some: slice) -> Tensor:
    """What some of the queries may not see, bool `[kv, 1, q, t]`."""
    at = torch.arange(first + some.start, first + some.stop, device=positions.device)
    places = positions.unsqueeze(1)
    return ((places == EMPTY) | (places > at.unsqueeze(1))).unsqueeze(1)


def _moved(
    policy: PositionPolicy, queries: Tensor, keys: Tensor, positions: Tensor, first: int, turns: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries `[kv, g, q, d]` and keys `[kv, t, d]`, turned from where they stand to where they are taken to stand."""
    # Nothing stands further on than it did.
    back = (positions - policy.places(positions)).clamp(min=0)
    own = (positions >= first) & (positions < first + queries.shape[2])
    # In order of position, as queries are: a row's new tokens lie behind its old ones.
    own_back = back[own].view(keys.shape[0], queries.shape[2])
    return _turned_back(queries, own_back.unsqueeze(1), turns), _turned_back(keys, back, turns)


def _turned_back(x: Tensor, by: Tensor, turns: Tensor) -> Tensor:
    """Rotates `[..., d]` back by so many positions, `[...]`."""
    cos, sin = turns[0, by], turns[1, by]
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos + high * sin, high * cos - low * sin], dim=-1)


def attend_found(looking: Looking, layer: int, q: Tensor) -> Tensor:
    """Attention of one query over what its layer goes by, or over all tokens.

    Args:
        looking: the sequence's.
        layer: the layer.
        q: `[kv, g, d]`, rotated.

    Returns:
        As `q`.
    """
    num_kv, group, dim = q.shape
    exact = q.float()
    places = looking.usable(layer, exact)
    if places is None:
        keys, values = (part.float() for part in looking.state.read(layer, looking.state.num_computed + 1))
        probs = (exact @ keys.transpose(1, 2) / math.sqrt(dim)).softmax(-1)
        looking.learn(layer, exact, probs)
        return (probs @ values).to(q.dtype)
    keys, values = (part.float() for part in looking.state.read_at(layer, places.flatten(1)))
    sets = (num_kv, places.shape[1], places.shape[2], dim)
    rows = exact.view(num_kv, places.shape[1], -1, dim)
    probs = (rows @ keys.view(sets).transpose(2, 3) / math.sqrt(dim)).softmax(-1)
    return (probs @ values.view(sets)).view(num_kv, group, dim).to(q.dtype)


def landing_table(blocks: Tensor, num_layers: int) -> Tensor:
    """A table by which kernels write a step's tokens of every layer into the same blocks, one layer after the other.

    Args:
        blocks: int32 `[2 * kv, columns]`.
        num_layers: of the model.

    Returns:
        int32 `[cells, columns]`.
    """
    return blocks.unsqueeze(0).expand(num_layers, -1, -1).reshape(-1, blocks.shape[1]).contiguous()
