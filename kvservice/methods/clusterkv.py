"""Clusters of distant keys, recalled whole."""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.compression.protocols import CLUSTER_INDEXES

ITERATIONS = 20


class ClusterKV:
    """Cosine k-means of the keys of a KV head; the clusters whose centroids a query likes best are recalled whole.

    Liu et al., "ClusterKV: Manipulating LLM KV Cache in Semantic Space for Recallable Compression", arXiv:2412.03213,
    §3; 80 tokens a cluster, 16 sinks never clustered, tokens decoded since clustered among themselves by 320. Keys are
    taken after rotation; the first centroids are random keys, which may repeat; a key belongs to the centroid of the
    greatest cosine; a centroid is the arithmetic mean of its keys as they are, and stays where it is when it has none;
    20 iterations; clusters are ranked by the inner product of query and centroid, and the last one that is recalled is
    trimmed in the order in which its tokens are stored, which is that of their positions.

    Deviates from the paper:
    * the last 256 to 319 tokens are attended to and not clustered, in a prompt too, as with every other index here; so
      a prompt of L tokens makes (L - 16 - window) / 80 clusters;
    * tokens that have left the window and aren't 320 yet are clustered provisionally, and again when the next 64 come:
      in the paper they are all attended to;
    * the budget is the KV head's. Its query heads choose in turn, each the best of its own order that isn't chosen yet,
      until it is spent, and all attend to all of it; in the paper each has a budget, and a device cache, of its own;
    * layers 0 and 1 choose as all others do; in the paper they attend to everything;
    * centroids are kept in the dtype of the keys;
    * keys of a prompt are clustered when it is first asked about, read back from the host; in the paper while the next
      layers are prefilled.
    """

    paper = "Liu et al., ClusterKV, arXiv:2412.03213"
    summary = "clusters of keys, recalled whole"

    def cluster(self, keys: Tensor, num_clusters: int, seed: int) -> tuple[Tensor, Tensor]:
        """See `ClusterIndex`."""
        rows, count, dim = keys.shape
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(count, (rows, num_clusters), generator=generator).to(keys.device)
        exact = keys.float()
        centroids = exact.gather(1, first.unsqueeze(2).expand(-1, -1, dim))
        labels = _nearest(exact, centroids)
        for _ in range(ITERATIONS):
            centroids = _means(exact, labels, centroids)
            labels = _nearest(exact, centroids)
        return labels, centroids.to(keys.dtype)

    def scores(self, q: Tensor, centroids: Tensor) -> Tensor:
        """See `ClusterIndex`: inner products."""
        return q.float() @ centroids.float().transpose(1, 2)


def _nearest(keys: Tensor, centroids: Tensor) -> Tensor:
    """For each key the centroid of the greatest cosine, which the key's own length doesn't change."""
    return (keys @ torch.nn.functional.normalize(centroids, dim=-1).transpose(1, 2)).argmax(-1)


def _means(keys: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """The mean of each cluster's keys; the centroid as it is where there are none."""
    rows, count, dim = keys.shape
    num_clusters = centroids.shape[1]
    if keys.device.type == "cpu":
        flat = labels + num_clusters * torch.arange(rows).unsqueeze(1)
        sums = torch.zeros(rows * num_clusters, dim).index_add_(0, flat.view(-1), keys.reshape(-1, dim))
        sums = sums.view(rows, num_clusters, dim)
    else:
        # Elsewhere additions to one place come in any order, and the sum's bits would too.
        members = torch.nn.functional.one_hot(labels, num_clusters).to(keys.dtype)
        sums = members.transpose(1, 2) @ keys
    sizes = torch.zeros(rows, num_clusters, device=keys.device).scatter_add_(
        1, labels, torch.ones(1, device=keys.device).expand(rows, count)
    )
    return torch.where(sizes.unsqueeze(2) > 0, sums / sizes.clamp(min=1).unsqueeze(2), centroids)


CLUSTER_INDEXES.register("clusterkv")(ClusterKV())
