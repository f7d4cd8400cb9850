"""Whole chunks of neighbouring tokens stay or go, and neighbouring layers keep the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvservice.compression.methods import METHODS, Held, Method, Scorer, Seen


@dataclass(frozen=True)
class Chunks(Scorer):
    """Ranks chunks by the attention of the last queries."""

    chunk: int = 10
    """Tokens of a chunk."""
    window: int = 64
    """Queries that are asked, the last ones; their tokens stay."""
    reused_layers: int = 2
    """So many neighbouring layers keep what the first of them chose."""

    remembers: ClassVar[tuple[str, ...]] = ("mass",)
    restarts: ClassVar[bool] = True

    def slack(self, kept_tokens: int) -> int:
        """See `Scorer`: a window is filled before there is another choice."""
        return min(self.window, kept_tokens // 4)

    def watches(self, num_after: int) -> bool:
        """See `Scorer`."""
        return num_after < self.window

    def observe(self, seen: Seen, remembered: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Scorer`."""
        return {"mass": remembered["mass"] + seen.probs[:, :, seen.among_last(self.window)].sum((1, 2))}

    def score(self, held: Held) -> Tensor:
        """See `Scorer`: the mean over a chunk, summed over KV heads; a layer's rows hold the same tokens."""
        rows, width = held.positions.shape
        mass = held.remembered["mass"].view(-1, held.num_kv_heads, width).sum(1)
        chunks = held.positions.view(-1, held.num_kv_heads, width)[:, 0].clamp(min=0) // self.chunk
        sums = torch.zeros(mass.shape[0], int(chunks.max()) + 1, device=mass.device)
        counts = sums.scatter_add(1, chunks, torch.ones_like(mass)).clamp(min=1)
        worth = (sums.scatter_add(1, chunks, mass) / counts).gather(1, chunks)
        first = torch.arange(mass.shape[0], device=mass.device) // self.reused_layers * self.reused_layers
        worth = worth[first].unsqueeze(1).expand(-1, held.num_kv_heads, -1).reshape(rows, width)
        recent = (held.limits // 4).clamp(max=self.window).unsqueeze(1)
        return worth.masked_fill(held.pinned(0, recent), torch.inf)


METHODS.register("chunkkv")(
    Method(
        paper="Liu et al., ChunkKV, arXiv:2502.00299",
        summary="chunks of 10 tokens that the last 64 queries look at; pairs of layers keep the same",
        saves="all but the kept tokens' KV",
        costs="the weights of the last 64 queries' attention; 4 bytes for each kept token of a KV head",
        deviates="chosen anew whenever an answer has filled the budget, 64 tokens later (in the paper once, of the "
        "prompt); the last chunk is cut where the budget ends; scores aren't smoothed before they are averaged over "
        "chunks; the window is a quarter of budgets below 256",
        scorer=Chunks(),
    )
)
