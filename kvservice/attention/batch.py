"""The attention of one step over all its sequences. Knows nothing of scheduling, sampling or the model around it.

For each sequence and layer, the parts of the queries of a step:

    sinks + window + the step's own tokens      device, causal
    distant                                     FULL: every token, streamed tile by tile through the staging ring
                                                SELECT: the recalled ones, for each query and KV head

A step's queries all see the same window: the engine never lets a SELECT step cross a slide of the window, so a query's
parts don't depend on how its tokens were split into steps.

Deterministic attention adds the parts in order of position, cut where the window's slides cut them, and selects for one
query at a time: then no bit of a query's result depends on the tokens that are computed with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvservice.errors import InternalError
from kvservice.kernels.base import PartAttention
from kvservice.kernels.cpu import StepRecall, StepSequence
from kvservice.kernels.fixed_order import FixedOrderAttention
from kvservice.kernels.flash import FlashAttention, attend
from kvservice.kv.arena import Arena
from kvservice.kv.partial import AttnPartial, merge_partials
from kvservice.recall.choosing import Query
from kvservice.recall.distant import StagingRing
from kvservice.recall.memory import SequenceMemory
from kvservice.recall.reach import Reach
from kvservice.types import GROUP_TOKENS, SINK_TOKENS

_Part = tuple[Tensor, Tensor, Tensor | None]
"""Keys, values, mask."""


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """One sequence's share of a step.

    Attributes:
        memory: its KV; room for the new tokens has been made.
        rows: its rows among the step's tokens.
        reach: what its queries attend to.
        first: position of the first new token.
    """

    memory: SequenceMemory
    rows: slice
    reach: Reach
    first: int

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
    def recalls_by_keys(self) -> bool:
        """Whether it selects by low-bit keys, as kernels can."""
        return self.memory.key_index is not None


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
    return SequenceRows(memory, slice(first_row, first_row + num_tokens), reach, state.num_computed)


class BatchAttention:
    """The attention of one step; the model calls it once a layer (`models.base.Attend`)."""

    def __init__(
        self, arena: Arena, ring: StagingRing, sequences: list[SequenceRows], *, deterministic: bool = False
    ) -> None:
        self._arena = arena
        self._scale = arena.layout.head_dim**-0.5
        self._ring = ring
        self._sequences = sequences
        self._deterministic = deterministic
        self._slots: list[Tensor] = []
        self._masks: dict[int, Tensor] = {}
        self._kernel: type[PartAttention] = FixedOrderAttention if deterministic else FlashAttention

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
        """Whether `add_recalled` has anything to add: sequences that recall by what `near` doesn't describe."""
        return any(sequence.selects and not sequence.recalls_by_keys for sequence in self._sequences)

    def near(self) -> list[StepSequence]:
        """What each sequence attends to: all of it but for what `add_recalled` adds."""
        return [
            StepSequence(
                table=sequence.memory.state.table,
                num_resident=sequence.memory.state.num_resident,
                num_queries=sequence.num_queries,
                first_row=sequence.rows.start,
                window_start=sequence.memory.state.window_start,
                groups=None if sequence.selects else sequence.memory.distant.addresses,
                recall=_recall_by_keys(sequence) if sequence.selects and sequence.recalls_by_keys else None,
            )
            for sequence in self._sequences
        ]

    def add_recalled(self, layer: int, q: Tensor, out: Tensor, lse: Tensor, *, by_keys: bool = False) -> None:
        """Merges what sequences recall into their attention over what is near.

        Args:
            layer: the layer.
            q: `[n, h, d]`, rotated.
            out: `[n, h, d]`, of `near`; changed in place.
            lse: fp32 `[n, h]`, likewise.
            by_keys: also those that recall by low-bit keys, for runners that leave `StepSequence.recall` alone.
        """
        num_kv = self._arena.layout.num_kv_heads
        for sequence in self._sequences:
            if not sequence.selects or (sequence.recalls_by_keys and not by_keys):
                continue
            rows = sequence.rows
            proximal = AttnPartial(_by_kv_head(out[rows], num_kv), _by_kv_head(lse[rows].unsqueeze(-1), num_kv)[..., 0])
            merged = self._with_recalled(sequence, layer, _by_kv_head(q[rows], num_kv), proximal)
            out[rows] = _by_query(merged, sequence.num_queries)

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
        for sequence in self._sequences:
            rows = sequence.rows
            queries = _by_kv_head(q[rows], num_kv)
            out[rows] = _by_query(self._attend(sequence, layer, queries), sequence.num_queries)
        return out

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Writes K and V of the step's tokens, `[n, kv, d]` each, to the arena."""
        if not self._slots:
            self._slots = [sequence.memory.state.slots(sequence.num_queries) for sequence in self._sequences]
        for sequence, slots in zip(self._sequences, self._slots, strict=True):
            self._arena.slots[slots[layer, 0]] = k[sequence.rows].transpose(0, 1)
            self._arena.slots[slots[layer, 1]] = v[sequence.rows].transpose(0, 1)

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

    def _attend(self, sequence: SequenceRows, layer: int, q: Tensor) -> Tensor:
        if sequence.memory.state.is_ragged:
            return self._attend_ragged(sequence, layer, q)
        near = self._device_parts(sequence, self._mask(sequence, q.shape[1] // sequence.num_queries), layer)
        attention = self._kernel(q, self._scale)
        if sequence.selects:
            for part in near:
                attention.add(*part)
            return self._with_recalled(sequence, layer, q, attention.result())
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

    # -- recall ------------------------------------------------------------------------------------------------------

    def _with_recalled(self, sequence: SequenceRows, layer: int, q: Tensor, proximal: AttnPartial) -> Tensor:
        """Attention over what is near and what is recalled, `[kv, r, d]`."""
        count = sequence.num_queries
        if count == 1 or not self._deterministic:
            return self._recall(sequence, layer, q, proximal, count)
        group = q.shape[1] // count
        each = [slice(i * group, (i + 1) * group) for i in range(count)]
        outs = [
            self._recall(sequence, layer, q[:, rows], AttnPartial(proximal.out[:, rows], proximal.lse[:, rows]), 1)
            for rows in each
        ]
        return torch.cat(outs, dim=1)

    def _recall(self, sequence: SequenceRows, layer: int, q: Tensor, proximal: AttnPartial, num_queries: int) -> Tensor:
        memory = sequence.memory
        seed = memory.state.num_computed * self._arena.layout.num_layers + layer
        chosen = memory.choose(Query(layer, q, proximal.lse, num_queries, self._scale, seed))
        if num_queries > 1:
            return merge_partials([proximal, self._from_staging(memory, layer, q, chosen)])
        attention = self._kernel(q, self._scale)
        if sequence.num_queries == 1:
            attention.add(*self._from_slots(memory, layer, chosen[:, 0]))
        else:
            attention.add(*self._staged(memory, layer, chosen[:, 0]))
        return merge_partials([proximal, attention.result()])

    def _from_slots(self, memory: SequenceMemory, layer: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """A decode step: what the last step recalled is still in the slots, so only the difference moves."""
        slots = memory.slots()
        placed = slots.admit(layer, chosen)
        count = placed.heads.numel()
        # A tile holds all slots of a layer, so what is missing always fits.
        staged = self._ring.next(count)
        memory.distant.gather_flat(layer, placed.heads, placed.offsets, staged)
        slots.write(layer, placed, staged)
        memory.counters.note(chosen.numel(), chosen.numel() - count, count * self._arena.layout.row_bytes)
        return slots.read(layer, placed.where)

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

    def _attend_ragged(self, sequence: SequenceRows, layer: int, q: Tensor) -> Tensor:
        """KV heads that hold different tokens, one by one. Their new tokens lie behind those that each holds."""
        state, count = sequence.memory.state, sequence.num_queries
        num_kv, rows, _ = q.shape
        held = state.counts[layer * num_kv : (layer + 1) * num_kv].tolist()
        keys, values = state.read(layer, max(held) + count)
        outs = []
        for head, resident in enumerate(held):
            mask = None
            if count > 1:
                mask = _causal(resident, count, rows // count, self._arena.layout.dtype, q.device)
            attention = self._kernel(q[head : head + 1], self._scale)
            visible = slice(resident + count)
            attention.add(keys[head : head + 1, visible], values[head : head + 1, visible], mask)
            outs.append(attention.result().out)
        return torch.cat(outs)


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
