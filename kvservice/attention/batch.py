"""The attention of one step over all its sequences. Knows nothing of scheduling, sampling or the model around it.

For each sequence and layer, the parts of the queries of a step:

    sinks + window + the step's own tokens      device, causal
    distant                                     FULL: every token, streamed tile by tile through the staging ring
                                                SELECT: the recalled ones, for each query and KV head

Where layers share distant keys, it matters to a query which tokens are distant: to each those before its own window, so
of a FULL step's own tokens and window too. They are attended to apart, by the anchors' keys: see `attention.sharing`.

Sequences that drop tokens hold other ones in each KV head: see `attention.held`.

A step's queries all see the same window: the engine never lets a SELECT step cross a slide of the window, so a query's
parts don't depend on how its tokens were split into steps.

Deterministic attention adds the parts in order of position, cut where the window's slides cut them, and selects for one
query at a time: then no bit of a query's result depends on the tokens that are computed with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kvservice.attention.held import attend_found, attend_held, landing_table
from kvservice.attention.sharing import Anchors, visible_masks
from kvservice.errors import InternalError
from kvservice.kernels.base import PartAttention
from kvservice.kernels.cpu import StepRecall, StepSequence, StepSharing
from kvservice.kernels.fixed_order import FixedOrderAttention
from kvservice.kernels.flash import FlashAttention, attend
from kvservice.kv.arena import Arena
from kvservice.kv.ledger import Owner
from kvservice.kv.partial import AttnPartial, merge_partials
from kvservice.recall.choosing import Query
from kvservice.recall.distant import StagingRing
from kvservice.recall.memory import SequenceMemory
from kvservice.recall.reach import Reach
from kvservice.types import BLOCK_TOKENS, GROUP_TOKENS, SINK_TOKENS

_Part = tuple[Tensor, Tensor, Tensor | None]
"""Keys, values, mask."""


class RecallTimer(Protocol):
    """Told when layers recall."""

    def begins(self, layer: int) -> None:
        """A layer is about to recall."""

    def ends(self, layer: int) -> None:
        """It has."""


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """One sequence's share of a step.

    Attributes:
        memory: its KV; room for the new tokens has been made.
        rows: its rows among the step's tokens.
        reach: what its queries attend to.
        first: position of the first new token.
        anchors: of a sequence that shares distant keys.
    """

    memory: SequenceMemory
    rows: slice
    reach: Reach
    first: int
    anchors: Anchors | None = None

    @property
    def num_queries(self) -> int:
        """New tokens of the step."""
        return int(self.rows.stop - self.rows.start)

    @property
    def is_prepared(self) -> bool:
        """Whether the next tokens are still these, and the room for them is still there."""
        state = self.memory.state
        return state.num_computed == self.first and state.has_room(self.num_queries)

    @property
    def selects(self) -> bool:
        """Whether its queries recall distant tokens."""
        return self.reach is Reach.SELECT and self.memory.state.num_distant > 0

    @property
    def whole_bytes(self) -> int:
        """Host bytes that a step attends to when its queries see all distant tokens, wherever they are read."""
        return 0 if self.reach is Reach.SELECT else self.memory.distant.num_bytes

    @property
    def crosses_slide(self) -> bool:
        """Whether its queries would see different windows if they came one by one."""
        state = self.memory.state
        return self.memory.recipe.window_start(state.num_computed + self.num_queries - 1) > state.window_start

    @property
    def recalls_by_keys(self) -> bool:
        """Whether it selects by low-bit keys, as kernels can."""
        return self.memory.key_index is not None

    def lands(self, *, deterministic: bool) -> bool:
        """Whether a method has a say in its attention, so that kernels do no more than write its tokens.

        Deterministic attention mustn't depend on which tokens come together in a step, and so not on whether a method
        must see one of them.
        """
        held, looking = self.memory.held, self.memory.looking
        if held is not None:
            return deterministic or held.needs_weights
        return looking is not None and looking.answers(self.first, self.num_queries)

    @property
    def has_distant(self) -> bool:
        """Whether there is anything distant to any of its queries."""
        return self.memory.state.num_distant > 0 or self.crosses_slide


class _Rows(NamedTuple):
    """Some of a sequence's queries.

    Attributes:
        first: number of the first of them.
        num_queries: how many they are.
        q: `[kv, num_queries * group, d]`.
        far_q: what they score distant tokens by, as `q`.
        proximal: their attention over what is near.
    """

    first: int
    num_queries: int
    q: Tensor
    far_q: Tensor
    proximal: AttnPartial


def prepare(memory: SequenceMemory, first_row: int, num_tokens: int, reach: Reach) -> SequenceRows:
    """Makes room for a sequence's next `num_tokens` tokens and plans their attention.

    Raises:
        InternalError: the parts would be no partition, or a SELECT step would cross a slide of the window.
    """
    state = memory.state
    if reach is Reach.SELECT and num_tokens > memory.recipe.tokens_until_slide(state.num_computed):
        raise InternalError(f"a step can't select for {num_tokens} tokens as if all saw one window")
    visible = state.num_computed + num_tokens
    sinks, distant = min(SINK_TOKENS, visible), memory.distant.num_groups * GROUP_TOKENS
    if sinks + distant != min(state.window_start, visible):
        # Sinks, what is in the tier, and the rest of the visible positions: those are the parts.
        raise InternalError(f"{sinks} sinks and {distant} distant tokens don't end where {state.window_start} begins")
    state.extend(num_tokens)
    if memory.held is not None:
        memory.held.begin(num_tokens)
    rows = SequenceRows(memory, slice(first_row, first_row + num_tokens), reach, state.num_computed)
    return rows if memory.shared is None else replace(rows, anchors=Anchors(memory, memory.shared))


class BatchAttention:
    """The attention of one step; the model calls it once a layer (`models.base.Attend`).

    Attributes:
        timer: to be told when layers recall, by runners that attend by themselves; None: nobody is.

    Args:
        turns: fp32 `[2, positions, d / 2]`, cosines and sines of the rotation, for those that move what they keep.
    """

    def __init__(
        self,
        arena: Arena,
        ring: StagingRing,
        sequences: list[SequenceRows],
        *,
        deterministic: bool = False,
        timer: RecallTimer | None = None,
        turns: Tensor | None = None,
    ) -> None:
        self.timer = timer
        self._turns = turns
        self._landing: dict[int, Tensor] = {}
        self._arena = arena
        self._scale = arena.layout.head_dim**-0.5
        self._ring = ring
        self._sequences = sequences
        self._deterministic = deterministic
        self._slots: dict[int, Tensor] = {}
        self._masks: dict[int, Tensor] = {}
        self._pairs_of_masks: dict[int, tuple[Tensor, Tensor]] = {}
        self._kernel: type[PartAttention] = FixedOrderAttention if deterministic else FlashAttention
        self._shared_heads: int | None = None

    @property
    def num_sequences(self) -> int:
        """Sequences of the step."""
        return len(self._sequences)

    # -- for runners that attend to the arena, and to groups in host memory, by themselves ----------------------------

    @property
    def cells(self) -> Tensor:
        """The arena, `[blocks, 16, d]`."""
        return self._arena.cells

    @property
    def selects_by_torch(self) -> bool:
        """Whether `add_recalled` has anything to add: sequences with distant tokens that `near` doesn't describe."""
        return any(self._is_far_by_torch(sequence) for sequence in self._sequences)

    def near(self, shared_heads: int | None = None) -> list[StepSequence]:
        """What each sequence attends to: all of it but for what `add_recalled` adds.

        Args:
            shared_heads: the model's query heads, for kernels that know keys shared between layers: then such sequences
                are described too, as far as they can be. None: `add_recalled` adds their distant tokens.
        """
        self._shared_heads = shared_heads
        return [self._described(sequence) for sequence in self._sequences]

    def close(self) -> None:
        """Gives back what `near` took for the step."""
        for blocks in self._landing.values():
            self._arena.free(Owner.WORKSPACE, blocks.view(-1))
        self._landing.clear()

    def _described(self, sequence: SequenceRows) -> StepSequence:
        if self._lands(sequence):
            return self._landed(sequence)
        state, is_shared = sequence.memory.state, self._is_shared_by_kernels(sequence)
        is_whole = sequence.anchors is None or is_shared
        recalls = sequence.selects and sequence.recalls_by_keys and is_whole
        recall = _recall_by_keys(sequence) if recalls else None
        return StepSequence(
            table=state.table,
            num_resident=state.num_resident,
            num_queries=sequence.num_queries,
            first_row=sequence.rows.start,
            window_start=state.window_start,
            groups=None if sequence.selects or not is_whole else sequence.memory.distant.addresses,
            recall=recall,
            sharing=self._sharing(sequence, recall) if is_shared else None,
        )

    def _landed(self, sequence: SequenceRows) -> StepSequence:
        """As if there were nothing but the step's own tokens: the rest is `add_recalled`'s, with what they wrote."""
        count, layout = sequence.num_queries, self._arena.layout
        shape = (2 * layout.num_kv_heads, -(-count // BLOCK_TOKENS))
        blocks = self._arena.allocate(Owner.WORKSPACE, shape[0] * shape[1]).view(shape)
        self._landing[sequence.rows.start] = blocks
        return StepSequence(
            table=landing_table(blocks, layout.num_layers),
            num_resident=0,
            num_queries=count,
            first_row=sequence.rows.start,
            window_start=SINK_TOKENS,
        )

    def _take_landed(self, sequence: SequenceRows, layer: int) -> None:
        """Puts the layer's keys and values where they belong."""
        layout, blocks = self._arena.layout, self._landing[sequence.rows.start]
        both = self._arena.read(blocks)[:, : sequence.num_queries]
        self._arena.slots[self._slots_of(sequence)[layer]] = both.view(2, layout.num_kv_heads, -1, layout.head_dim)

    def _sharing(self, sequence: SequenceRows, recall: StepRecall | None) -> StepSharing | None:
        assert sequence.anchors is not None
        assert self._shared_heads is not None
        return sequence.anchors.for_kernels(sequence.num_queries, self._shared_heads, recall)

    def _is_shared_by_kernels(self, sequence: SequenceRows) -> bool:
        """Whether kernels attend to keys that a sequence's layers share."""
        if self._shared_heads is None or sequence.anchors is None:
            return False
        # What a row skips is known only once what is near has been attended to.
        return sequence.anchors.cells.plan.skip_above is None and (sequence.recalls_by_keys or not sequence.selects)

    def add_recalled(self, layer: int, q: Tensor, out: Tensor, lse: Tensor, *, by_keys: bool = False) -> None:
        """Merges what sequences recall into their attention over what is near, and what they share with other layers.

        Args:
            layer: the layer.
            q: `[n, h, d]`, rotated.
            out: `[n, h, d]`, of `near`; changed in place.
            lse: fp32 `[n, h]`, likewise.
            by_keys: also those that recall by low-bit keys, for runners that leave `StepSequence.recall` alone.
        """
        num_kv = self._arena.layout.num_kv_heads
        for sequence in self._sequences:
            if not (self._is_far_by_torch(sequence) or (by_keys and sequence.selects)):
                continue
            rows = sequence.rows
            queries = _by_kv_head(q[rows], num_kv)
            if self._lands(sequence):
                self._take_landed(sequence, layer)
                merged = self._attend(sequence, layer, queries)
            elif sequence.anchors and (self._deterministic or sequence.crosses_slide):
                # What is near was attended to in another order than torch's, or isn't near to all queries.
                merged = self._attend(sequence, layer, queries)
            else:
                lses = _by_kv_head(lse[rows].unsqueeze(-1), num_kv)[..., 0]
                merged = self._with_distant(sequence, layer, queries, AttnPartial(_by_kv_head(out[rows], num_kv), lses))
            out[rows] = _by_query(merged, sequence.num_queries)

    def _lands(self, sequence: SequenceRows) -> bool:
        return sequence.lands(deterministic=self._deterministic)

    def _is_far_by_torch(self, sequence: SequenceRows) -> bool:
        """Whether kernels leave a sequence's distant tokens to torch; or, in a fixed order, all of them."""
        if self._lands(sequence):
            return True
        if sequence.anchors is not None and not self._is_shared_by_kernels(sequence):
            return self._deterministic or sequence.has_distant
        return sequence.selects and not sequence.recalls_by_keys

    # -- for those that don't ----------------------------------------------------------------------------------------

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes K and V of the step's tokens to the arena and attends.

        Args:
            layer: the layer.
            q: `[n, h, d]`, rotated; `n` tokens of all sequences of the step.
            k: `[n, kv, d]`, rotated.
            v: `[n, kv, d]`.

        Returns:
            `[n, h, d]`.
        """
        self.write(layer, k, v)
        out = torch.empty_like(q)
        num_kv = k.shape[1]
        if self.timer:
            self.timer.begins(layer)
        for sequence in self._sequences:
            rows = sequence.rows
            queries = _by_kv_head(q[rows], num_kv)
            out[rows] = _by_query(self._attend(sequence, layer, queries), sequence.num_queries)
        if self.timer:
            self.timer.ends(layer)
        return out

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Writes K and V of the step's tokens, `[n, kv, d]` each, to the arena."""
        for sequence in self._sequences:
            slots = self._slots_of(sequence)
            self._arena.slots[slots[layer, 0]] = k[sequence.rows].transpose(0, 1)
            self._arena.slots[slots[layer, 1]] = v[sequence.rows].transpose(0, 1)

    def _slots_of(self, sequence: SequenceRows) -> Tensor:
        """Where a sequence's new tokens go, the same in all layers but for the layer: `[layers, 2, kv, n]`."""
        first = sequence.rows.start
        if first not in self._slots:
            self._slots[first] = sequence.memory.state.slots(sequence.num_queries)
        return self._slots[first]

    def _mask(self, sequence: SequenceRows, group_size: int) -> Tensor | None:
        """What a sequence's queries may not see of its device part, the same in all layers; None for one query."""
        if sequence.num_queries == 1:
            return None
        first = sequence.rows.start
        if first not in self._masks:
            state, layout = sequence.memory.state, self._arena.layout
            self._masks[first] = _causal(
                state.num_resident, sequence.num_queries, group_size, layout.dtype, self._arena.device
            )
        return self._masks[first]

    def _split_masks(self, sequence: SequenceRows, group_size: int) -> tuple[Tensor, Tensor]:
        """See `visible_masks`; the same in all layers."""
        first = sequence.rows.start
        if first not in self._pairs_of_masks:
            state, recipe = sequence.memory.state, sequence.memory.recipe
            positions = range(state.num_computed, state.num_computed + sequence.num_queries)
            starts = [max(recipe.window_start(position), state.window_start) for position in positions]
            self._pairs_of_masks[first] = visible_masks(
                state.num_resident,
                torch.tensor(starts, device=self._arena.device),
                state.window_start,
                group_size,
                self._arena.layout.dtype,
            )
        return self._pairs_of_masks[first]

    def _attend(self, sequence: SequenceRows, layer: int, q: Tensor) -> Tensor:
        if self._lands(sequence):
            if sequence.memory.held is not None:
                return attend_held(sequence.memory.held, layer, q, self._turns, deterministic=self._deterministic)
            assert sequence.memory.looking is not None
            return attend_found(sequence.memory.looking, layer, q)
        group_size = q.shape[1] // sequence.num_queries
        splits = sequence.anchors is not None and sequence.has_distant and sequence.anchors.splits(layer)
        if splits and sequence.crosses_slide:
            mask: Tensor | None = self._split_masks(sequence, group_size)[0]
        else:
            mask = self._mask(sequence, group_size)
        near = self._device_parts(sequence, mask, layer)
        attention = self._kernel(q, self._scale)
        if sequence.selects or splits:
            for part in near:
                attention.add(*part)
            return self._with_distant(sequence, layer, q, attention.result())
        if sequence.anchors:
            sequence.anchors.queries(layer, q)
        attention.add(*near[0])
        for keys, values in self._streamed(sequence.memory, layer):
            attention.add(keys, values)
        for part in near[1:]:
            attention.add(*part)
        return attention.result().out

    def _device_parts(self, sequence: SequenceRows, mask: Tensor | None, layer: int) -> list[_Part]:
        """What is on the device: in one part, or, to be added in order of position, sinks and window apart."""
        state = sequence.memory.state
        keys, values = state.read(layer, state.num_resident + sequence.num_queries)
        if not self._deterministic:
            return [(keys, values, mask)]
        spans = (slice(SINK_TOKENS), slice(SINK_TOKENS, None))
        return [(keys[:, span], values[:, span], None if mask is None else mask[:, span]) for span in spans]

    def _streamed(self, memory: SequenceMemory, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        for keys, values in memory.distant.tiles(layer, self._ring):
            memory.counters.streamed_bytes += 2 * keys.numel() * keys.element_size()
            yield keys, values

    # -- distant tokens apart from what is near ----------------------------------------------------------------------

    def _with_distant(self, sequence: SequenceRows, layer: int, q: Tensor, proximal: AttnPartial) -> Tensor:
        """Attention over what is near and what is distant, `[kv, r, d]`."""
        anchors = sequence.anchors
        far_q = q if anchors is None else anchors.queries(layer, q)
        if not sequence.selects:
            assert anchors is not None
            return self._gated(anchors, layer, 0, proximal, lambda: self._all_distant(sequence, anchors, layer, far_q))
        count = sequence.num_queries
        if count == 1 or not self._deterministic:
            return self._recall(sequence, layer, _Rows(0, count, q, far_q, proximal))
        group = q.shape[1] // count
        outs = []
        for i in range(count):
            at = slice(i * group, (i + 1) * group)
            own = AttnPartial(proximal.out[:, at], proximal.lse[:, at])
            outs.append(self._recall(sequence, layer, _Rows(i, 1, q[:, at], far_q[:, at], own)))
        return torch.cat(outs, dim=1)

    @staticmethod
    def _gated(
        anchors: Anchors | None,
        layer: int,
        first: int,
        proximal: AttnPartial,
        look: Callable[[], AttnPartial],
    ) -> Tensor:
        """Merges what is near with what `look` finds in distant tokens; followers' rows may do without."""
        if anchors is None:
            return merge_partials([proximal, look()])
        skipped = anchors.skipped(layer, first, proximal)
        if skipped is not None and bool(skipped.all()):
            return proximal.out
        distant = look()
        anchors.note_distant(layer, first, distant)
        if skipped is not None:
            distant = AttnPartial(distant.out, distant.lse.masked_fill(skipped, -math.inf))
        return merge_partials([proximal, distant])

    def _all_distant(self, sequence: SequenceRows, anchors: Anchors, layer: int, q: Tensor) -> AttnPartial:
        """All that is distant to each query: in the tier, and what is still on the device."""
        attention = self._kernel(q, self._scale)
        for keys, values in self._streamed(sequence.memory, layer):
            attention.add(keys, values)
        if sequence.crosses_slide:
            mask = self._split_masks(sequence, q.shape[1] // sequence.num_queries)[1]
            span = slice(SINK_TOKENS, SINK_TOKENS + mask.shape[1])
            state = sequence.memory.state
            keys, values = state.read(layer, span.stop, anchors.cells.groups.key_layers[layer])
            attention.add(keys[:, span], values[:, span], mask)
        return attention.result()

    def _recall(self, sequence: SequenceRows, layer: int, rows: _Rows) -> Tensor:
        """Attention of queries that are chosen for together, `[kv, r, d]`."""
        memory, anchors = sequence.memory, sequence.anchors
        seed = memory.state.num_computed * self._arena.layout.num_layers + layer
        query = Query(layer, rows.q, rows.proximal.lse, rows.num_queries, self._scale, seed)
        chosen = memory.choose(query) if anchors is None else anchors.choose(rows.first, query)

        def look() -> AttnPartial:
            if rows.num_queries > 1:
                return self._from_staging(memory, layer, rows.far_q, chosen)
            attention = self._kernel(rows.far_q, self._scale)
            if sequence.num_queries == 1:
                attention.add(*self._from_slots(memory, anchors, layer, chosen[:, 0]))
            else:
                attention.add(*self._staged(memory, layer, chosen[:, 0]))
            return attention.result()

        return self._gated(anchors, layer, rows.first, rows.proximal, look)

    def _from_slots(
        self, memory: SequenceMemory, anchors: Anchors | None, layer: int, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A decode step: what the last step recalled is still in the slots, so only the difference moves."""
        slots = memory.slots()
        placed = slots.admit(layer, chosen)
        count = placed.heads.numel()
        has_keys = None if anchors is None else anchors.cells.owns[layer][placed.heads]
        with_keys = count if has_keys is None else int(has_keys.sum())
        if has_keys is not None and with_keys < count:
            self._fetch_values(
                memory, layer, *(part[~has_keys] for part in (placed.heads, placed.offsets, placed.slots))
            )
            placed = placed.of(has_keys)
        # A tile holds all slots of a layer, so what is missing always fits.
        staged = self._ring.next(with_keys)
        memory.distant.gather_flat(layer, placed.heads, placed.offsets, staged)
        slots.write(layer, placed.heads, placed.slots, staged)
        moved = (count + with_keys) * self._arena.layout.row_bytes // 2
        memory.counters.note(chosen.numel(), chosen.numel() - count, moved)
        memory.counters.follower_tally += (count - with_keys) * self._arena.layout.row_bytes // 2
        keys_at = placed.where if anchors is None else anchors.keys_at(layer, placed.where)
        return slots.read(layer, keys_at, placed.where)

    def _fetch_values(self, memory: SequenceMemory, layer: int, heads: Tensor, offsets: Tensor, slots: Tensor) -> None:
        staged = self._ring.next(-(-heads.numel() // 2)).view(-1, self._arena.layout.head_dim)[: heads.numel()]
        memory.distant.gather_values(layer, heads, offsets, staged)
        memory.slots().write_values(layer, heads, slots, staged)

    def _staged(self, memory: SequenceMemory, layer: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen tokens, `[kv, n]`, through the staging ring."""
        staged = self._ring.next(chosen.numel())
        memory.distant.gather(layer, chosen, staged)
        memory.counters.note(0, 0, staged.numel() * staged.element_size())
        pairs = staged.view(*chosen.shape, 2, -1)
        return pairs[:, :, 0], pairs[:, :, 1]

    def _from_staging(self, memory: SequenceMemory, layer: int, q: Tensor, chosen: Tensor) -> AttnPartial:
        """Queries of a question: each recalls its own tokens, a tile's worth of queries at a time."""
        num_kv, rows, dim = q.shape
        _, num_queries, budget = chosen.shape
        group = rows // num_queries
        at_once = max(1, self._ring.num_rows // (num_kv * budget))
        outs, lses = [], []
        for start in range(0, num_queries, at_once):
            some = chosen[:, start : start + at_once]
            count = some.shape[1]
            keys, values = self._staged(memory, layer, some.reshape(num_kv, -1))
            queries = q.view(num_kv, num_queries, group, dim)[:, start : start + count]
            part = attend(
                queries.reshape(num_kv * count, group, dim),
                keys.reshape(num_kv * count, budget, dim),
                values.reshape(num_kv * count, budget, dim),
                self._scale,
            )
            outs.append(part.out.reshape(num_kv, count * group, dim))
            lses.append(part.lse.reshape(num_kv, count * group))
        return AttnPartial(torch.cat(outs, 1), torch.cat(lses, 1))


def _recall_by_keys(sequence: SequenceRows) -> StepRecall:
    memory, index = sequence.memory, sequence.memory.key_index
    if index is None:
        raise InternalError(f"recipe {memory.recipe.name!r} keeps no low-bit keys to select by")
    slots = memory.slots() if sequence.num_queries == 1 else None
    return StepRecall(
        codes=index.codes_table,
        params=index.params_table,
        bits=index.bits,
        groups=memory.distant.addresses,
        budget=memory.recipe.recalled_tokens,
        slots=slots.table if slots else None,
        resident=slots.resident if slots else None,
        counters=memory.counters.tally,
    )


def _causal(resident: int, num_tokens: int, group_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Hides from each query the step's tokens behind it, `[num_tokens * group, resident + num_tokens]`."""
    hidden = torch.full((num_tokens, resident + num_tokens), -math.inf, dtype=dtype, device=device)
    return hidden.triu(resident + 1).repeat_interleave(group_size, 0)


def _by_kv_head(q: Tensor, num_kv: int) -> Tensor:
    """`[m, h, d]` to `[kv, m * group, d]`: row `i * group + j` is query i in head j of the group."""
    num_queries, num_heads, dim = q.shape
    return q.view(num_queries, num_kv, num_heads // num_kv, dim).permute(1, 0, 2, 3).reshape(num_kv, -1, dim)


def _by_query(out: Tensor, num_queries: int) -> Tensor:
    """The inverse of `_by_kv_head`."""
    num_kv, rows, dim = out.shape
    return out.view(num_kv, num_queries, rows // num_queries, dim).permute(1, 0, 2, 3).reshape(num_queries, -1, dim)
