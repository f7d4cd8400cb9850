"""What attention over the parts of a sequence's KV looks like, whichever kernel does it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kvservice.kv.partial import AttnPartial


class PartAttention(Protocol):
    """Attention of some rows over parts that are added one after the other.

    A caller takes a `type[PartAttention]`, so that one flow serves every kernel. The added parts must be disjoint.
    """

    def __init__(self, q: Tensor, scale: float) -> None:
        """Takes the rows.

        Args:
            q: `[kv, r, d]`, rotated; row `i * group + j` is query i in head j of the KV head's group.
            scale: factor of the scores.
        """
        ...

    def add(self, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        """Attends to one more part. The caller may overwrite the tensors afterwards.

        Args:
            k: `[kv, t, d]`, of any strides; `t` may be 0.
            v: `[kv, t, d]`.
            mask: added to the scores, `[r, t]` of 0 and minus infinity; a row may see nothing of the part.
        """
        ...

    def result(self) -> AttnPartial:
        """One softmax over all that was added so far; more may be added afterwards.

        A row that has seen nothing has out 0 and lse minus infinity.
        """
        ...
