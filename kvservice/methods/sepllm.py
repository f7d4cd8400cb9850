"""Separators stand for the segments that they end: they stay, beside sinks and a window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvservice.compression.methods import METHODS, Held, Method, Scorer


@dataclass(frozen=True)
class Separators(Scorer):
    """Keeps the first tokens, the latest ones, and of those between the latest separators."""

    sinks: int = 4
    recent_share: float = 0.5
    """Of the budget: the window that stays when tokens are dropped; 256 of 512 in the official SepCache."""
    separator_share: float = 0.25
    """Of the budget, the most separators; 128 of 512."""

    def slack(self, kept_tokens: int) -> int:
        """See `Scorer`: what is neither window nor separator fills up again."""
        used = self.sinks + int(kept_tokens * self.recent_share) + int(kept_tokens * self.separator_share)
        return max(0, kept_tokens - used)

    def score(self, held: Held) -> Tensor:
        """See `Scorer`."""
        positions = held.positions
        pinned = held.pinned(self.sinks, (held.limits * self.recent_share).long().unsqueeze(1))
        known = torch.tensor(sorted(held.separators), dtype=torch.int64, device=positions.device)
        ids = torch.tensor(list(held.token_ids[: held.num_tokens]), dtype=torch.int64, device=positions.device)
        separates = torch.isin(ids, known)[positions.clamp(min=0)] & ~pinned
        latest = positions.float().masked_fill(~separates, -torch.inf)
        # Of equal ones, those that don't separate, it doesn't matter which.
        rank = latest.argsort(dim=1, descending=True).argsort(dim=1)
        most = (held.limits * self.separator_share).long().unsqueeze(1)
        return latest.masked_fill(rank >= most, -torch.inf).masked_fill(pinned, torch.inf)


METHODS.register("sepllm")(
    Method(
        paper="Chen et al., SepLLM, arXiv:2412.12094",
        summary="the first tokens, the latest separators (punctuation, line ends) and a window",
        saves="all but the kept tokens' KV; needs no attention weights",
        costs="token ids of separators, read from the tokenizer; three to four quarters of the budget are used",
        deviates="training-free only; separators of the model's own tokenizer; tokens stay at the positions where they "
        "stood, as its authors advise for ordinary texts",
        scorer=Separators(),
    )
)
