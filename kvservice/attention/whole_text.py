"""A whole text's attention in torch, for those who read it in one pass. Knows nothing of engines and their memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from kvservice.types import RecipeSpec


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a whole text to itself, `[n, h, d]`."""
    queries, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def blocks(window: RecipeSpec, num_tokens: int) -> Iterator[tuple[slice, int]]:
    """Runs of positions that see the same window, and where that starts."""
    position = 0
    while position < num_tokens:
        stop = min(position + window.tokens_until_slide(position), num_tokens)
        yield slice(position, stop), window.window_start(position)
        position = stop
