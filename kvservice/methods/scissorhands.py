"""Tokens that recent queries hardly look at are dropped, many at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvservice.compression.methods import METHODS, Held, Method, Scorer, Seen


@dataclass(frozen=True)
class Pivotal(Scorer):
    """Counts how often a token got less attention than if all got the same."""

    window: int = 400
    """Queries that count, the last ones before tokens are dropped."""
    recent: int = 10
    """Tokens that always stay."""
    dropped_share: float = 0.5
    """Of the kept tokens, those that are dropped at once."""

    remembers: ClassVar[tuple[str, ...]] = ("low",)
    restarts: ClassVar[bool] = True

    def slack(self, kept_tokens: int) -> int:
        """See `Scorer`."""
        return int(kept_tokens * self.dropped_share)

    def watches(self, num_after: int) -> bool:
        """See `Scorer`."""
        return num_after < self.window

    def observe(self, seen: Seen, remembered: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Scorer`."""
        counted = seen.among_last(self.window)
        visible = (seen.logits[:, 0, counted] > -torch.inf).float()
        low = seen.probs[:, :, counted].mean(1) < 1 / visible.sum(-1, keepdim=True)
        return {"low": remembered["low"] + (low * visible).sum(1)}

    def score(self, held: Held) -> Tensor:
        """See `Scorer`."""
        return (-held.remembered["low"]).masked_fill(held.pinned(0, self.recent), torch.inf)


METHODS.register("scissorhands")(
    Method(
        paper="Liu et al., Scissorhands, arXiv:2305.17118",
        summary="tokens to which the last 400 queries hardly attended are dropped, half of all at a time",
        saves="all but the kept tokens' KV; between half the budget and all of it is used",
        costs="the weights of the last 400 queries' attention; 4 bytes for each kept token of a KV head",
        deviates="no official code: window, recent tokens and threshold as in a third party's; all layers keep alike "
        "(the paper gives later ones more); attention is averaged over the query heads of a KV head; queries before "
        "tokens were last dropped don't count, where fewer than 400 followed",
        scorer=Pivotal(),
    )
)
