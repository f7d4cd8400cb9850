"""Attention sinks and a recent window, at positions counted among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvservice.compression.methods import EMPTY, METHODS, Held, Method, PositionPolicy, Scorer


@dataclass(frozen=True)
class SinksAndWindow(Scorer):
    """Keeps the first tokens and the latest ones."""

    sinks: int = 4
    """`start_size` of the official code."""

    def score(self, held: Held) -> Tensor:
        """See `Scorer`."""
        return held.positions.float().masked_fill(held.positions < self.sinks, torch.inf)


@dataclass(frozen=True)
class Rolling(PositionPolicy):
    """A token stands where it does among the kept ones."""

    def places(self, positions: Tensor) -> Tensor:
        """See `PositionPolicy`."""
        order = positions.masked_fill(positions == EMPTY, int(positions.max()) + 1).argsort(dim=1)
        return order.argsort(dim=1)


METHODS.register("streaming_llm")(
    Method(
        paper="Xiao et al., StreamingLLM, arXiv:2309.17453",
        summary="attention sinks and a recent window, at rolling positions",
        saves="all but the kept tokens' KV; needs no scores",
        costs="kept keys are rotated anew for every token; the middle of a text is forgotten",
        deviates="keys are kept rotated by where they stood and turned by the difference, which is the same number; a "
        "session ends at the model's last position",
        scorer=SinksAndWindow(),
        positions=Rolling(),
    )
)
