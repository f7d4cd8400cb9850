"""The attention of one step over all its sequences. Knows nothing of scheduling, sampling or the model around it.

For each sequence and layer, the parts of the queries of a step:

    sinks + window + the step's own tokens      device, causal
    distant                                     FULL: every token, streamed tile by tile through the staging ring
                                                SELECT: the recalled ones, for each query and KV head

A step's queries all see the same window: the engine never lets a SELECT step cross a slide of the window, so a query's
parts don't depend on how its tokens were split into steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from kvservice.errors import InternalError
from kvservice.kernels.flash import attend
from kvservice.kv.arena import Arena
from kvservice.kv.partial import AttnPartial, Span, check_partition, merge_partials
from kvservice.recall.distant import StagingRing
from kvservice.recall.memory import SequenceMemory
from kvservice.recall.planner import select
from kvservice.types import GROUP_TOKENS, SINK_TOKENS


class Reach(Enum):
    """What of the distant tokens a query attends to."""

    FULL = "full"
    SELECT = "select"


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
    if num_tokens > 1:
        hidden = torch.full((num_tokens, resident + num_tokens), -math.inf, dtype=dtype, device=slots.device)
        mask = hidden.triu(resident + 1).repeat_interleave(group_size, 0)
    return SequenceRows(memory, slice(first_row, first_row + num_tokens), reach, slots, mask)


class BatchAttention:
    """The attention of one step; the model calls it once a layer (`models.base.Attend`)."""

    def __init__(self, arena: Arena, ring: StagingRing, sequences: list[SequenceRows]) -> None:
        self._arena = arena
        self._scale = arena.layout.head_dim**-0.5
        self._ring = ring
        self._sequences = sequences

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
            merged = merge_partials(self._parts(sequence, layer, queries))
            out[rows] = _by_query(merged, sequence.num_queries)
        return out

    def _parts(self, sequence: SequenceRows, layer: int, q: Tensor) -> list[AttnPartial]:
        memory = sequence.memory
        keys, values = memory.state.read(layer, memory.state.num_resident + sequence.num_queries)
        parts = [attend(q, keys, values, self._scale, sequence.mask)]
        if memory.state.num_distant == 0:
            return parts
        if sequence.reach is Reach.FULL:
            for keys, values in memory.distant.tiles(layer, self._ring):
                parts.append(attend(q, keys, values, self._scale))
                memory.counters.streamed_bytes += 2 * keys.numel() * keys.element_size()
            return parts
        return [*parts, self._recalled(sequence, layer, q, parts[0].lse)]

    def _recalled(self, sequence: SequenceRows, layer: int, q: Tensor, proximal_lse: Tensor) -> AttnPartial:
        memory = sequence.memory
        if memory.index is None:
            raise ValueError(f"recipe {memory.recipe.name!r} keeps no index to select by")
        seed = memory.state.num_computed * self._arena.layout.num_layers + layer
        scores = memory.index.scores(layer, q, self._scale, seed)
        chosen = select(scores, proximal_lse, sequence.num_queries, memory.recipe.recalled_tokens).cpu()
        if sequence.num_queries == 1:
            return self._from_slots(memory, layer, q, chosen[:, 0])
        return self._from_staging(memory, layer, q, chosen)

    def _from_slots(self, memory: SequenceMemory, layer: int, q: Tensor, chosen: Tensor) -> AttnPartial:
        """A decode step: what the last step recalled is still in the slots, so only the difference moves."""
        slots = memory.slots()
        misses = slots.admit(layer, chosen)
        count = misses.heads.numel()
        # A tile holds all slots of a layer, so the misses always fit.
        staged = self._ring.next(count)
        memory.distant.gather_flat(layer, misses.heads, misses.offsets, staged)
        slots.write(layer, misses, staged)
        memory.counters.lookups += chosen.numel()
        memory.counters.hits += chosen.numel() - count
        memory.counters.recalled_bytes += count * self._arena.layout.row_bytes
        keys, values = slots.read(layer, chosen.shape[1])
        return attend(q, keys, values, self._scale)

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
            staged = self._ring.next(num_kv * count * budget)
            memory.distant.gather(layer, some.reshape(num_kv, -1), staged)
            memory.counters.recalled_bytes += staged.numel() * staged.element_size()
            pairs = staged.view(num_kv * count, budget, 2, dim)
            queries = q.view(num_kv, num_queries, group, dim)[:, start : start + count]
            part = attend(queries.reshape(num_kv * count, group, dim), pairs[:, :, 0], pairs[:, :, 1], self._scale)
            outs.append(part.out.reshape(num_kv, count * group, dim))
            lses.append(part.lse.reshape(num_kv, count * group))
        return AttnPartial(torch.cat(outs, 1), torch.cat(lses, 1))


def _by_kv_head(q: Tensor, num_kv: int) -> Tensor:
    """`[m, h, d]` to `[kv, m * group, d]`: row `i * group + j` is query i in head j of the group."""
    num_queries, num_heads, dim = q.shape
    return q.view(num_queries, num_kv, num_heads // num_kv, dim).permute(1, 0, 2, 3).reshape(num_kv, -1, dim)


def _by_query(out: Tensor, num_queries: int) -> Tensor:
    """The inverse of `_by_kv_head`."""
    num_kv, rows, dim = out.shape
    return out.view(num_kv, num_queries, rows // num_queries, dim).permute(1, 0, 2, 3).reshape(num_queries, -1, dim)
