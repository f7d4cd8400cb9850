"""Recall slots: which distant tokens are on the device now, and what has to move when the choice changes.

The resident set is that of the last step (ClusterKV's R = 1 at token granularity, arXiv:2412.03213, §4.3): only the
difference between two steps moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvservice.kv.arena import Arena
from kvservice.kv.layout import SharedGroups
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

    def of(self, marked: Tensor) -> Placed:
        """The same with some of the missing tokens only, bool `[m]`."""
        return Placed(self.where, self.heads[marked], self.offsets[marked], self.slots[marked])


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

    Args:
        arena: where they are.
        num_slots: tokens, a multiple of 16.
        shared: (layer, KV head)s that share keys. Only values of followers have slots; their keys' are the anchor's.

    Attributes:
        table: int32 `[cells, num_slots / 16]`, arena blocks.
        resident: int32 `[layers, kv, 2, num_slots]` on the CPU, what is in them: see `place`.
    """

    def __init__(self, arena: Arena, num_slots: int, shared: SharedGroups | None = None) -> None:
        layout = arena.layout
        columns = num_slots // BLOCK_TOKENS
        num_cells = layout.num_cells - (shared.followers.numel() if shared else 0)
        self._arena = arena
        self._held = arena.allocate(Owner.SLOTS, num_cells * columns).view(num_cells, columns)
        self.table = self._held if shared is None else _with_shared_keys(self._held, shared)
        self.resident = torch.empty(layout.num_layers, layout.num_kv_heads, 2, num_slots, dtype=torch.int32)
        self.clear()

    @property
    def num_bytes(self) -> int:
        """Arena bytes held."""
        return self._held.numel() * self._arena.layout.block_bytes

    def admit(self, layer: int, chosen: Tensor) -> Placed:
        """Makes `chosen` (`[kv, n]`, rising) the resident set, given that the caller now fetches what is missing."""
        return place(self.resident[layer], chosen)

    def write(self, layer: int, heads: Tensor, slots: Tensor, pairs: Tensor) -> None:
        """Puts fetched tokens, `[m, 2 * d]`, into slots of KV heads, int64 `[m]` each."""
        # A copy: torch won't write from staging, which is in the arena too, when one token makes its rows contiguous.
        keys, values = pairs.view(-1, 2, self._arena.layout.head_dim).clone().unbind(1)
        self._arena.slots[self._locate(layer, 0, heads, slots)] = keys
        self._arena.slots[self._locate(layer, 1, heads, slots)] = values

    def write_values(self, layer: int, heads: Tensor, slots: Tensor, values: Tensor) -> None:
        """As `write`, of values alone, `[m, d]`."""
        self._arena.slots[self._locate(layer, 1, heads, slots)] = values.clone()

    def read(self, layer: int, keys_at: Tensor, values_at: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of K and V in slots, int64 `[kv, n]` each, in that order: each `[kv, n, d]`."""
        heads = torch.arange(values_at.shape[0]).unsqueeze(1)
        slots = self._arena.slots
        return slots[self._locate(layer, 0, heads, keys_at)], slots[self._locate(layer, 1, heads, values_at)]

    def blocks(self) -> Tensor:
        """All blocks held, int32 `[n]`."""
        return self._held.reshape(-1)

    def clear(self) -> None:
        """Forgets what is resident; the slots stay."""
        self.resident[:, :, 0] = EMPTY
        self.resident[:, :, 1] = torch.arange(self.resident.shape[-1], dtype=torch.int32)

    def close(self) -> None:
        """Frees the slots."""
        self._arena.free(Owner.SLOTS, self._held)

    def _locate(self, layer: int, side: int, heads: Tensor, slots: Tensor) -> Tensor:
        layout = self._arena.layout
        table = self.table.view(layout.num_layers, 2, layout.num_kv_heads, -1)[layer, side]
        heads, slots = heads.to(table.device), slots.to(table.device)
        return table[heads, slots // BLOCK_TOKENS].long() * BLOCK_TOKENS + slots % BLOCK_TOKENS


def _with_shared_keys(held: Tensor, shared: SharedGroups) -> Tensor:
    """From a row of blocks for each value, then for each key that is stored, to one for each cell."""
    num_layers, num_kv = shared.key_layers.shape
    values = held[: num_layers * num_kv].view(num_layers, num_kv, -1)
    keys = torch.empty_like(values)
    keys.view(num_layers * num_kv, -1)[shared.own.to(held.device)] = held[num_layers * num_kv :]
    anchors = shared.key_layers.to(held.device).unsqueeze(2).expand_as(keys)
    return torch.stack([keys.gather(0, anchors), values], 1).flatten(0, 2)
