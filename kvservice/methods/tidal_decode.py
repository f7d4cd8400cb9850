"""Two layers look at all tokens and find the best; the others look at what these found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from kvservice.compression.methods import METHODS, Method, ReusePlan


@dataclass(frozen=True)
class FewLayersLook(ReusePlan):
    """In each step anew."""

    tokens: int = 256
    first: int = 2
    """The layer that looks first; those before it see everything."""
    correction: int = 13
    """The layer that looks once more."""

    per_query_head: ClassVar[bool] = True

    def source(self, layer: int) -> int | None:
        """See `ReusePlan`."""
        if layer <= self.first or layer == self.correction:
            return None
        return self.correction if layer > self.correction else self.first

    def looks(self, layer: int, since: int, similarity: Callable[[], float]) -> bool:  # noqa: ARG002
        """See `ReusePlan`: what an earlier step found is of no use."""
        return since > 0


METHODS.register("tidal_decode")(
    Method(
        paper="Yang et al., TidalDecode, arXiv:2410.05076",
        summary="layers 2 and 13 find each query head's 256 best tokens; the layers behind them look at those",
        saves="reading KV in most layers, of answers; no memory",
        costs="all KV stays on the device",
        deviates="nothing",
        reuse=FewLayersLook(),
    )
)
