"""Attention whose bits depend on nothing but a row and the tokens it sees, in plain torch.

A row's result is the same, bit for bit, alone or among others, and however its KV was cut into parts, as long as parts
are cut at multiples of 64 tokens. Several times slower than flash attention.

How (docs/decisions/014): KV is read in tiles of 64 tokens, counted from the start of a part. Every sum runs inside a
matrix product of one fixed shape, 16 rows by one tile, the last of each padded. Everything else is exact (maxima) or
done element by element. Tiles are folded into the running softmax one by one, in order (FlashAttention-2,
arXiv:2307.08691, §3.1). A tile that a row doesn't see changes nothing of it.
"""

from __future__ import annotations

import math
from itertools import accumulate, product

import torch
from torch import Tensor

from kvservice.kv.partial import AttnPartial
from kvservice.types import GROUP_TOKENS

TILE_TOKENS = GROUP_TOKENS
"""Tokens in a tile. Parts start at multiples of it, whatever the chunking, because the window slides by groups."""

_BLOCK_ROWS = 16
"""Rows in one matrix product: few, so that one query wastes little; more would hardly speed up prefill."""

_PRODUCTS_AT_ONCE = 64
"""Products whose scores are held at a time: 256 KiB, which stays in the cache. No bit depends on it."""

_SUM_COLUMNS = 16
"""Columns of ones beside V, so that the sum of the weights is one more column. Sixteen fill a cache line."""

_LOWEST = torch.finfo(torch.float32).min
"""The maximum of no scores: unlike minus infinity, any score may be taken from it, and weighs nothing beside it."""


class FixedOrderAttention:
    """See `PartAttention`; and see the module for what is promised of the bits."""

    def __init__(self, q: Tensor, scale: float) -> None:
        num_kv, num_rows, dim = q.shape
        num_blocks = -(-num_rows // _BLOCK_ROWS)
        rows = q.new_zeros(num_kv, num_blocks * _BLOCK_ROWS, dim, dtype=torch.float32)
        rows[:, :num_rows] = q
        self._dtype = q.dtype
        self._num_rows = num_rows
        self._q = rows.mul_(scale).view(num_kv, num_blocks, _BLOCK_ROWS, dim)
        self._max = self._q.new_full(self._q.shape[:3], _LOWEST)
        self._sums = self._q.new_zeros(*self._q.shape[:3], dim + _SUM_COLUMNS)

    def add(self, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        """See `PartAttention`. The part's tiles are counted from its first token."""
        num_kv, num_blocks = self._q.shape[:2]
        step = TILE_TOKENS * max(1, _PRODUCTS_AT_ONCE // (num_kv * num_blocks))
        for start in range(0, k.shape[1], step):
            some = slice(start, start + step)
            self._fold(k[:, some], v[:, some], None if mask is None else mask[:, some])

    def result(self) -> AttnPartial:
        """See `PartAttention`."""
        dim = self._q.shape[3]
        total = self._sums[..., dim]
        # Whether a zero is negative may depend on tiles that weren't seen: adding zero makes all of them positive.
        out = (self._sums[..., :dim] / total.masked_fill(total == 0, 1).unsqueeze(-1)).add_(0.0)
        lse = self._max + total.log()
        return AttnPartial(
            out.flatten(1, 2)[:, : self._num_rows].to(self._dtype), lse.flatten(1, 2)[:, : self._num_rows]
        )

    def _fold(self, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """Folds `[kv, t, d]` in: the products of all its tiles at once, then one tile after the other."""
        num_tokens, dim = k.shape[1:]
        keys = _tiles(k, dim, 0)
        values = _tiles(v, dim + _SUM_COLUMNS, 1)
        num_tiles = keys.shape[1]
        scores = _products(self._q.unsqueeze(2).expand(-1, -1, num_tiles, -1, -1), keys.transpose(2, 3))
        if mask is not None or num_tokens % TILE_TOKENS:
            scores += self._hidden(num_tokens, num_tiles, mask)
        maxima = torch.stack(list(accumulate(scores.amax(-1).unbind(2), torch.maximum, initial=self._max)), 2)
        running = maxima[:, :, 1:]
        decay = (maxima[:, :, :-1] - running).exp_().unsqueeze(-1)
        weighted = _products(scores.sub_(running.unsqueeze(-1)).exp_(), values)
        for tile in range(num_tiles):
            self._sums.mul_(decay[:, :, tile]).add_(weighted[:, :, tile])
        self._max = running[:, :, -1]

    def _hidden(self, num_tokens: int, num_tiles: int, mask: Tensor | None) -> Tensor:
        """The mask with the padding hidden too, `[blocks, tiles, 16, 64]`."""
        num_blocks = self._q.shape[1]
        hidden = self._q.new_zeros(num_blocks * _BLOCK_ROWS, num_tiles * TILE_TOKENS)
        hidden[:, num_tokens:] = -math.inf
        if mask is not None:
            hidden[: self._num_rows, :num_tokens] = mask
        return hidden.view(num_blocks, _BLOCK_ROWS, num_tiles, TILE_TOKENS).transpose(1, 2)


def _tiles(x: Tensor, width: int, beside: float) -> Tensor:
    """`[kv, t, d]` as fp32 tiles `[kv, n, 64, width]`; a copy, so always laid out alike.

    Columns from `d` on are filled with `beside`, tokens from `t` on with what is finite: nobody sees them.
    """
    num_kv, num_tokens, dim = x.shape
    num_tiles = -(-num_tokens // TILE_TOKENS)
    tiles = x.new_empty(num_kv, num_tiles * TILE_TOKENS, width, dtype=torch.float32)
    tiles[:, :num_tokens, :dim] = x
    tiles[:, num_tokens:, :dim] = 0
    tiles[:, :, dim:] = beside
    return tiles.view(num_kv, num_tiles, TILE_TOKENS, width)


def _products(blocks: Tensor, tiles: Tensor) -> Tensor:
    """Every block times every tile, each pair one item of a batched product.

    Args:
        blocks: `[kv, blocks, tiles, 16, x]`.
        tiles: `[kv, tiles, x, y]`.

    Returns:
        `[kv, blocks, tiles, 16, y]`.
    """
    num_kv, num_blocks, num_tiles, rows, _ = blocks.shape
    width = tiles.shape[3]
    if num_blocks < num_tiles:
        out = blocks.new_empty(num_kv, num_blocks, num_tiles, rows, width)
        for head, block in product(range(num_kv), range(num_blocks)):
            torch.bmm(blocks[head, block], tiles[head], out=out[head, block])
        return out
    out = blocks.new_empty(num_kv, num_tiles, num_blocks, rows, width)
    for head, tile in product(range(num_kv), range(num_tiles)):
        shared = tiles[head, tile].expand(num_blocks, -1, -1)
        torch.bmm(blocks[head, :, tile], shared, out=out[head, tile])
    return out.transpose(1, 2)
