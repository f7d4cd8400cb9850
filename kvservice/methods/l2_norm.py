"""Keys of a small norm attract attention; those of a large one are dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvservice.compression.methods import METHODS, Held, Method, Scorer


@dataclass(frozen=True)
class SmallKeys(Scorer):
    """Keeps the keys of the smallest norm."""

    refill: int = 64
    """Tokens that come before some are dropped again; of small budgets a quarter."""

    remembers: ClassVar[tuple[str, ...]] = ("norm",)

    goes_by_keys: ClassVar[bool] = True

    def slack(self, kept_tokens: int) -> int:
        """See `Scorer`: an answer's own tokens seldom have the smallest keys, but it can't do without them."""
        return min(self.refill, kept_tokens // 4)

    def meet(self, keys: Tensor) -> Mapping[str, Tensor]:
        """See `Scorer`. Rotation leaves norms as they are."""
        return {"norm": keys.norm(dim=-1)}

    def score(self, held: Held) -> Tensor:
        """See `Scorer`."""
        return -held.remembered["norm"]


METHODS.register("l2_norm")(
    Method(
        paper="Devoto et al., L2 norm, arXiv:2406.11430",
        summary="keys of the smallest L2 norm stay",
        saves="all but the kept tokens' KV; needs no attention weights",
        costs="4 bytes for each kept token of a KV head; when some are dropped, the latest are not protected",
        deviates="tokens are dropped 64 at a time, and not one with each that comes; the first layers are compressed "
        "as all others are, or they would outgrow the budget",
        scorer=SmallKeys(),
    )
)
