"""Pages of distant keys, scored by a bound. A baseline, for evaluation only."""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.compression.protocols import RECALL_INDEXES, Selection
from kvservice.types import GROUP_TOKENS

PAGE_TOKENS = 16
PAGES_PER_GROUP = GROUP_TOKENS // PAGE_TOKENS


class QuestIndex:
    """Each channel's least and greatest number in a page of 16 keys; a page's score is the most that any key could get.

    Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv:2406.10774, §3.3: for
    each channel the larger of `q * min` and `q * max`, summed. Deviates from the paper: the query heads of a KV head
    choose together, by attention mass, as with every other index here (the paper's models have a KV head for each query
    head); layers 0 and 1 choose too; and the last page is trimmed, so that the budget is met exactly.
    """

    paper = "Tang et al., Quest, arXiv:2406.10774"
    summary = "pages of 16 tokens, by the bound of their keys (evaluation only)"
    is_key_index = False

    def encode(self, keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002 -- part of the protocol
        """No codes; params `[n, 8, d]`: of each of four pages the least numbers, then the greatest."""
        num_groups, _, dim = keys.shape
        pages = keys.view(num_groups, PAGES_PER_GROUP, PAGE_TOKENS, dim)
        params = torch.stack([pages.amin(2), pages.amax(2)], dim=2)
        return keys.new_empty(num_groups, 0, dtype=torch.uint8), params.view(num_groups, 2 * PAGES_PER_GROUP, dim)

    def scores(self, ask: Selection) -> Tensor:
        """Every token of a page has the page's bound."""
        num_kv, num_groups, _, dim = ask.params.shape
        pages = ask.params.float().view(num_kv, num_groups * PAGES_PER_GROUP, 2, dim)
        low, high = pages.unbind(2)
        q = ask.q.float()
        # max(q * low, q * high) takes the high end where q is positive and the low end where it isn't.
        bound = q.clamp(min=0) @ high.transpose(1, 2) + q.clamp(max=0) @ low.transpose(1, 2)
        return bound.mul_(ask.scale).repeat_interleave(PAGE_TOKENS, dim=-1)


RECALL_INDEXES.register("quest")(QuestIndex())
