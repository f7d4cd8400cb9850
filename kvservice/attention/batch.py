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
from kvservice.kernels.fixed_order import FixedOrderAttention
from kvservice.kernels.flash import FlashAttention, attend
from kvservice.kv.arena import Arena
from kvservice.kv.partial import AttnPartial, Span, check_partition, merge_partials
from kvservice.recall.distant import StagingRing
from kvservice.recall.memory import SequenceMemory
from kvservice.recall.planner import select
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
        slots: arena slots of the new tokens, `[layers, 2, kv, m]`.
        mask: of the device part, `[m * group, resident + m]`, or None for a single query.
    """

    memory: SequenceMemory
    rows: slice
    reach: Reach
    slots: Tensor
    mask: Tensor | None

    @property
    def num_queries(self) -> int:
        """New tokens of the step."""
        return len(range(self.rows.start, self.rows.stop))


def prepare(
    memory: SequenceMemory, first_row: int, num_tokens: int, reach: Reach, group_size: int, dtype: torch.dtype
) -> SequenceRows:
    """Makes room for a sequence's next `num_tokens` tokens and plans their attention.

    Raises:
        InternalError: the parts would be no partition, or a SELECT step would cross a slide of the window.
    """
    state = memory.state
    if reach is Reach.SELECT and num_tokens > memory.recipe.tokens_until_slide(state.num_computed):
        raise InternalError(f"a step can't select for {num_tokens} tokens as if all saw one window")
    resident = state.num_resident
    visible = state.num_computed + num_tokens
    sinks = min(SINK_TOKENS, visible)
    in_tier = Span(sinks, sinks + memory.distant.num_groups * GROUP_TOKENS)
    check_partition([Span(0, sinks), in_tier, Span(min(state.window_start, visible), visible)], visible)
    state.extend(num_tokens)
    slots = state.slots(num_tokens)
    mask = None
    if num_tokens > 1 and not state.is_ragged:
        mask = _causal(resident, num_tokens, group_size, dtype, slots.device)
    return SequenceRows(memory, slice(first_row, first_row + num_tokens), reach, slots, mask)


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
        self._kernel: type[PartAttention] = FixedOrderAttention if deterministic else FlashAttention

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
        out = torch.empty_like(q)
        num_kv = k.shape[1]
        for sequence in self._sequences:
            rows = sequence.rows
            self._arena.slots[sequence.slots[layer, 0]] = k[rows].transpose(0, 1)
            self._arena.slots[sequence.slots[layer, 1]] = v[rows].transpose(0, 1)
            queries = _by_kv_head(q[rows], num_kv)
            out[rows] = _by_query(self._attend(sequence, layer, queries), sequence.num_queries)
        return out

    def _attend(self, sequence: SequenceRows, layer: int, q: Tensor) -> Tensor:
        memory = sequence.memory
        if memory.state.is_ragged:
            return self._attend_ragged(sequence, layer, q)
        near = self._near(sequence, layer)
        if memory.state.num_distant == 0 or sequence.reach is Reach.FULL:
            return self._attend_all(sequence, layer, q, near)
        if not self._deterministic:
            return self._attend_selected(sequence, layer, q, near)
        group = q.shape[1] // sequence.num_queries
        each = [
            self._attend_selected(sequence, layer, q[:, rows], [(k, v, _rows_of(mask, rows)) for k, v, mask in near])
            for rows in (slice(i * group, (i + 1) * group) for i in range(sequence.num_queries))
        ]
        return torch.cat(each, dim=1)

    def _near(self, sequence: SequenceRows, layer: int) -> list[_Part]:
        """What is on the device: in one part, or, to be added in order of position, sinks and window apart."""
        state, mask = sequence.memory.state, sequence.mask
        keys, values = state.read(layer, state.num_resident + sequence.num_queries)
        if not self._deterministic:
            return [(keys, values, mask)]
        spans = (slice(SINK_TOKENS), slice(SINK_TOKENS, None))
        return [(keys[:, span], values[:, span], None if mask is None else mask[:, span]) for span in spans]

    def _attend_all(self, sequence: SequenceRows, layer: int, q: Tensor, near: list[_Part]) -> Tensor:
        attention = self._kernel(q, self._scale)
        attention.add(*near[0])
        for keys, values in self._streamed(sequence.memory, layer):
            attention.add(keys, values)
        for part in near[1:]:
            attention.add(*part)
        return attention.result().out

    def _streamed(self, memory: SequenceMemory, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        for keys, values in memory.distant.tiles(layer, self._ring):
            memory.counters.streamed_bytes += 2 * keys.numel() * keys.element_size()
            yield keys, values

    def _attend_selected(self, sequence: SequenceRows, layer: int, q: Tensor, near: list[_Part]) -> Tensor:
        memory = sequence.memory
        if memory.index is None:
            raise InternalError(f"recipe {memory.recipe.name!r} keeps no index to select by")
        attention = self._kernel(q, self._scale)
        for part in near:
            attention.add(*part)
        proximal = attention.result()
        num_queries = 1 if self._deterministic else sequence.num_queries
        seed = memory.state.num_computed * self._arena.layout.num_layers + layer
        scores = memory.index.scores(layer, q, self._scale, seed)
        # In order of position, so that neither slots nor the order of equal scores show in the sums.
        chosen = select(scores, proximal.lse, num_queries, memory.recipe.recalled_tokens).sort(-1).values.cpu()
        if num_queries > 1:
            return merge_partials([proximal, self._from_staging(memory, layer, q, chosen)])
        if sequence.num_queries == 1:
            attention.add(*self._from_slots(memory, layer, chosen[:, 0]))
        else:
            attention.add(*self._staged(memory, layer, chosen[:, 0]))
        return attention.result().out

    def _from_slots(self, memory: SequenceMemory, layer: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """A decode step: what the last step recalled is still in the slots, so only the difference moves."""
        slots = memory.slots()
        placed = slots.admit(layer, chosen)
        count = placed.heads.numel()
        # A tile holds all slots of a layer, so what is missing always fits.
        staged = self._ring.next(count)
        memory.distant.gather_flat(layer, placed.heads, placed.offsets, staged)
        slots.write(layer, placed, staged)
        memory.counters.lookups += chosen.numel()
        memory.counters.hits += chosen.numel() - count
        memory.counters.recalled_bytes += count * self._arena.layout.row_bytes
        return slots.read(layer, placed.where)

    def _staged(self, memory: SequenceMemory, layer: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen tokens, `[kv, n]`, through the staging ring."""
        staged = self._ring.next(chosen.numel())
        memory.distant.gather(layer, chosen, staged)
        memory.counters.recalled_bytes += staged.numel() * staged.element_size()
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


def _causal(resident: int, num_tokens: int, group_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Hides from each query the step's tokens behind it, `[num_tokens * group, resident + num_tokens]`."""
    hidden = torch.full((num_tokens, resident + num_tokens), -math.inf, dtype=dtype, device=device)
    return hidden.triu(resident + 1).repeat_interleave(group_size, 0)


def _rows_of(mask: Tensor | None, rows: slice) -> Tensor | None:
    return None if mask is None else mask[rows]


def _by_kv_head(q: Tensor, num_kv: int) -> Tensor:
    """`[m, h, d]` to `[kv, m * group, d]`: row `i * group + j` is query i in head j of the group."""
    num_queries, num_heads, dim = q.shape
    return q.view(num_queries, num_kv, num_heads // num_kv, dim).permute(1, 0, 2, 3).reshape(num_kv, -1, dim)


def _by_query(out: Tensor, num_queries: int) -> Tensor:
    """The inverse of `_by_kv_head`."""
    num_kv, rows, dim = out.shape
    return out.view(num_kv, num_queries, rows // num_queries, dim).permute(1, 0, 2, 3).reshape(num_queries, -1, dim)
