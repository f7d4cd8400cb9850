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

EMPTY = torch.iinfo(torch.int32).max
"""In place of a token in a slot that holds none; above every token."""


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
    """Decides which slot each missing token gets: slots that this step doesn't use, in the order of `resident`.

    Args:
        resident: int32 `[kv, 2, slots]`, the tokens in the slots, rising, EMPTY behind them, and the slot of each;
            changed to what it is once the missing are fetched.
        chosen: `[kv, n]`, offsets this step attends to, rising, n ≤ slots.
    """
    tokens, slots = resident[:, 0].long(), resident[:, 1].long()
    equal = chosen.unsqueeze(2) == tokens.unsqueeze(1)
    missing = ~equal.any(2)
    unused = ~equal.any(1)
    taken = unused & (unused.cumsum(1) <= missing.sum(1, keepdim=True))
    where = slots.gather(1, equal.int().argmax(2))
    where[missing] = slots[taken]
    heads = missing.nonzero(as_tuple=True)[0]
    count = chosen.shape[1]
    resident[:, 0, :count], resident[:, 0, count:] = chosen, EMPTY
    resident[:, 1, :count], resident[:, 1, count:] = where, slots[unused & ~taken].view(resident.shape[0], -1)
    return Placed(where, heads, chosen[missing], where[missing])


class RecallSlots:
    """The recall slots of one sequence: `num_slots` tokens of K and V for each (layer, KV head).

    Attributes:
        table: int32 `[cells, num_slots / 16]`, arena blocks.
        resident: int32 `[layers, kv, 2, num_slots]` on the CPU, what is in them: see `place`.
    """

    def __init__(self, arena: Arena, num_slots: int) -> None:
        layout = arena.layout
        columns = num_slots // BLOCK_TOKENS
        self._arena = arena
        self.table = arena.allocate(Owner.SLOTS, layout.num_cells * columns).view(layout.num_cells, columns)
        self.resident = torch.empty(layout.num_layers, layout.num_kv_heads, 2, num_slots, dtype=torch.int32)
        self.clear()

    @property
    def num_bytes(self) -> int:
        """Arena bytes held."""
        return self.table.numel() * self._arena.layout.block_bytes

    def admit(self, layer: int, chosen: Tensor) -> Placed:
        """Makes `chosen` (`[kv, n]`, rising) the resident set, given that the caller now fetches what is missing."""
        return place(self.resident[layer], chosen)

    def write(self, layer: int, placed: Placed, pairs: Tensor) -> None:
        """Puts fetched tokens, `[m, 2 * d]`, into their slots."""
        # A copy: torch won't write from staging, which is in the arena too, when one token makes its rows contiguous.
        keys, values = pairs.view(-1, 2, self._arena.layout.head_dim).clone().unbind(1)
        self._arena.slots[self._locate(layer, 0, placed.heads, placed.slots)] = keys
        self._arena.slots[self._locate(layer, 1, placed.heads, placed.slots)] = values

    def read(self, layer: int, where: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of K and V in the slots `where`, int64 `[kv, n]`, in that order: each `[kv, n, d]`."""
        heads = torch.arange(where.shape[0]).unsqueeze(1)
        slots = self._arena.slots
        return slots[self._locate(layer, 0, heads, where)], slots[self._locate(layer, 1, heads, where)]

    def blocks(self) -> Tensor:
        """All blocks held, int32 `[n]`."""
        return self.table.reshape(-1)

    def clear(self) -> None:
        """Forgets what is resident; the slots stay."""
        self.resident[:, :, 0] = EMPTY
        self.resident[:, :, 1] = torch.arange(self.resident.shape[-1], dtype=torch.int32)

    def close(self) -> None:
        """Frees the slots."""
        self._arena.free(Owner.SLOTS, self.table)

    def _locate(self, layer: int, side: int, heads: Tensor, slots: Tensor) -> Tensor:
        layout = self._arena.layout
        table = self.table.view(layout.num_layers, 2, layout.num_kv_heads, -1)[layer, side]
        heads, slots = heads.to(table.device), slots.to(table.device)
        return table[heads, slots // BLOCK_TOKENS].long() * BLOCK_TOKENS + slots % BLOCK_TOKENS
