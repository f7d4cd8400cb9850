"""From a sequence's index of distant keys to the tokens that its queries recall. Knows nothing of where they lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvservice.compression.protocols import CLUSTER_INDEXES, RECALL_INDEXES, Choice, ScanTally
from kvservice.kv.arena import Arena
from kvservice.recall.clusters import KeySource, SequenceClusters
from kvservice.recall.index import SequenceIndex
from kvservice.recall.planner import select
from kvservice.recall.sharing import SharedCells
from kvservice.types import RecipeSpec

DistantIndex = SequenceIndex | SequenceClusters


@dataclass(frozen=True, slots=True)
class Query:
    """Queries of one sequence in one layer. Where keys are shared, `kv` are the KV heads that store some there.

    Attributes:
        layer: the layer.
        q: `[kv, num_queries * group, d]`, rotated.
        proximal_lse: fp32 `[kv, num_queries * group]`, of what each attends to in sinks and window.
        num_queries: each recalls for itself.
        scale: factor of the attention scores.
        seed: of the queries' position and layer.
    """

    layer: int
    q: Tensor
    proximal_lse: Tensor
    num_queries: int
    scale: float
    seed: int


def new_index(recipe: RecipeSpec, arena: Arena, shared: SharedCells | None = None) -> DistantIndex | None:
    """An empty index of a recipe's kind; None if it has none.

    Args:
        recipe: the recipe.
        arena: where it is.
        shared: which (layer, KV head)s store keys; None: all.
    """
    if recipe.index is None:
        return None
    if recipe.tokens_per_cluster:
        return SequenceClusters(CLUSTER_INDEXES.get(recipe.index), recipe.tokens_per_cluster, arena)
    return SequenceIndex(RECALL_INDEXES.get(recipe.index), recipe.index_bits, arena, shared)


def choose_by_scores(index: SequenceIndex, recipe: RecipeSpec, query: Query, tally: ScanTally) -> Tensor:
    """The tokens that each query recalls, by the scores of an index of single tokens.

    Returns:
        int64 `[kv, num_queries, n]`, in no order.
    """
    choosers = query.q.shape[1] if recipe.per_query_head else query.num_queries
    choice = Choice(query.proximal_lse, choosers, recipe.recalled_tokens, tally)
    scores = index.scores(query.layer, query.q, query.scale, query.seed, choice)
    if not recipe.per_query_head:
        return select(scores, query.proximal_lse, query.num_queries, recipe.recalled_tokens)
    num_kv, _, total = scores.shape
    budget = min(recipe.recalled_tokens, total)
    orders = scores.topk(budget, dim=-1).indices
    return take_turns(orders.view(num_kv, query.num_queries, -1, budget), total, budget)


def choose_by_clusters(
    index: SequenceClusters, recipe: RecipeSpec, query: Query, first_groups: int, keys: KeySource
) -> Tensor:
    """As `choose_by_scores`, by clusters, which are formed first where there are none yet.

    Args:
        index: of the sequence.
        recipe: its recipe.
        query: the queries.
        first_groups: groups that had left the window when the sequence first selected.
        keys: where to read keys from.
    """
    index.form(first_groups, keys)
    total = index.num_tokens
    budget = min(recipe.recalled_tokens, total)
    if recipe.per_query_head:
        scores = index.cluster_scores(query.layer, query.q)
        num_kv, rows, count = scores.shape
        scores = scores.view(num_kv, query.num_queries, rows // query.num_queries, count)
        return take_turns(index.best_first(query.layer, scores, budget), total, budget)
    mass = index.cluster_mass(query.layer, query.q * query.scale, query.proximal_lse, query.num_queries)
    return index.best_first(query.layer, mass, budget).squeeze(2)


def take_turns(orders: Tensor, total: int, budget: int) -> Tensor:
    """The first tokens of several orders: the first of each, then the second of each, and so on, each token once.

    Args:
        orders: int64 `[kv, num_queries, group, n]`, tokens from 0 to `total - 1`, distinct in an order, at least
            `budget` in each.
        total: how many tokens there are.
        budget: how many to take.

    Returns:
        int64 `[kv, num_queries, budget]`, in no order.
    """
    group, count = orders.shape[2:]
    turns = torch.arange(count, device=orders.device) * group + torch.arange(group, device=orders.device).unsqueeze(1)
    first_turn = torch.full((*orders.shape[:2], total), group * count, device=orders.device)
    first_turn.scatter_reduce_(2, orders.flatten(2), turns.flatten().expand(*orders.shape[:2], -1), "amin")
    return first_turn.topk(budget, dim=-1, largest=False, sorted=False).indices
