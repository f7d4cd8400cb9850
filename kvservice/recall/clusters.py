"""A sequence's clusters of distant keys, in arena blocks. Knows nothing of how keys are clustered or clusters scored.

Groups of 64 tokens are clustered in runs:

    0                       first_groups     +5      +5    num_groups
    ├─ all that the first ────┼─ 320 tokens ─┼─ 320 ─┼─ less ─┤
       selection could choose from

Which runs there are, and what is random in them, follows from `num_groups` and `first_groups` alone, and a run's
clusters from its keys. So they are the same however the tokens came: read in other chunks, computed again, forked from
another sequence, or left over when those behind them were given up. A run that isn't as it was is clustered again from
its keys, which are read back from the host: the last one each time that 64 tokens come, until it has 320.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kvservice.compression.protocols import ClusterIndex
from kvservice.kv.arena import Arena
from kvservice.kv.entries import PagedEntries
from kvservice.kv.ledger import Owner
from kvservice.types import CLUSTER_LABEL_BYTES, GROUP_TOKENS

RUN_GROUPS = 5
"""Groups that are clustered among themselves once the first are: 320 tokens."""

KeySource = Callable[[int, int, int], Tensor]
"""`keys(layer, start, stop)`: a copy of the keys of some distant tokens of a layer, `[kv, stop - start, d]`."""


class Run(NamedTuple):
    """Groups that are clustered among themselves."""

    start: int
    stop: int

    def num_clusters(self, tokens_per_cluster: int) -> int:
        """One for each so many tokens, at least one."""
        return max(1, (self.stop - self.start) * GROUP_TOKENS // tokens_per_cluster)


def runs(num_groups: int, first_groups: int) -> list[Run]:
    """The runs of `num_groups` groups, the first of them of at most `first_groups`."""
    first = min(num_groups, first_groups)
    starts = [0] * (first > 0) + list(range(first, num_groups, RUN_GROUPS))
    return [Run(start, stop) for start, stop in pairwise([*starts, num_groups])]


class SequenceClusters:
    """The clusters of every group that has left the window, for each (layer, KV head).

    Attributes:
        num_groups: groups there are; their clusters are formed when they are first asked for.
    """

    def __init__(self, method: ClusterIndex, tokens_per_cluster: int, arena: Arena) -> None:
        layout = arena.layout
        rows = layout.num_layers * layout.num_kv_heads
        self._method = method
        self._tokens_per_cluster = tokens_per_cluster
        self._arena = arena
        self._layout = layout
        self._labels = PagedEntries(arena, Owner.INDEX, rows, GROUP_TOKENS * CLUSTER_LABEL_BYTES)
        self._centroids = PagedEntries(arena, Owner.INDEX, rows, layout.head_dim * layout.dtype.itemsize)
        self._runs: list[Run] = []
        self.num_groups = 0

    # -- as any index ------------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Distant tokens."""
        return self.num_groups * GROUP_TOKENS

    @property
    def num_bytes(self) -> int:
        """Arena bytes held."""
        return self._labels.num_bytes + self._centroids.num_bytes

    def num_shared_from(self, num_groups: int) -> int:  # noqa: ARG002 -- part of the interface
        """How many of its blocks somebody else holds too: all of them may be formed anew, whatever is kept."""
        return self._labels.num_shared_from(0) + self._centroids.num_shared_from(0)

    def fork(self) -> SequenceClusters:
        """The same clusters once more, in shared blocks."""
        twin = SequenceClusters(self._method, self._tokens_per_cluster, self._arena)
        twin._labels, twin._centroids = self._labels.fork(), self._centroids.fork()
        twin._runs, twin.num_groups = list(self._runs), self.num_groups
        return twin

    def blocks(self) -> Tensor:
        """All blocks held, int32 `[n]`."""
        return torch.cat([self._labels.blocks(), self._centroids.blocks()])

    def move_to(self, blocks: Tensor) -> None:
        """From now on its clusters are in other blocks, given in the order of `blocks()`."""
        labels = self._labels.blocks().numel()
        self._labels.move_to(blocks[:labels])
        self._centroids.move_to(blocks[labels:])

    def forget(self) -> None:
        """There is nothing. The blocks are somebody else's business."""
        self._labels.forget()
        self._centroids.forget()
        self._runs, self.num_groups = [], 0

    def append(self, groups: Tensor) -> None:
        """Counts groups `[n, layers, kv, 64, 2, d]` in."""
        self.num_groups += groups.shape[0]

    def truncate(self, num_groups: int) -> None:
        """Forgets all groups from `num_groups` on, and the clusters of runs that they were in."""
        self.num_groups = num_groups
        self._keep([run for run in self._runs if run.stop <= num_groups])

    # -- clusters ----------------------------------------------------------------------------------------------------

    def form(self, first_groups: int, keys: KeySource) -> None:
        """Clusters what isn't clustered as it should be. For a long prompt that takes seconds.

        Args:
            first_groups: groups of the first run.
            keys: of the tier; read layer by layer.
        """
        wanted = runs(self.num_groups, first_groups)
        if wanted == self._runs:
            return
        kept = 0
        while kept < min(len(wanted), len(self._runs)) and wanted[kept] == self._runs[kept]:
            kept += 1
        self._keep(self._runs[:kept])
        for run in wanted[kept:]:
            self._form(run, keys)

    def _form(self, run: Run, keys: KeySource) -> None:
        layout, known = self._layout, self._num_clusters(self._runs)
        labels, centroids = [], []
        for layer in range(layout.num_layers):
            rows = keys(layer, run.start * GROUP_TOKENS, run.stop * GROUP_TOKENS)
            seed = (run.start * layout.num_layers + layer) << 16 | run.stop - run.start
            own, means = self._method.cluster(rows, run.num_clusters(self._tokens_per_cluster), seed)
            labels.append((own + known).to(torch.int16))
            centroids.append(means)
        num_rows = layout.num_layers * layout.num_kv_heads
        self._labels.append(torch.cat(labels).view(num_rows, run.stop - run.start, -1).view(torch.uint8))
        self._centroids.append(torch.cat(centroids).view(torch.uint8))
        self._runs.append(run)

    def _keep(self, kept: list[Run]) -> None:
        if len(kept) < len(self._runs):
            self._labels.truncate(kept[-1].stop if kept else 0)
            self._centroids.truncate(self._num_clusters(kept))
            self._runs = kept

    def _num_clusters(self, of_runs: list[Run]) -> int:
        return sum(run.num_clusters(self._tokens_per_cluster) for run in of_runs)

    # -- choosing ----------------------------------------------------------------------------------------------------

    def scores(self, layer: int, q: Tensor, scale: float, seed: int) -> Tensor:  # noqa: ARG002 -- part of the interface
        """Each distant token's score, that of its cluster, fp32 `[kv, r, 64 * groups]`; q is `[kv, r, d]`."""
        labels = self._labels_of(layer).unsqueeze(1).expand(-1, q.shape[1], -1)
        return self.cluster_scores(layer, q).mul_(scale).gather(2, labels)

    def cluster_scores(self, layer: int, q: Tensor) -> Tensor:
        """How much each query likes each cluster, fp32 `[kv, r, c]`; q is `[kv, r, d]`."""
        centroids = self._centroids.read(self._rows(layer)).view(self._layout.dtype)
        return self._method.scores(q, centroids)

    def cluster_mass(self, layer: int, q: Tensor, proximal_lse: Tensor, num_queries: int) -> Tensor:
        """The attention mass of one token of each cluster, summed over the query heads of a KV head.

        As `planner.select` weighs tokens, with each token at its cluster's centroid.

        Args:
            layer: the layer.
            q: `[kv, num_queries * group, d]`, scaled.
            proximal_lse: `[kv, num_queries * group]`.
            num_queries: queries.

        Returns:
            fp32 `[kv, num_queries, 1, c]`.
        """
        scores = self.cluster_scores(layer, q)
        num_kv, rows, count = scores.shape
        sizes = self._sizes(self._labels_of(layer), count)
        norm = torch.logaddexp((scores + sizes.log().unsqueeze(1)).logsumexp(-1), proximal_lse)
        mass = (scores - norm.unsqueeze(-1)).exp_()
        return mass.view(num_kv, num_queries, rows // num_queries, count).sum(2, keepdim=True)

    def best_first(self, layer: int, liking: Tensor, budget: int) -> Tensor:
        """The tokens of the clusters that are liked best, whole, the last one trimmed.

        Args:
            layer: the layer.
            liking: `[kv, n, m, c]`.
            budget: how many tokens, at most as many as there are.

        Returns:
            int64 `[kv, n, m, budget]`: clusters in falling order of liking, in each its tokens in order of position.
        """
        labels = self._labels_of(layer)
        ranks = liking.argsort(stable=True, dim=-1, descending=True).argsort(-1)
        order = ranks.gather(3, labels[:, None, None].expand(-1, *liking.shape[1:3], -1)) * labels.shape[1]
        order += torch.arange(labels.shape[1], device=labels.device)
        best: Tensor = order.topk(budget, dim=-1, largest=False).indices
        return best

    def _rows(self, layer: int) -> slice:
        return slice(layer * self._layout.num_kv_heads, (layer + 1) * self._layout.num_kv_heads)

    def _labels_of(self, layer: int) -> Tensor:
        """The cluster of each distant token, int64 `[kv, t]`."""
        return self._labels.read(self._rows(layer)).flatten(1).view(torch.int16).long()

    @staticmethod
    def _sizes(labels: Tensor, num_clusters: int) -> Tensor:
        """Tokens of each cluster, fp32 `[kv, c]`."""
        sizes = torch.zeros(labels.shape[0], num_clusters, device=labels.device)
        return sizes.scatter_add_(1, labels, torch.ones_like(labels, dtype=torch.float32))
