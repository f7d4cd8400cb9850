"""The floors that any index must beat: random tokens, and the latest ones. For evaluation only."""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.compression.protocols import RECALL_INDEXES, Selection


def _nothing(keys: Tensor) -> tuple[Tensor, Tensor]:
    num_groups, _, dim = keys.shape
    return keys.new_empty(num_groups, 0, dtype=torch.uint8), keys.new_empty(num_groups, 0, dim)


class RandomIndex:
    """Ranks distant tokens at random, anew for each query. A baseline, not a published method."""

    paper = "none: a floor"
    summary = "random tokens (evaluation only)"
    is_key_index = False

    def encode(self, keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002 -- part of the protocol
        """Keeps nothing."""
        return _nothing(keys)

    def scores(self, ask: Selection) -> Tensor:
        """Uniform numbers that depend on the seed alone."""
        generator = torch.Generator().manual_seed(ask.seed)
        num_kv, rows, _ = ask.q.shape
        return torch.rand(num_kv, 1, ask.num_distant, generator=generator).expand(-1, rows, -1).to(ask.q.device)


class RecencyIndex:
    """Ranks distant tokens by position, the latest first. A baseline, not a published method."""

    paper = "none: a floor"
    summary = "the latest distant tokens (evaluation only)"
    is_key_index = False

    def encode(self, keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002 -- part of the protocol
        """Keeps nothing."""
        return _nothing(keys)

    def scores(self, ask: Selection) -> Tensor:
        """The position, as a share of all, so that softmax can tell neighbours apart."""
        num_kv, rows, _ = ask.q.shape
        share = torch.arange(ask.num_distant, device=ask.q.device) / ask.num_distant
        return share.expand(num_kv, rows, -1)


RECALL_INDEXES.register("random")(RandomIndex())
RECALL_INDEXES.register("recency")(RecencyIndex())
