"""The floor that any choice of tokens must beat: a random one. For evaluation only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvservice.compression.methods import METHODS, Held, Method, Scorer


@dataclass(frozen=True)
class RandomTokens(Scorer):
    """Ranks tokens at random, the same way whenever it is asked. A baseline, not a published method."""

    sinks: int = 4
    recent_share: float = 0.5
    seed: int = 0

    def score(self, held: Held) -> Tensor:
        """See `Scorer`."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.rand(held.positions.shape[0], held.num_tokens, generator=generator).to(held.positions.device)
        recent = (held.limits * self.recent_share).long().unsqueeze(1)
        return order.gather(1, held.positions.clamp(min=0)).masked_fill(held.pinned(self.sinks, recent), torch.inf)


METHODS.register("dropping_random")(
    Method(
        paper="none: a floor",
        summary="the first tokens, the latest ones and random ones (evaluation only)",
        saves="all but the kept tokens' KV",
        costs="nothing",
        deviates="nothing",
        scorer=RandomTokens(),
        is_published=False,
    )
)
