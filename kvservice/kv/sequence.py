"""A sequence's state on the device: token ids, block table, window. Knows nothing of tiers, indexes or scheduling.

Columns of the block table (each row is a cell):

    column 0        1 …                                    last
    ├ sinks ┤├ window: positions window_start … num_computed - 1 ┤

Every (layer, KV head) holds the same positions, until `keep` drops other ones for each: then the sequence is *ragged*,
and the position in every slot is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.errors import InternalError
from kvservice.kv.arena import Arena
from kvservice.kv.layout import BLOCKS_PER_GROUP, KVLayout
from kvservice.kv.ledger import Owner
from kvservice.types import BLOCK_TOKENS, GROUP_TOKENS, SINK_TOKENS

NO_BLOCK = -1
"""In a ragged block table: this cell has no block in this column."""

NO_COLUMN = -1
"""No column is known to be the sequence's own."""

EMPTY = -1
"""Position of a slot that holds no token."""


class SequenceState:
    """The full-precision KV of one sequence on the device, and what it stands for.

    Attributes:
        tokens: all tokens of the sequence. KV of the first `num_computed` exists; at most the last token of an answer
            has none yet.
        window_start: first position of the window.
    """

    def __init__(self, arena: Arena) -> None:
        self.tokens: list[int] = []
        self.num_computed = 0
        self.window_start = SINK_TOKENS
        self._arena = arena
        self._blocks = torch.empty(arena.layout.num_cells, 0, dtype=torch.int32, device=arena.device)
        self._num_columns = 0
        self._may_share = False
        self._own_column = NO_COLUMN
        self._ragged: Tensor | None = None  # positions, int32 [layers * kv, width]

    @property
    def layout(self) -> KVLayout:
        """Of its KV."""
        return self._arena.layout

    @property
    def table(self) -> Tensor:
        """Arena blocks, int32 `[cells, columns]`."""
        return self._blocks[:, : self._num_columns]

    @property
    def num_resident(self) -> int:
        """Positions whose full KV is on the device; of a ragged sequence, the most that a (layer, KV head) holds."""
        if self._ragged is not None:
            return self._ragged.shape[1]
        return self.num_computed - (self.window_start - SINK_TOKENS)

    @property
    def num_distant(self) -> int:
        """Positions whose KV is in the tier."""
        return self.window_start - SINK_TOKENS

    @property
    def is_ragged(self) -> bool:
        """Whether (layer, KV head)s may hold different positions."""
        return self._ragged is not None

    @property
    def positions(self) -> Tensor:
        """The position in each slot, int32 `[1 or layers * kv, num_resident]`; EMPTY where there is none."""
        if self._ragged is not None:
            return self._ragged
        sinks = torch.arange(min(SINK_TOKENS, self.num_computed), dtype=torch.int32)
        window = torch.arange(self.window_start, max(self.window_start, self.num_computed), dtype=torch.int32)
        return torch.cat([sinks, window]).unsqueeze(0).to(self._arena.device)

    @property
    def counts(self) -> Tensor:
        """Of a ragged sequence: tokens that each (layer, KV head) holds, int64 `[layers * kv]`."""
        return (self.positions != EMPTY).sum(1)

    @property
    def window_bytes(self) -> int:
        """Device bytes of sinks and window, shared ones included."""
        return self._held().numel() * self._arena.layout.block_bytes

    @property
    def prepared_bytes(self) -> int:
        """Of those, what `extend` has made room in for positions that aren't computed yet."""
        if self._ragged is not None:
            return 0
        columns = max(0, self._num_columns - -(-self.num_resident // BLOCK_TOKENS))
        return columns * self._blocks.shape[0] * self._arena.layout.block_bytes

    def blocks(self) -> Tensor:
        """All blocks it holds, int32 `[n]`, column by column for each cell."""
        return self._held()

    # -- growing -----------------------------------------------------------------------------------------------------

    def extend(self, num_tokens: int) -> None:
        """Makes room for `num_tokens` more positions after `num_computed`, in blocks that nobody else holds."""
        if self._may_share:
            self._own_last()
        if self._ragged is not None:
            self._extend_ragged(num_tokens)
            return
        needed = -(-(self.num_resident + num_tokens) // BLOCK_TOKENS)
        if needed > self._num_columns:
            rows, missing = self._blocks.shape[0], needed - self._num_columns
            self._add_columns(self._arena.allocate(Owner.WINDOW, missing * rows).view(rows, missing))
            self._own_column = self._num_columns - 1

    def has_room(self, num_tokens: int) -> bool:
        """Whether `extend` has made room for `num_tokens` more positions, and nothing has taken it away."""
        return -(-(self.num_resident + num_tokens) // BLOCK_TOKENS) <= self._num_columns

    def slots(self, num_tokens: int) -> Tensor:
        """Where the KV of the next `num_tokens` positions goes: arena slots, int64 `[layers, 2, kv, num_tokens]`."""
        layout = self._arena.layout
        if self._ragged is not None:
            first = self.counts
            local = first.unsqueeze(1) + torch.arange(num_tokens, device=first.device)
            local = _of_both_sides(local, layout.num_layers, layout.num_kv_heads)
            found = self.table.long().gather(1, local // BLOCK_TOKENS) * BLOCK_TOKENS + local % BLOCK_TOKENS
        elif num_tokens == 1:
            column, offset = divmod(self.num_resident, BLOCK_TOKENS)
            found = self._blocks[:, column].long() * BLOCK_TOKENS + offset
        else:
            at = torch.arange(self.num_resident, self.num_resident + num_tokens, device=self._arena.device)
            found = self._blocks[:, at // BLOCK_TOKENS].long() * BLOCK_TOKENS + at % BLOCK_TOKENS
        return found.view(layout.num_layers, 2, layout.num_kv_heads, num_tokens)

    def commit(self, num_tokens: int) -> None:
        """Counts the next `num_tokens` positions in: their KV has been written."""
        if self._ragged is not None:
            counts = self.counts
            new = torch.arange(self.num_computed, self.num_computed + num_tokens, dtype=torch.int32)
            width = max(self._ragged.shape[1], int(counts.max()) + num_tokens)
            positions = torch.full((counts.numel(), width), EMPTY, dtype=torch.int32, device=counts.device)
            positions[:, : self._ragged.shape[1]] = self._ragged
            at = counts.unsqueeze(1) + torch.arange(num_tokens, device=counts.device)
            self._ragged = positions.scatter(1, at, new.to(counts.device).expand(counts.numel(), -1))
        self.num_computed += num_tokens

    def put(self, pairs: Tensor) -> None:
        """Counts the next positions in with KV that was computed elsewhere, `[layers, kv, n, 2, d]`."""
        num_tokens = pairs.shape[2]
        if num_tokens:
            self.extend(num_tokens)
            self._arena.slots[self.slots(num_tokens)] = pairs.to(self._arena.device).permute(0, 3, 1, 2, 4)
            self.commit(num_tokens)

    def put_groups(self, groups: Tensor) -> None:
        """As `put`, of whole groups behind sinks and whole groups, `[n, layers, kv, 64, 2, d]`."""
        if groups.shape[0]:
            first = self.num_resident // BLOCK_TOKENS
            cells = self._arena.layout.groups_to_cells(groups.to(self._arena.device))
            self.extend(groups.shape[0] * GROUP_TOKENS)
            self._arena.cells[self.table[:, first : first + cells.shape[1]].long()] = cells
            self.commit(groups.shape[0] * GROUP_TOKENS)

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, layer: int, num_resident: int, key_layers: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Copies of K and V of the first `num_resident` device positions of a layer, each `[kv, num_resident, d]`.

        Args:
            layer: the layer.
            num_resident: how many positions.
            key_layers: int64 `[kv]`, the layers whose keys to read instead; None: its own.
        """
        layout = self._arena.layout
        columns = -(-num_resident // BLOCK_TOKENS)
        blocks = self._blocks.view(layout.num_layers, 2, layout.num_kv_heads, -1)[..., :columns]
        rows = blocks[layer]
        if key_layers is not None:
            rows = torch.stack([blocks[key_layers, 0, torch.arange(layout.num_kv_heads)], rows[1]])
        # A ragged row that ends early reads any block: the caller masks what is EMPTY.
        rows = rows if self._ragged is None else rows.clamp(min=0)
        keys = self._arena.read(rows[0])[:, :num_resident]
        values = self._arena.read(rows[1])[:, :num_resident]
        return keys, values

    def cells(self, layer: int) -> tuple[Tensor, Tensor]:
        """The arena, `[blocks, 16, d]`, and its blocks of a layer, int32 `[2 * kv, columns]`: keys, then values."""
        num_kv = self.layout.num_kv_heads
        return self._arena.cells, self.table[2 * layer * num_kv : 2 * (layer + 1) * num_kv]

    def read_at(self, layer: int, local: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of K and V in some slots of a layer, each `[kv, n, d]`; `local` is int64 `[kv, n]`."""
        num_kv = self.layout.num_kv_heads
        cells = torch.arange(num_kv, device=local.device).unsqueeze(1) + 2 * layer * num_kv
        slots = self._arena.slots
        return slots[self._slots_at(cells, local)], slots[self._slots_at(cells + num_kv, local)]

    def read_groups(self, num_groups: int, first: int = 0) -> Tensor:
        """Copies of the window's oldest groups from `first` on in host form, `[num_groups, layers, kv, 64, 2, d]`."""
        columns = BLOCKS_PER_GROUP * num_groups
        column = 1 + BLOCKS_PER_GROUP * first
        slots = self._arena.layout.group_slots(self._blocks[:, column : column + columns])
        return self._arena.slots.index_select(0, slots.view(-1)).view(*slots.shape, -1)

    def read_around(self, num_groups: int) -> Tensor:
        """A copy of what is computed on the device, less the window's oldest groups: `[layers, kv, n, 2, d]`."""
        layout, skipped = self._arena.layout, BLOCKS_PER_GROUP * num_groups
        blocks = torch.cat([self.table[:, :1], self.table[:, 1 + skipped :]], dim=1).long()
        blocks = blocks.view(layout.num_layers, 2, layout.num_kv_heads, -1)
        at = torch.arange(self.num_resident - num_groups * GROUP_TOKENS, device=blocks.device)
        slots = (blocks[..., at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS).permute(0, 2, 3, 1)
        return self._arena.slots.index_select(0, slots.reshape(-1)).view(*slots.shape, -1)

    # -- shrinking ---------------------------------------------------------------------------------------------------

    def drop_groups(self, num_groups: int) -> None:
        """Gives back the window's oldest groups: the window slides."""
        columns = num_groups * GROUP_TOKENS // BLOCK_TOKENS
        table = self.table
        self._arena.free(Owner.WINDOW, table[:, 1 : 1 + columns])
        # In place: the columns at the end are for what comes next.
        self._num_columns -= columns
        self._own_column = NO_COLUMN
        self._blocks[:, 1 : self._num_columns] = table[:, 1 + columns :].clone()
        self.window_start += num_groups * GROUP_TOKENS

    def retreat(self, num_groups: int) -> None:
        """Takes a sequence whose window is empty back by groups that nobody wants any more.

        Raises:
            InternalError: the window isn't empty.
        """
        if num_groups and self.num_computed != self.window_start:
            raise InternalError(f"positions {self.window_start} to {self.num_computed - 1} are still in the window")
        self.num_computed -= num_groups * GROUP_TOKENS
        self.window_start -= num_groups * GROUP_TOKENS

    def restore_groups(self, groups: Tensor) -> None:
        """Puts groups back in front of the window: the inverse of `read_groups` and `drop_groups`.

        Args:
            groups: `[n, layers, kv, 64, 2, d]`, those just before `window_start`.
        """
        cells = self._arena.layout.groups_to_cells(groups.to(self._arena.device))
        rows, columns = cells.shape[:2]
        blocks = self._arena.allocate(Owner.WINDOW, rows * columns).view(rows, columns)
        self._arena.cells[blocks] = cells
        table = self.table
        self._set_table(torch.cat([table[:, :1], blocks, table[:, 1:]], dim=1))
        self.window_start -= groups.shape[0] * GROUP_TOKENS

    def skip(self, num_groups: int) -> None:
        """Counts in groups behind the sinks whose KV is in the tier. The window must be empty."""
        self.num_computed += num_groups * GROUP_TOKENS
        self.window_start += num_groups * GROUP_TOKENS

    def shrink(self, num_computed: int) -> None:
        """Forgets the KV of all positions from `num_computed` on. Those must lie in the window or the sinks.

        Raises:
            InternalError: the window would have to be restored first.
        """
        if self.num_distant and num_computed < self.window_start:
            raise InternalError(f"position {num_computed} lies before the window at {self.window_start}")
        if self._ragged is not None:
            self.keep((self._ragged != EMPTY) & (self._ragged < num_computed))
            self.num_computed = num_computed
            return
        self.num_computed = num_computed
        columns = -(-self.num_resident // BLOCK_TOKENS)
        if columns < self._num_columns:
            self._arena.free(Owner.WINDOW, self.table[:, columns:])
            self._num_columns = columns

    def keep(self, marked: Tensor) -> Tensor:
        """Keeps the marked slots of each (layer, KV head), and frees the blocks that this empties.

        Tokens stay where they are, but those at the end, which take the places of dropped ones.

        Args:
            marked: bool `[layers * kv, num_resident]`; rows may keep different numbers.

        Returns:
            int64 `[layers * kv, num_resident]` as it is now: which slot each was before. Of slots that are empty, any.

        Raises:
            InternalError: the sequence has distant tokens. What is evicted for good and what is recalled don't mix.
        """
        if self.num_distant:
            raise InternalError("a sequence with distant tokens can't evict")
        layout, rows = self._arena.layout, marked.shape[0]
        counts = marked.sum(1, keepdim=True)
        width = int(counts.max())
        slot = torch.arange(marked.shape[1], device=marked.device).expand(marked.shape)
        # In each row as many are kept behind its new end as are dropped before it.
        holes, tails = ~marked & (slot < counts), marked & (slot >= counts)
        source = slot.clone()
        source[holes] = slot[tails]
        source = source[:, :width]
        filled = slot[:, :width] < counts
        self._ragged = self.positions.expand(rows, -1).gather(1, source).to(torch.int32).masked_fill(~filled, EMPTY)
        row, to = holes[:, :width].nonzero(as_tuple=True)
        cells = row // layout.num_kv_heads * 2 * layout.num_kv_heads + row % layout.num_kv_heads
        cells = torch.cat([cells, cells + layout.num_kv_heads])  # K, then V
        moved = self._arena.slots[self._slots_at(cells, source[row, to].repeat(2))]
        self._drop_columns(_of_both_sides(counts, layout.num_layers, layout.num_kv_heads))
        if self._may_share and to.numel():
            self.own_all()
        self._arena.slots[self._slots_at(cells, to.repeat(2))] = moved
        return source

    def write(self, layer: int, keys: Tensor, values: Tensor, marked: Tensor) -> None:
        """Writes K and V `[kv, num_resident, d]` of the marked slots of a layer, which must be its own: see `own_all`.

        Args:
            layer: the layer.
            keys: `[kv, num_resident, d]`.
            values: as `keys`.
            marked: bool `[kv, num_resident]`.
        """
        num_kv = self.layout.num_kv_heads
        head, local = marked.nonzero(as_tuple=True)
        for side, rows in enumerate((keys, values)):
            at = self._slots_at((2 * layer + side) * num_kv + head, local)
            self._arena.slots[at] = rows[head, local].to(self.layout.dtype)

    # -- sharing, moving, ending -------------------------------------------------------------------------------------

    def fork(self) -> SequenceState:
        """The same sequence once more. Blocks are shared, and copied when one of the two is about to write to them."""
        twin = SequenceState(self._arena)
        twin.tokens = list(self.tokens)
        twin.num_computed = self.num_computed
        twin.window_start = self.window_start
        twin._set_table(self.table.clone())
        twin._ragged = None if self._ragged is None else self._ragged.clone()
        self._arena.share(Owner.WINDOW, self._held())
        self._may_share = twin._may_share = True
        self._own_column = NO_COLUMN
        return twin

    def own_all(self) -> None:
        """Copies the blocks that somebody else holds too, so that all may be written to."""
        held = self.table != NO_BLOCK
        self.table[held] = self._arena.own(Owner.WINDOW, self.table[held])

    def num_shared_from(self, column: int) -> int:
        """How many of its blocks in the columns from `column` on somebody else holds too."""
        if not self._may_share:
            return 0
        held = self._blocks[:, column : self._num_columns]
        return self._arena.num_shared(held[held != NO_BLOCK])

    def move_to(self, blocks: Tensor) -> None:
        """From now on its KV is in other blocks, given in the order of `blocks()`; the old ones are forgotten."""
        held = self.table != NO_BLOCK
        moved = self.table.clone()
        moved[held] = blocks
        self._set_table(moved)
        self._may_share = False

    def close(self) -> None:
        """Gives every block back."""
        self._arena.free(Owner.WINDOW, self._held())
        self.forget()
        self.tokens.clear()

    def forget(self) -> None:
        """Nothing is computed. The blocks are somebody else's business."""
        self._num_columns = 0
        self._ragged = None
        self.num_computed = 0
        self.window_start = SINK_TOKENS

    # ----------------------------------------------------------------------------------------------------------------

    def _held(self) -> Tensor:
        table = self.table
        return table.reshape(-1) if self._ragged is None else table[table != NO_BLOCK]

    def _add_columns(self, columns: Tensor) -> None:
        count = columns.shape[1]
        needed = self._num_columns + count
        if needed > self._blocks.shape[1]:
            # Doubling, so that a growing sequence copies its table seldom.
            grown = self._blocks.new_full((self._blocks.shape[0], max(needed, 2 * self._blocks.shape[1])), NO_BLOCK)
            grown[:, : self._num_columns] = self.table
            self._blocks = grown
        self._blocks[:, self._num_columns : needed] = columns
        self._num_columns = needed

    def _set_table(self, table: Tensor) -> None:
        self._own_column = NO_COLUMN
        self._blocks = table.contiguous()
        self._num_columns = table.shape[1]

    def _own_last(self) -> None:
        """Makes the column that is written to next its own, if it is there already."""
        if self._num_columns == 0:
            return
        if self._ragged is not None:
            self.own_all()
        elif self.num_resident % BLOCK_TOKENS and self._own_column != self._num_columns - 1:
            last = self._own_column = self._num_columns - 1
            self._blocks[:, last] = self._arena.own(Owner.WINDOW, self._blocks[:, last])

    def _extend_ragged(self, num_tokens: int) -> None:
        layout = self._arena.layout
        assert self._ragged is not None
        counts = (self.counts + num_tokens).unsqueeze(1)
        needed = -(-_of_both_sides(counts, layout.num_layers, layout.num_kv_heads) // BLOCK_TOKENS)
        widest = int(needed.max())
        if widest > self._num_columns:
            self._add_columns(self._blocks.new_full((self._blocks.shape[0], widest - self._num_columns), NO_BLOCK))
        missing = (torch.arange(self._num_columns, device=needed.device) < needed) & (self.table == NO_BLOCK)
        self.table[missing] = self._arena.allocate(Owner.WINDOW, int(missing.sum()))

    def _drop_columns(self, counts: Tensor) -> None:
        """Frees what lies beyond `counts` tokens of each cell, `[cells, 1]`."""
        needed = -(-counts // BLOCK_TOKENS)
        beyond = (torch.arange(self._num_columns, device=needed.device) >= needed) & (self.table != NO_BLOCK)
        self._arena.free(Owner.WINDOW, self.table[beyond])
        self.table[beyond] = NO_BLOCK
        self._num_columns = int(needed.max())

    def _slots_at(self, cells: Tensor, local: Tensor) -> Tensor:
        """Arena slots of slot `local[i]` of cell `cells[i]`, `[n]`."""
        return self._blocks[cells, local // BLOCK_TOKENS].long() * BLOCK_TOKENS + local % BLOCK_TOKENS


def _of_both_sides(rows: Tensor, num_layers: int, num_kv_heads: int) -> Tensor:
    """From a row for each (layer, KV head) to one for each cell: `[layers * kv, n]` to `[cells, n]`."""
    by_layer = rows.view(num_layers, 1, num_kv_heads, -1)
    return by_layer.expand(-1, 2, -1, -1).reshape(2 * num_layers * num_kv_heads, -1)
