"""Methods with what sets them apart broken: a check that a method's broken twin passes as well checks nothing.

A twin is measured as the method itself is, beside it; it should come out worse. Where it doesn't, what is broken isn't
what helps on this model and these texts, and that is a result too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from kvservice.compression.methods import Codec, Dropping, Held, Stages
from kvservice.recall.memory import SequenceMemory

T = TypeVar("T")

Score = Callable[[Held], Tensor]


@dataclass(frozen=True, slots=True)
class Control:
    """A method's broken twin.

    Attributes:
        what: is broken.
        change: breaks it, in a sequence that holds nothing worth mention yet.
    """

    what: str
    change: Callable[[SequenceMemory], None]


def _with(part: T, **methods: object) -> T:
    """The same part of a method, with some of its functions replaced."""
    twin = copy.copy(part)
    for name, function in methods.items():
        object.__setattr__(twin, name, function)
    return twin


def _stages(change: Callable[[Stages], Stages]) -> Callable[[SequenceMemory], None]:
    def apply(memory: SequenceMemory) -> None:
        assert memory.held is not None
        memory.held.stages = change(memory.held.stages)

    return apply


def _scored(change: Callable[[Score], Score]) -> Callable[[SequenceMemory], None]:
    """Worths are others."""
    return _stages(lambda stages: replace(stages, scorer=_with(stages.scorer, score=change(stages.scorer.score))))


def _set(**params: float) -> Callable[[SequenceMemory], None]:
    """Settings of the scorer, or of the plan, are others."""

    def apply(memory: SequenceMemory) -> None:
        if memory.looking is not None:
            memory.looking.plan = _changed(memory.looking.plan, params)
        elif memory.held is not None:
            memory.held.stages = replace(memory.held.stages, scorer=_changed(memory.held.stages.scorer, params))

    return apply


def _changed(part: T, params: dict[str, float]) -> T:
    return replace(part, **params)  # type: ignore[type-var]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _shuffled(score: Score) -> Score:
    """Worths are drawn by lot; what must stay stays, and what can't doesn't."""

    def drawn(held: Held) -> Tensor:
        scores = score(held)
        order = torch.rand(held.num_tokens, generator=_generator()).to(scores.device)
        return torch.where(scores.isinf(), scores, order[held.positions.clamp(min=0)])

    return drawn


def _reversed(score: Score) -> Score:
    return lambda held: -score(held)


def _coins(score: Score) -> Score:
    """The attention that a token got is what a coin says."""

    def flipped(held: Held) -> Tensor:
        coins = torch.rand(held.num_tokens, generator=_generator(held.num_tokens)).to(held.positions.device)
        return score(replace(held, remembered={"attention": coins[held.positions.clamp(min=0)]}))

    return flipped


def _other_separators(score: Score) -> Score:
    """Separators are ids drawn by lot, which stand in the text about as often."""

    def other(held: Held) -> Tensor:
        ids = torch.tensor(list(held.token_ids[: held.num_tokens]))
        separates = torch.isin(ids, torch.tensor(sorted(held.separators), dtype=torch.int64))
        counts = torch.bincount(ids[~separates])
        others = counts.nonzero()[:, 0]
        order = torch.randperm(others.numel(), generator=_generator())
        some = order[counts[others[order]].cumsum(0) <= int(separates.sum())]
        return score(replace(held, separators=frozenset(others[some].tolist())))

    return other


def _scattered(window: int) -> Callable[[Score], Score]:
    """Chunks are of tokens that lie anywhere, but for the last ones."""

    def change(score: Score) -> Score:
        def scattered(held: Held) -> Tensor:
            count = held.num_tokens - window
            order = torch.cat([torch.randperm(count, generator=_generator()), torch.arange(count, held.num_tokens)])
            moved = order.to(held.positions.device)[held.positions.clamp(min=0)]
            return score(replace(held, positions=torch.where(held.positions < 0, held.positions, moved)))

        return scattered

    return change


def _random_targets(dropping: Dropping, threshold: float | None) -> tuple[Tensor, Tensor, float]:
    """Everything that goes is averaged into kept tokens that are drawn by lot."""
    width = dropping.keys.shape[1]
    lots = torch.rand(dropping.stays.shape[0], width, width, generator=_generator()).to(dropping.keys.device)
    target = lots.masked_fill(~dropping.stays.unsqueeze(1), -1).argmax(2)
    goes = dropping.goes.unsqueeze(2)
    count = 1 + torch.zeros_like(lots[:, 0]).scatter_add(1, target, dropping.goes.float()).unsqueeze(2)
    index = target.unsqueeze(2).expand_as(dropping.keys)
    keys, values = (
        (numbers + torch.zeros_like(numbers).scatter_add(1, index, numbers.masked_fill(~goes, 0))) / count
        for numbers in (dropping.keys, dropping.values)
    )
    return keys, values, threshold or 0.0


def _keys_by_token(codec: Codec) -> Codec:
    """Keys are quantised token by token, as values are."""

    def encode(keys: Tensor, values: Tensor, bits: int) -> tuple[Tensor, ...]:
        of_keys, of_values = codec.encode(keys, keys, bits), codec.encode(keys, values, bits)
        half = of_keys[0].shape[1] // 2
        params = torch.zeros_like(of_keys[1])
        params[:, : of_keys[2].shape[1]] = of_keys[2]
        return torch.cat([of_keys[0][:, half:], of_values[0][:, half:]], 1), params, of_values[2]

    def decode(parts: Sequence[Tensor], head_dim: int, dtype: torch.dtype, bits: int) -> tuple[Tensor, Tensor]:
        codes, params, of_values = parts
        swapped = codes.roll(codes.shape[1] // 2, 1)
        own = params[:, : of_values.shape[1]].contiguous()
        keys = codec.decode((swapped, params, own), head_dim, dtype, bits)[1]
        return keys, codec.decode(parts, head_dim, dtype, bits)[1]

    return _with(codec, encode=encode, decode=decode, for_kernels=lambda *_: None)


def _repack(memory: SequenceMemory) -> None:
    held = memory.held
    assert held is not None
    assert held.packed is not None
    held.packed.codec = _keys_by_token(held.packed.codec)


CONTROLS = {
    "streaming_llm": Control("without sinks", _set(sinks=0)),
    "h2o": Control("worth drawn by lot", _scored(_shuffled)),
    "scissorhands": Control("the last query alone", _set(window=1)),
    "l2_norm": Control("the largest norms", _scored(_reversed)),
    "keyformer": Control("worth drawn by lot", _scored(_shuffled)),
    "sepllm": Control("other ids as often", _scored(_other_separators)),
    "chunkkv": Control("chunks of scattered tokens", _scored(_scattered(64))),
    "cascading_kv": Control("coins in place of attention", _scored(_coins)),
    "d2o": Control(
        "merged by lot",
        _stages(lambda stages: replace(stages, merger=_with(stages.merger, absorb=_random_targets))),
    ),
    "more_tokens": Control("keys by token", _repack),
    "tidal_decode": Control("no second look", _set(correction=10_000)),
    "recycled_attention": Control("one look in all", _set(stride=10_000, least_similarity=-1.0)),
}
"""Of each method that drops tokens, or looks at few."""
