"""How far a mean over texts can be trusted. Knows nothing of what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DRAWS = 2000
LEVEL = 0.95
BLOCK_TOKENS = 16
"""Neighbouring tokens are alike, so they are drawn in blocks of this many."""


def bootstrap_interval(texts: Sequence[Tensor], seed: int) -> tuple[float, float]:
    """The 95 % interval of the mean over all texts and tokens.

    Each draw takes as many texts as there are, with replacement, and within each text blocks of 16 neighbouring tokens,
    with replacement: texts differ more than tokens do, and a few texts must not look like many.

    Args:
        texts: a value for each token, `[n]`, text by text.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = [_block_means(values) for values in texts]
    means = torch.empty(DRAWS)
    for draw in range(DRAWS):
        chosen = torch.randint(len(blocks), (len(blocks),), generator=generator).tolist()
        means[draw] = torch.stack([_resampled_mean(blocks[text], generator) for text in chosen]).mean()
    low, high = torch.quantile(means, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2])).tolist()
    return low, high


def _block_means(values: Tensor) -> Tensor:
    whole = max(1, values.shape[0] // BLOCK_TOKENS)
    return torch.stack([block.float().mean() for block in values.tensor_split(whole)])


def _resampled_mean(blocks: Tensor, generator: torch.Generator) -> Tensor:
    return blocks[torch.randint(blocks.shape[0], blocks.shape, generator=generator)].mean()
