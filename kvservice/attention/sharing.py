"""What followers take from their anchors, for the new tokens of a sequence. Knows nothing of where keys lie.

It lives as long as those tokens are on their way through the layers, in one step or several. Layers come in order, so
an anchor has always been there before its followers. What it leaves, KV head by KV head: its queries, the tokens it
recalled and the slots of their keys, and how much its rows attended to distant tokens. Rows that are attended apart,
one query after the other, leave theirs under the number of the first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvservice.kernels.cpu import StepRecall, StepSharing
from kvservice.kv.partial import AttnPartial
from kvservice.recall.choosing import Query
from kvservice.recall.memory import SequenceMemory
from kvservice.recall.sharing import SharedCells
from kvservice.types import GROUP_TOKENS, SINK_TOKENS


class Anchors:
    """The anchors of one sequence.

    Args:
        memory: the sequence's.
        cells: how it shares keys.
    """

    def __init__(self, memory: SequenceMemory, cells: SharedCells) -> None:
        self.cells = cells
        self._memory = memory
        self._queries: Tensor | None = None
        self._step: StepSharing | None = None
        self._chosen: dict[int, Tensor] = {}
        self._keys_at: Tensor | None = None
        self._lse: dict[int, Tensor] = {}

    def for_kernels(self, num_queries: int, num_heads: int, recall: StepRecall | None) -> StepSharing:
        """The same for kernels, which keep there what they take from anchors.

        Args:
            num_queries: new tokens of the step.
            num_heads: query heads.
            recall: from what they recall, if they do; the same in every layer.
        """
        if self._step is None:
            state, recipe, layout = self._memory.state, self._memory.recipe, self._memory.layout
            kept = (num_queries, layout.num_kv_heads, recall.budget) if recall else None
            slots = kept[1:] if kept and recall and recall.slots is not None else None
            queries = (num_queries, num_heads, layout.head_dim)
            self._step = StepSharing(
                cells=self.cells.table,
                until_slide=state.window_start + GROUP_TOKENS + recipe.window_tokens - state.num_computed,
                # As large as the tokens' residual stream.
                far_queries=torch.empty(queries, dtype=layout.dtype) if self.cells.shares_scores else None,
                chosen=torch.empty(kept, dtype=torch.int32) if kept else None,
                key_slots=torch.empty(slots, dtype=torch.int32) if slots else None,
                fetched=self._memory.counters.follower_tally,
            )
        return self._step

    def splits(self, layer: int) -> bool:
        """Whether distant tokens must be attended to apart from the others."""
        return self.cells.has_followers[layer] or self.cells.plan.skip_above is not None

    def queries(self, layer: int, q: Tensor) -> Tensor:
        """What rows `q`, `[kv, r, d]`, score distant tokens by; of anchors that is noted."""
        if not self.cells.shares_scores:
            return q
        if self._queries is None:
            # As large as the tokens' residual stream. Layer 0 has no followers.
            self._queries = torch.empty_like(q)
        if not self.cells.has_followers[layer]:
            self._queries.copy_(q)
            return q
        own = self.cells.own_heads[layer].to(q.device)
        self._queries[own] = q[own]
        return self._queries

    def choose(self, first: int, query: Query) -> Tensor:
        """As `SequenceMemory.choose`, of all KV heads: anchors choose, followers take that."""
        layer = query.layer
        if not self.cells.has_followers[layer]:
            self._chosen[first] = self._memory.choose(query)
            return self._chosen[first]
        own = self.cells.own_heads[layer]
        if own.numel():
            at = own.to(query.q.device)
            lse = query.proximal_lse[at]
            some = Query(layer, query.q[at], lse, query.num_queries, query.scale, query.seed)
            self._chosen[first] = self._chosen[first].index_copy(0, own, self._memory.choose(some))
        return self._chosen[first]

    def keys_at(self, layer: int, where: Tensor) -> Tensor:
        """The slots of the recalled tokens' keys, int64 `[kv, n]`, given those that the layer put the tokens in."""
        if self._keys_at is None:
            self._keys_at = where
        else:
            self._keys_at = torch.where(self.cells.owns[layer].unsqueeze(1), where, self._keys_at)
        return self._keys_at

    def skipped(self, layer: int, first: int, proximal: AttnPartial) -> Tensor | None:
        """The rows that needn't look at distant tokens, bool `[kv, r]`; None: all must."""
        least = self.cells.plan.skip_above
        if least is None or not self.cells.has_followers[layer]:
            return None
        follows = ~self.cells.owns[layer].to(proximal.lse.device).unsqueeze(1)
        share = (proximal.lse - self._lse[first]).sigmoid()
        skipped = (share >= least) & follows
        counters = self._memory.counters
        counters.gated += int(follows.sum()) * share.shape[1]
        counters.skipped += int(skipped.sum())
        return skipped

    def note_distant(self, layer: int, first: int, distant: AttnPartial) -> None:
        """What rows found in distant tokens. Followers find as much as their anchors did."""
        if self.cells.plan.skip_above is None:
            return
        owns = self.cells.owns[layer].to(distant.lse.device).unsqueeze(1)
        before = self._lse.get(first)
        self._lse[first] = distant.lse if before is None else torch.where(owns, distant.lse, before)


def visible_masks(
    num_resident: int, starts: Tensor, window_start: int, group_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Masks of a step whose queries see different windows.

    Args:
        num_resident: positions on the device before the step: 16 sinks, then those from `window_start` on.
        starts: int64 `[n]`, where each query's own window starts, `window_start` or later.
        window_start: of the sequence.
        group_size: query heads of a KV head.
        dtype: of the masks.

    Returns:
        What queries may not see of all that is on the device, `[n * group, num_resident + n]`; and what they may not
        see as distant of the window, `[n * group, tokens of it that are distant to any]`.
    """
    count = starts.numel()
    place = torch.arange(num_resident + count, device=starts.device)
    behind = place > num_resident + torch.arange(count, device=starts.device).unsqueeze(1)
    distant = (place >= SINK_TOKENS) & (place - SINK_TOKENS + window_start < starts.unsqueeze(1))
    far = ~distant[:, SINK_TOKENS : SINK_TOKENS + int(starts.max()) - window_start]
    masks = (
        torch.zeros(hidden.shape, dtype=dtype, device=starts.device).masked_fill_(hidden, -math.inf)
        for hidden in (behind | distant, far)
    )
    near_mask, far_mask = (mask.repeat_interleave(group_size, 0) for mask in masks)
    return near_mask, far_mask
