"""Which tokens a decoding query looks at, of a sequence that holds all of them. Knows no products of attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvservice.compression.methods import ReusePlan
from kvservice.kv.sequence import SequenceState


@dataclass(frozen=True, slots=True)
class Found:
    """What a layer found when it looked at all tokens.

    Attributes:
        position: of the query.
        query: `[kv, g, d]`.
        ranked: positions, those that matter most first, int64 `[kv, s, n]`: a choice for each of `s` sets of heads.
    """

    position: int
    query: Tensor
    ranked: Tensor


class Looking:
    """What one sequence's layers found.

    Args:
        plan: when they look.
        state: the sequence's KV.

    Attributes:
        read_until: tokens behind this position are those of an answer.
        num_looked: queries of a layer that looked at all tokens.
        num_reused: queries of a layer that didn't.
    """

    def __init__(self, plan: ReusePlan, state: SequenceState) -> None:
        self.plan = plan
        self.state = state
        self.read_until = 0
        self.num_looked = 0
        self.num_reused = 0
        self._found: dict[int, Found] = {}

    def answers(self, position: int, num_queries: int) -> bool:
        """Whether a token at `position` is one of an answer, and comes alone: what is read sees everything."""
        return num_queries == 1 and position >= self.read_until

    def usable(self, layer: int, q: Tensor) -> Tensor | None:
        """The positions that the next query of a layer looks at, int64 `[kv, s, n]`; None: at all of them.

        Args:
            layer: the layer.
            q: `[kv, g, d]`.
        """
        found, position = self._source(layer), self.state.num_computed
        since = None if found is None else position - found.position
        if found is None or since is None or self.plan.looks(layer, since, lambda: _alike(q, found.query)):
            self.num_looked += 1
            return None
        self.num_reused += 1
        # What came since takes the places of what mattered least.
        ranked = found.ranked[..., : max(0, self.plan.tokens - since)]
        new = torch.arange(found.position + 1, position + 1, device=ranked.device)
        return torch.cat([ranked, new.expand(*ranked.shape[:2], -1)], -1)

    def learn(self, layer: int, q: Tensor, probs: Tensor) -> None:
        """A layer has looked at all tokens.

        Args:
            layer: the layer.
            q: `[kv, g, d]`.
            probs: `[kv, g, t]`, by position.
        """
        choosing = probs if self.plan.per_query_head else probs.sum(1, keepdim=True)
        ranked = choosing.topk(min(self.plan.tokens, probs.shape[-1])).indices
        self._found[layer] = Found(self.state.num_computed, q.clone(), ranked)

    def fork(self, state: SequenceState) -> Looking:
        """The same of another sequence, which holds the same tokens."""
        twin = Looking(self.plan, state)
        twin.read_until, twin._found = self.read_until, dict(self._found)
        return twin

    def forget(self) -> None:
        """Nothing was found."""
        self._found.clear()

    def _source(self, layer: int) -> Found | None:
        """What the next query of a layer may go by: found in this answer, by itself or by a layer just before."""
        number = self.plan.source(layer)
        found = None if number is None else self._found.get(number)
        return found if found is not None and found.position >= self.read_until else None


def _alike(q: Tensor, before: Tensor) -> float:
    """The cosine of two queries, averaged over heads."""
    return float(cosine_similarity(q.float(), before.float(), dim=-1).mean())
