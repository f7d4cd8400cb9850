"""What a method provides. A method is stateless: state belongs to the sequence, and the engine passes it in.

Of the eleven protocols of the design, those are here that this release calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvservice.registry import Registry


@dataclass(frozen=True, slots=True)
class Selection:
    """What an index is asked: which distant tokens matter to these queries.

    Attributes:
        q: `[kv, r, d]`, rotated queries; `r` rows are queries times query heads of the KV head.
        codes: uint8 `[kv, groups, code_bytes]`, as the index encoded them.
        params: `[kv, groups, 2, d]`, scale and zero of each channel; empty when the index keeps none.
        num_distant: distant tokens, `64 * groups`.
        scale: factor of the attention scores.
        seed: of this query's position and layer, for indexes that draw at random.
    """

    q: Tensor
    codes: Tensor
    params: Tensor
    num_distant: int
    scale: float
    seed: int


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
            Codes, uint8 `[n, 64 * d * bits / 8]`, and params, `[n, 2, d]` in the keys' dtype or `[n, 0, d]`.
        """
        ...

    def scores(self, ask: Selection) -> Tensor:
        """Estimated attention scores of every distant token, fp32 `[kv, r, num_distant]`."""
        ...


RECALL_INDEXES: Registry[RecallIndex] = Registry("recall_index")
