"""Layers get tokens by how evenly they attend, and what is dropped is merged into what is like it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvservice.compression.methods import EMPTY, METHODS, BudgetAllocator, Dropping, Held, Merger, Method, Scorer, Seen
from kvservice.types import BLOCK_TOKENS


@dataclass(frozen=True)
class Accumulated(Scorer):
    """Ranks by the attention that a token has got; the first tokens and the latest ones stay."""

    sinks: int = 4
    recent_share: float = 0.5

    remembers: ClassVar[tuple[str, ...]] = ("mass",)

    def observe(self, seen: Seen, remembered: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Scorer`."""
        return {"mass": remembered["mass"] + seen.probs.sum((1, 2))}

    def score(self, held: Held) -> Tensor:
        """See `Scorer`."""
        recent = (held.limits * self.recent_share).long().unsqueeze(1)
        return held.remembered["mass"].masked_fill(held.pinned(self.sinks, recent), torch.inf)


@dataclass(frozen=True)
class ByVariance(BudgetAllocator):
    """The more evenly a layer attends, the more tokens it gets: in proportion to `softmax(-variance)`."""

    def allocate(self, held: Held, num_blocks: int) -> Tensor:
        """See `BudgetAllocator`."""
        mass, is_held = held.remembered["mass"], held.positions != EMPTY
        count = is_held.sum(1).clamp(min=1)
        mean = (mass * is_held).sum(1) / count
        variance = ((mass - mean.unsqueeze(1)).square() * is_held).sum(1) / count
        spread = (variance.max() - variance.min()).clamp(min=torch.finfo(torch.float32).tiny)
        even = ((variance - variance.min()) / spread).view(-1, held.num_kv_heads).mean(1)
        of_layer = num_blocks // held.num_kv_heads
        most = -(-int(count.max()) // BLOCK_TOKENS)
        wanted = (-even).softmax(0).double() * of_layer
        blocks = wanted.long().clamp(1, most)
        # What rounding left over goes to those that it took most from; what is too much comes from the largest.
        while int(blocks.sum()) > of_layer:
            blocks[blocks.argmax()] -= 1
        for layer in (wanted - blocks).argsort(descending=True, stable=True).tolist():
            if int(blocks.sum()) < of_layer and int(blocks[layer]) < most:
                blocks[layer] += 1
        return blocks.repeat_interleave(held.num_kv_heads)


@dataclass(frozen=True)
class Nearest(Merger):
    """Averages what is dropped into the kept token whose key is most like it, if it is like it enough."""

    alpha: float = 0.5
    """Of the threshold's moving average, the weight of what it was."""

    def absorb(self, dropping: Dropping, threshold: float | None) -> tuple[Tensor, Tensor, float]:
        """See `Merger`."""
        keys, values = dropping.keys, dropping.values
        # What is neither kept nor dropped may be anything.
        empty = ~(dropping.stays | dropping.goes).unsqueeze(2)
        clean = normalize(keys.masked_fill(empty, 0), dim=2)
        alike = (clean @ clean.transpose(1, 2)).masked_fill(~dropping.stays.unsqueeze(1), -torch.inf)
        best, target = alike.max(2)
        mean = float(best[dropping.goes].mean())
        least = mean if threshold is None else self.alpha * threshold + (1 - self.alpha) * mean
        merges = dropping.goes & (best >= least)
        weight = best.masked_fill(~merges, 0).unsqueeze(2)
        count = 1 + torch.zeros_like(best).scatter_add(1, target, merges.float()).unsqueeze(2)
        index = target.unsqueeze(2).expand_as(keys)
        merged = []
        for numbers in (keys, values):
            parts = (numbers * weight).masked_fill(~merges.unsqueeze(2), 0)
            merged.append((numbers + torch.zeros_like(numbers).scatter_add(1, index, parts)) / count)
        return merged[0], merged[1], least


METHODS.register("d2o")(
    Method(
        paper="Wan et al., D2O, arXiv:2406.13035",
        summary="as H2O, with more tokens for layers that attend evenly; what is dropped is merged into similar tokens",
        saves="all but the kept tokens' KV",
        costs="the weights of all attention; 4 bytes for each kept token of a KV head; a product of all keys when "
        "tokens are dropped",
        deviates="the first two layers and the last are compressed too; variances are normalised over all layers, "
        "since few KV heads make the official way, over a layer's heads, all the same; a token is merged if its own "
        "head finds it alike, not heads on average; merging weighs by the cosine, as the official code does",
        scorer=Accumulated(),
        allocator=ByVariance(),
        merger=Nearest(),
    )
)
