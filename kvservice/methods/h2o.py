"""Heavy hitters: tokens that attracted most attention so far, beside the latest ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvservice.compression.methods import METHODS, Held, Method, Scorer, Seen


@dataclass(frozen=True)
class HeavyHitters(Scorer):
    """Ranks by the attention that a token has got from all queries since it came."""

    recent_share: float = 0.5
    """Of the kept tokens, those that are the latest: official shares are 0.1 of a prompt each for both kinds."""

    remembers: ClassVar[tuple[str, ...]] = ("mass",)

    def observe(self, seen: Seen, remembered: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Scorer`: adds up over queries and the query heads of a KV head."""
        return {"mass": remembered["mass"] + seen.probs.sum((1, 2))}

    def score(self, held: Held) -> Tensor:
        """See `Scorer`."""
        recent = (held.limits * self.recent_share).long().unsqueeze(1)
        return held.remembered["mass"].masked_fill(held.pinned(0, recent), torch.inf)


METHODS.register("h2o")(
    Method(
        paper="Zhang et al., H2O, arXiv:2306.14048",
        summary="tokens that attracted most attention so far, and the latest ones",
        saves="all but the kept tokens' KV",
        costs="the weights of all attention are computed apart from the fast kernels; 4 bytes for each kept token of a "
        "KV head",
        deviates="the query heads of a KV head choose together, by their summed attention; keeps a number of tokens, "
        "not a share of the prompt",
        scorer=HeavyHitters(),
    )
)
