"""A sequence's state on the device: token ids, block table, window. Knows nothing of tiers, indexes or scheduling.

Columns of the block table (each row is a cell):

    column 0        1 …                                    last
    ├ sinks ┤├ window: positions window_start … num_computed - 1 ┤
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.errors import InternalError
from kvservice.kv.arena import Arena
from kvservice.kv.ledger import Owner
from kvservice.types import BLOCK_TOKENS, GROUP_TOKENS, SINK_TOKENS


class SequenceState:
    """The full-precision KV of one sequence on the device, and what it stands for.

    Attributes:
        tokens: all tokens of the sequence. KV of the first `num_computed` exists; at most the last token of an answer
            has none yet.
        window_start: first position of the window.
        table: int64 `[cells, columns]`, arena blocks.
    """

    def __init__(self, arena: Arena) -> None:
        self.tokens: list[int] = []
        self.num_computed = 0
        self.window_start = SINK_TOKENS
        self._arena = arena
        self.table = torch.empty(arena.layout.num_cells, 0, dtype=torch.int64, device=arena.device)

    @property
    def num_resident(self) -> int:
        """Positions whose full KV is on the device."""
        return self.num_computed - (self.window_start - SINK_TOKENS)

    @property
    def num_distant(self) -> int:
        """Positions whose KV is in the tier."""
        return self.window_start - SINK_TOKENS

    @property
    def window_bytes(self) -> int:
        """Device bytes of sinks and window."""
        return int(self.table.numel()) * self._arena.layout.block_bytes

    def extend(self, num_tokens: int) -> None:
        """Makes room for `num_tokens` more positions after `num_computed`."""
        needed = -(-(self.num_resident + num_tokens) // BLOCK_TOKENS) - self.table.shape[1]
        if needed > 0:
            rows = self.table.shape[0]
            blocks = self._arena.allocate(Owner.WINDOW, needed * rows).view(rows, needed)
            self.table = torch.cat([self.table, blocks], dim=1)

    def slots(self, num_tokens: int) -> Tensor:
        """Where the KV of the next `num_tokens` positions goes: arena slots, `[layers, 2, kv, num_tokens]`."""
        layout = self._arena.layout
        local = torch.arange(self.num_resident, self.num_resident + num_tokens, device=self._arena.device)
        slots = self.table[:, local // BLOCK_TOKENS] * BLOCK_TOKENS + local % BLOCK_TOKENS
        return slots.view(layout.num_layers, 2, layout.num_kv_heads, num_tokens)

    def read(self, layer: int, num_resident: int) -> tuple[Tensor, Tensor]:
        """Copies of K and V of the first `num_resident` device positions of a layer, each `[kv, num_resident, d]`."""
        layout = self._arena.layout
        columns = -(-num_resident // BLOCK_TOKENS)
        rows = self.table.view(layout.num_layers, 2, layout.num_kv_heads, -1)[layer, :, :, :columns]
        keys = self._arena.read(rows[0])[:, :num_resident]
        values = self._arena.read(rows[1])[:, :num_resident]
        return keys, values

    def read_groups(self, num_groups: int) -> Tensor:
        """Copies of the window's oldest groups in host form, `[num_groups, layers, kv, 64, 2, d]`."""
        columns = num_groups * GROUP_TOKENS // BLOCK_TOKENS
        cells = self._arena.cells[self.table[:, 1 : 1 + columns]]
        return self._arena.layout.cells_to_groups(cells)

    def drop_groups(self, num_groups: int) -> None:
        """Frees the window's oldest groups: the window slides."""
        columns = num_groups * GROUP_TOKENS // BLOCK_TOKENS
        self._arena.free(Owner.WINDOW, self.table[:, 1 : 1 + columns])
        self.table = torch.cat([self.table[:, :1], self.table[:, 1 + columns :]], dim=1)
        self.window_start += num_groups * GROUP_TOKENS

    def restore_groups(self, groups: Tensor) -> None:
        """Puts groups back in front of the window: the inverse of `read_groups` and `drop_groups`.

        Args:
            groups: `[n, layers, kv, 64, 2, d]`, those just before `window_start`.
        """
        cells = self._arena.layout.groups_to_cells(groups.to(self._arena.device))
        rows, columns = cells.shape[:2]
        blocks = self._arena.allocate(Owner.WINDOW, rows * columns).view(rows, columns)
        self._arena.cells[blocks] = cells
        self.table = torch.cat([self.table[:, :1], blocks, self.table[:, 1:]], dim=1)
        self.window_start -= groups.shape[0] * GROUP_TOKENS

    def shrink(self, num_computed: int) -> None:
        """Forgets the KV of all positions from `num_computed` on. Those must lie in the window or the sinks.

        Raises:
            InternalError: the window would have to be restored first.
        """
        if self.num_distant and num_computed < self.window_start:
            raise InternalError(f"position {num_computed} lies before the window at {self.window_start}")
        self.num_computed = num_computed
        columns = -(-self.num_resident // BLOCK_TOKENS)
        if columns < self.table.shape[1]:
            self._arena.free(Owner.WINDOW, self.table[:, columns:])
            self.table = self.table[:, :columns].contiguous()

    def close(self) -> None:
        """Frees every block."""
        self._arena.free(Owner.WINDOW, self.table)
        self.table = self.table[:, :0]
        self.tokens.clear()
        self.num_computed = 0
        self.window_start = SINK_TOKENS
