"""What one token found is used by the next ones, until that was too long ago or the query is another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from kvservice.compression.methods import METHODS, Method, ReusePlan


@dataclass(frozen=True)
class FewTokensLook(ReusePlan):
    """Each layer for itself."""

    tokens: int = 512
    stride: int = 50
    """Every so many tokens all are looked at."""
    least_similarity: float = 0.8
    """Or when the query is less similar to that which looked last."""
    check: int = 5
    """Which is seen to every so many tokens."""

    per_query_head: ClassVar[bool] = False

    def source(self, layer: int) -> int | None:
        """See `ReusePlan`: itself."""
        return layer

    def looks(self, layer: int, since: int, similarity: Callable[[], float]) -> bool:  # noqa: ARG002
        """See `ReusePlan`."""
        if since >= min(self.stride, self.tokens):
            return True
        return since % self.check == 0 and similarity() < self.least_similarity


METHODS.register("recycled_attention")(
    Method(
        paper="Xu et al., Recycled Attention, arXiv:2411.05787",
        summary="every 50th token, or when queries have changed, looks at all tokens; those between at what it found",
        saves="reading KV of most tokens of an answer; no memory",
        costs="all KV stays on the device",
        deviates="the first token of an answer looks at all tokens, instead of going by the last of the prompt; both "
        "rules at once, the fixed stride and the similarity; 512 tokens instead of 4,096",
        reuse=FewTokensLook(),
    )
)
