"""Attention in which methods have a say, in torch: of sequences that drop tokens, or look at few. Knows no kernels.

KV heads of a sequence that drops tokens hold different ones, and different numbers of them, in slots of no order. Where
keys are taken to stand elsewhere, they are turned by the difference when they are used: RoPE turns by angles that add
up.

Deterministic attention computes one query at a time, over slots that follow from its position alone: then no bit of it
depends on the tokens that are computed with it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from kvservice.compression.methods import EMPTY, PositionPolicy, Seen
from kvservice.errors import InternalError
from kvservice.kernels import cpu
from kvservice.kernels.cpu import HeldPart
from kvservice.recall.held import HeldStep, HeldTokens
from kvservice.recall.looking import Looking

MOST_SCORES = 1 << 18
"""Scores that are computed at a time: a MiB each of logits and weights, so that they stay in the cache."""


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
    step = _step_of(held)
    if held.stages.positions is not None and turns is None:
        raise InternalError("keys that stand elsewhere can't be turned: nobody said by how much a position does")
    if (deterministic or step.num_tokens == 1) and _kernels_can(q):
        part = held.part(layer, step.positions.shape[1])
        if part is not None:
            return _one_by_one(held, layer, q, replace(part, turns=turns))
    return _in_torch(held, layer, q, turns, deterministic=deterministic)


def _step_of(held: HeldTokens) -> HeldStep:
    if held.step is None:
        raise InternalError("a sequence that drops tokens attends outside of a step")
    return held.step


def _kernels_can(q: Tensor) -> bool:
    return q.device.type == "cpu" and cpu.isa() != "none" and q.shape[-1] % cpu.HEAD_DIM_STEP == 0


def _one_by_one(held: HeldTokens, layer: int, q: Tensor, part: HeldPart) -> Tensor:
    """By the C++ kernels, which take a query at a time and tell its weights."""
    step = _step_of(held)
    num_kv, num_rows, dim = q.shape
    group = num_rows // step.num_tokens
    rows = slice(layer * num_kv, (layer + 1) * num_kv)
    positions, counts = step.positions[rows], step.counts[rows]
    back = None
    if held.stages.positions is not None:
        back = (positions - held.stages.positions.places(positions)).clamp(min=0)
    outs = []
    for i in range(step.num_tokens):
        if back is not None:
            own = back.gather(1, (counts + i).long().unsqueeze(1))
            # What stands further on than the query is seen by none.
            part = replace(part, moves=(own - back).clamp(min=0))
        out, logits, probs = cpu.attend_held(
            q[:, i * group : (i + 1) * group], part, counts + (i + 1), 1 / math.sqrt(dim)
        )
        outs.append(out)
        _show(held, layer, logits.unsqueeze(2), probs.unsqueeze(2), slice(i, i + 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _show(held: HeldTokens, layer: int, logits: Tensor, probs: Tensor, some: slice) -> None:
    """Shows the scorer the attention of some queries `[kv, g, q, t]`, if it wants to see it."""
    step, scorer = _step_of(held), held.stages.scorer
    num_after = step.num_after + step.num_tokens - some.stop
    if not scorer.watches(num_after):
        return
    first, near = held.state.num_computed + some.start, slice(probs.shape[3])
    rows = slice(layer * probs.shape[0], (layer + 1) * probs.shape[0])
    seen = Seen(
        layer=layer,
        logits=logits,
        probs=probs,
        positions=step.positions[rows, near],
        first=first,
        num_after=num_after,
        num_answered=max(0, first - held.read_until),
    )
    told = scorer.observe(seen, {name: numbers[rows, near] for name, numbers in step.remembered.items()})
    for name, numbers in told.items():
        step.remembered[name][rows, near] = numbers


def _in_torch(held: HeldTokens, layer: int, q: Tensor, turns: Tensor | None, *, deterministic: bool) -> Tensor:
    step = _step_of(held)
    num_kv, num_rows, dim = q.shape
    count, first = step.num_tokens, held.state.num_computed
    rows = slice(layer * num_kv, (layer + 1) * num_kv)
    positions = step.positions[rows]
    queries = q.view(num_kv, count, num_rows // count, dim).transpose(1, 2).float()
    keys, values = (part.float() for part in held.read(layer, positions.shape[1]))
    if step.has_empty:
        # Anything may lie there.
        values = values.masked_fill((positions == EMPTY).unsqueeze(2), 0)
    if held.stages.positions is not None and turns is not None:
        queries, keys = _moved(held.stages.positions, queries, keys, positions, first, turns)
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
        _show(held, layer, logits, probs, some)
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
