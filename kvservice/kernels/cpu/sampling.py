"""Choosing tokens by their logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvservice.kernels.cpu.library import KvDraw
from kvservice.kernels.cpu.runtime import loaded


def highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit of each row, and the first token that has it.

    Args:
        logits: fp32 `[n, vocab]`, contiguous in the last.

    Returns:
        fp32 and int64 `[n]`. A row with a NaN gives NaN, and any token.
    """
    rows, vocab = _logits_shape(logits)
    values, tokens = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    loaded().kv_highest(logits.data_ptr(), logits.stride(0), rows, vocab, values.data_ptr(), tokens.data_ptr())
    return values, tokens


@dataclass(frozen=True, slots=True)
class Draw:
    """How a row's token is drawn.

    Attributes:
        draw: below 2^53: how far into the weights of what stays, in the order of token ids.
        temperature: above 0.
        top_k: so many of the likeliest stay; 0: all.
        typical_p: the most typical ones that have this share of all weight stay; from 1 on: all.
        top_p: the likeliest ones that have this share stay; from 1 on: all.
        min_p: those stay that have this share of the likeliest one's weight; 0: all.
    """

    draw: int
    temperature: float
    top_k: int = 0
    typical_p: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0


def draw_tokens(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Draws a token for each row.

    Args:
        logits: fp32 `[n, vocab]`, contiguous in the last; no NaN, and a finite one in each row.
        draws: one for each row.

    Returns:
        int64 `[n]`.
    """
    rows, vocab = _logits_shape(logits)
    if len(draws) != rows:
        raise ValueError(f"{len(draws)} draws: must be one for each of {rows} rows")
    for each in draws:
        if not 0 <= each.draw < 1 << 53 or each.temperature <= 0 or each.top_k < 0:
            raise ValueError(f"{each}: draw must be in [0, 2^53), temperature above 0, top_k at least 0")
    records = (KvDraw * rows)(
        *[KvDraw(each.draw, each.typical_p, each.top_p, each.min_p, each.temperature, each.top_k) for each in draws]
    )
    tokens = torch.empty(rows, dtype=torch.int64)
    loaded().kv_draw(logits.data_ptr(), logits.stride(0), records, rows, vocab, tokens.data_ptr())
    return tokens


def _logits_shape(logits: Tensor) -> tuple[int, int]:
    rows, vocab = logits.shape
    if logits.dtype is not torch.float32 or vocab < 1 or (vocab > 1 and logits.stride(1) != 1):
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}: must be fp32 [n, vocab], contiguous")
    return rows, vocab
