"""Recall slots: which distant tokens are on the device now, and what has to move when the choice changes.

The resident set is that of the last step (ClusterKV's R = 1 at token granularity, arXiv:2412.03213, §4.3): only the
difference between two steps moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvservice.kv.arena import Arena
from kvservice.kv.ledger import Owner
from kvservice.types import BLOCK_TOKENS

EMPTY = -1


@dataclass(frozen=True, slots=True)
class Misses:
    """Tokens to fetch, in pairs of equal index.

    Attributes:
        heads: KV head, int64 `[n]`.
        offsets: position counted from the first distant one, int64 `[n]`.
        slots: recall slot of that head to put it in, int64 `[n]`.
    """

    heads: Tensor
    offsets: Tensor
    slots: Tensor


def place(resident: Tensor, chosen: Tensor) -> Misses:
    """Decides which slot each missing token gets: slots that this step doesn't use, lowest first.

    Args:
        resident: `[kv, slots]`, offsets in the slots, or EMPTY.
        chosen: `[kv, n]`, offsets this step attends to, distinct in a head, n ≤ slots.
    """
    equal = chosen.unsqueeze(2) == resident.unsqueeze(1)
    missing = ~equal.any(2)
    unused = ~equal.any(1)
    rank = unused.cumsum(1) - 1
    taken = unused & (rank < missing.sum(1, keepdim=True))
    heads, at = missing.nonzero(as_tuple=True)
    return Misses(heads, chosen[heads, at], taken.nonzero(as_tuple=True)[1])


class RecallSlots:
    """The recall slots of one sequence: `num_slots` tokens of K and V for each (layer, KV head)."""

    def __init__(self, arena: Arena, num_slots: int) -> None:
        layout = arena.layout
        columns = num_slots // BLOCK_TOKENS
        self._arena = arena
        self._table = arena.allocate(Owner.SLOTS, layout.num_cells * columns).view(layout.num_cells, columns)
        self._resident = torch.full((layout.num_layers, layout.num_kv_heads, num_slots), EMPTY, dtype=torch.int64)

    @property
    def num_bytes(self) -> int:
        """Arena bytes held."""
        return self._table.numel() * self._arena.layout.block_bytes

    def admit(self, layer: int, chosen: Tensor) -> Misses:
        """Makes `chosen` (`[kv, n]`) the resident set, given that the caller now fetches the misses."""
        resident = self._resident[layer]
        misses = place(resident, chosen)
        resident[misses.heads, misses.slots] = misses.offsets
        return misses

    def write(self, layer: int, misses: Misses, pairs: Tensor) -> None:
        """Puts fetched tokens, `[n, 2 * d]`, into their slots."""
        layout = self._arena.layout
        table = self._table.view(layout.num_layers, 2, layout.num_kv_heads, -1)[layer]
        heads, slots = misses.heads.to(table.device), misses.slots.to(table.device)
        for side, half in enumerate(pairs.view(-1, 2, layout.head_dim).unbind(1)):
            where = table[side][heads, slots // BLOCK_TOKENS] * BLOCK_TOKENS + slots % BLOCK_TOKENS
            self._arena.slots[where] = half

    def read(self, layer: int, count: int) -> tuple[Tensor, Tensor]:
        """Copies of K and V in the first `count` slots, each `[kv, count, d]`.

        The slots in use are always the first: a token leaves its slot only to another one.
        """
        layout = self._arena.layout
        columns = -(-count // BLOCK_TOKENS)
        table = self._table.view(layout.num_layers, 2, layout.num_kv_heads, -1)[layer, :, :, :columns]
        return self._arena.read(table[0])[:, :count], self._arena.read(table[1])[:, :count]

    def clear(self) -> None:
        """Forgets what is resident; the slots stay."""
        self._resident.fill_(EMPTY)

    def close(self) -> None:
        """Frees the slots."""
        self._arena.free(Owner.SLOTS, self._table)
