"""A cascade of windows, each of which takes every second token that leaves the one before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvservice.compression.methods import EMPTY, METHODS, Held, Method, PositionPolicy, Scorer, Seen


@dataclass(frozen=True)
class Cascades(Scorer):
    """Drops, for each token that comes, the one that the cascade has no place for.

    While nothing is missing, cascade i holds the i-th `size` of the tokens in order, the latest first. A token that
    comes with number t moves on what leaves the cascades 1 to j - 1, where 2^j is the first power that doesn't divide
    t. At cascade j, what comes and the latest that is there are compared, and the one of less attention is dropped.
    """

    cascades: int = 4
    sinks_share: float = 0.125
    """Of the kept tokens, those that are the first ones: 64 of 512."""
    decay: float = 0.9999999
    """Of the moving average of attention."""

    remembers: ClassVar[tuple[str, ...]] = ("attention",)

    def observe(self, seen: Seen, remembered: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Scorer`: averaged over query heads. The factor `1 - decay`, which all have, is left out."""
        count = seen.probs.shape[2]
        age = torch.arange(count - 1, -1, -1, device=seen.probs.device, dtype=torch.float64)
        weights = (self.decay**age).float().view(-1, 1)
        return {"attention": remembered["attention"] * self.decay**count + (seen.probs.mean(1) * weights).sum(1)}

    def score(self, held: Held) -> Tensor:
        """See `Scorer`. All rows hold the same number of tokens."""
        positions, kept = held.positions, int(held.limits[0])
        sinks = int(kept * self.sinks_share)
        size = (kept - sinks) // self.cascades
        ranked = positions.masked_fill((positions < sinks) & (positions != EMPTY), EMPTY)
        # The slots of all but sinks, the latest token first.
        order = ranked.argsort(dim=1, descending=True, stable=True)[:, : int((ranked[0] != EMPTY).sum())]
        dropped = torch.zeros_like(positions, dtype=torch.bool)
        num_new = max(0, order.shape[1] - (kept - sinks))
        chain = order[:, num_new:]
        for number in range(num_new - 1, -1, -1):
            chain = torch.cat([order[:, number : number + 1], chain], 1)
            out = self._out(chain, held.num_tokens - 1 - number, size, held.remembered["attention"])
            dropped.scatter_(1, chain.gather(1, out), value=True)
            rest = torch.ones_like(chain, dtype=torch.bool).scatter_(1, out, value=False)
            chain = chain[rest].view(chain.shape[0], -1)
        return torch.ones_like(positions, dtype=torch.float32).masked_fill(dropped, -torch.inf)

    def _out(self, chain: Tensor, number: int, size: int, attention: Tensor) -> Tensor:
        """Which place of the chain is dropped as token `number` comes, int64 `[rows, 1]`."""
        cascade = 1
        while cascade < self.cascades and number % (1 << cascade) == 0:
            cascade += 1
        place = cascade * size
        if cascade == self.cascades or place + 1 >= chain.shape[1]:
            return torch.full_like(chain[:, :1], chain.shape[1] - 1)
        comes, there = (attention.gather(1, chain[:, at : at + 1]) for at in (place, place + 1))
        return torch.where(comes >= there, place + 1, place)


@dataclass(frozen=True)
class Contiguous(PositionPolicy):
    """A token stands where it does among the kept ones."""

    def places(self, positions: Tensor) -> Tensor:
        """See `PositionPolicy`."""
        order = positions.masked_fill(positions == EMPTY, int(positions.max()) + 1).argsort(dim=1)
        return order.argsort(dim=1)


METHODS.register("cascading_kv")(
    Method(
        paper="Willette et al., Cascading KV Cache, arXiv:2406.17808",
        summary="sinks and a cascade of four windows, each sparser than the one before it, at contiguous positions",
        saves="all but the kept tokens' KV",
        costs="the weights of all attention; 4 bytes for each kept token of a KV head; kept keys are rotated anew for "
        "every token",
        deviates="sinks are an eighth of the budget, 64 of 512; attention is averaged over the query heads of a KV "
        "head; cascades fill up first, as with the official `eager_fill`",
        scorer=Cascades(),
        positions=Contiguous(),
    )
)
