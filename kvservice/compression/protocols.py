"""What a method provides. A method is stateless: state belongs to the sequence, and the engine passes it in.

Of the eleven protocols of the design, those are here that this release calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvservice.registry import Registry


@dataclass(slots=True)
class ScanTally:
    """What an index had to look at: groups of 64 tokens of one KV head."""

    groups: int = 0
    scanned: int = 0
    """Scored token by token."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What will be chosen by the scores, for indexes that needn't score every token for it.

    Each chooser takes the `budget` tokens of the most attention mass over its rows:
    `exp(score - log(sum over distant + sum over proximal))`.

    Attributes:
        proximal_lse: fp32 `[kv, r]`, of what each row attends to in sinks and window.
        num_choosers: rows choose together in runs of `r / num_choosers`.
        budget: tokens for each chooser and KV head.
        tally: counts what was scanned.
    """

    proximal_lse: Tensor
    num_choosers: int
    budget: int
    tally: ScanTally


@dataclass(frozen=True, slots=True)
class Selection:
    """What an index is asked: which distant tokens matter to these queries.

    Attributes:
        q: `[kv, r, d]`, rotated queries; `r` rows are queries times query heads of the KV head.
        codes: uint8 `[kv, groups, code_bytes]`, as the index encoded them.
        params: `[kv, groups, p, d]`, as the index encoded them.
        num_distant: distant tokens, `64 * groups`.
        scale: factor of the attention scores.
        seed: of this query's position and layer, for indexes that draw at random.
        choice: what the scores are for; None: all of them are wanted.
    """

    q: Tensor
    codes: Tensor
    params: Tensor
    num_distant: int
    scale: float
    seed: int
    choice: Choice | None = None


class RecallIndex(Protocol):
    """A summary of distant keys, kept on the device, that estimates their attention scores."""

    paper: str
    """Author, title, arXiv id; shown by `kvservice methods`."""

    summary: str

    is_key_index: bool
    """Whether it scores all keys in the layout of `methods.key_index`, so that kernels for that may do its work."""

    def encode(self, keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Encodes whole groups of keys.

        Args:
            keys: `[n, 64, d]`, rotated keys of `n` (layer, KV head, group)s.
            bits: bits per number.

        Returns:
            Codes, uint8 `[n, 64 * d * bits / 8]`, and params, `[n, p, d]` in the keys' dtype. `bits` and `p` are the
            recipe's `index_bits` and `index_params`, which its bytes are counted by.
        """
        ...

    def scores(self, ask: Selection) -> Tensor:
        """Estimated attention scores of every distant token, fp32 `[kv, r, num_distant]`.

        With a `choice`, a token that isn't chosen may have any score by which it still isn't.
        """
        ...


class ClusterIndex(Protocol):
    """A way to sum up distant keys by a few centroids, kept on the device, whose tokens are recalled together."""

    paper: str
    """Author, title, arXiv id; shown by `kvservice methods`."""

    summary: str

    def cluster(self, keys: Tensor, num_clusters: int, seed: int) -> tuple[Tensor, Tensor]:
        """Clusters keys, each row for itself. A function of its arguments alone.

        Args:
            keys: `[rows, t, d]`, rotated keys.
            num_clusters: of each row; some may end up empty.
            seed: of what is random.

        Returns:
            The cluster of each key, int64 `[rows, t]`, and the centroids, `[rows, num_clusters, d]` in the keys' dtype.
        """
        ...

    def scores(self, q: Tensor, centroids: Tensor) -> Tensor:
        """How much each query wants each cluster, in the units of `q @ key`.

        Args:
            q: `[kv, r, d]`, rotated queries.
            centroids: `[kv, c, d]`.

        Returns:
            fp32 `[kv, r, c]`.
        """
        ...


RECALL_INDEXES: Registry[RecallIndex] = Registry("recall_index")

CLUSTER_INDEXES: Registry[ClusterIndex] = Registry("cluster_index")
