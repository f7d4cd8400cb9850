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
class Placed:
    """Where the tokens of a step lie, and which of them have to be fetched first, in pairs of equal index.

    Attributes:
        where: the slot of each chosen token, int64 `[kv, n]`.
        heads: KV head of a missing token, int64 `[m]`.
        offsets: its position counted from the first distant one, int64 `[m]`.
        slots: the recall slot of that head to put it in, int64 `[m]`.
    """

    where: Tensor
    heads: Tensor
    offsets: Tensor
    slots: Tensor


def place(resident: Tensor, chosen: Tensor) -> Placed:
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
    slots = taken.nonzero(as_tuple=True)[1]
    where = equal.int().argmax(2)
    where[heads, at] = slots
    return Placed(where, heads, chosen[heads, at], slots)


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

    def admit(self, layer: int, chosen: Tensor) -> Placed:
        """Makes `chosen` (`[kv, n]`) the resident set, given that the caller now fetches what is missing."""
        resident = self._resident[layer]
        placed = place(resident, chosen)
        resident[placed.heads, placed.slots] = placed.offsets
        return placed

    def write(self, layer: int, placed: Placed, pairs: Tensor) -> None:
        """Puts fetched tokens, `[m, 2 * d]`, into their slots."""
        keys, values = pairs.view(-1, 2, self._arena.layout.head_dim).unbind(1)
        self._arena.slots[self._locate(layer, 0, placed.heads, placed.slots)] = keys
        self._arena.slots[self._locate(layer, 1, placed.heads, placed.slots)] = values

    def read(self, layer: int, where: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of K and V in the slots `where`, int64 `[kv, n]`, in that order: each `[kv, n, d]`."""
        heads = torch.arange(where.shape[0]).unsqueeze(1)
        slots = self._arena.slots
        return slots[self._locate(layer, 0, heads, where)], slots[self._locate(layer, 1, heads, where)]

    def blocks(self) -> Tensor:
        """All blocks held, int32 `[n]`."""
        return self._table.reshape(-1)

    def clear(self) -> None:
        """Forgets what is resident; the slots stay."""
        self._resident.fill_(EMPTY)

    def close(self) -> None:
        """Frees the slots."""
        self._arena.free(Owner.SLOTS, self._table)

    def _locate(self, layer: int, side: int, heads: Tensor, slots: Tensor) -> Tensor:
        layout = self._arena.layout
        table = self._table.view(layout.num_layers, 2, layout.num_kv_heads, -1)[layer, side]
        heads, slots = heads.to(table.device), slots.to(table.device)
        return table[heads, slots // BLOCK_TOKENS].long() * BLOCK_TOKENS + slots % BLOCK_TOKENS
