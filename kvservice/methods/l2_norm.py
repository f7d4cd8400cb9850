"""Keys of a small norm attract attention; those of a large one are dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvservice.compression.methods import METHODS, Held, Method, Scorer, Seen


@dataclass(frozen=True)
class SmallKeys(Scorer):
    """Keeps the keys of the smallest norm."""

    remembers: ClassVar[tuple[str, ...]] = ("norm",)

    def observe(self, seen: Seen, remembered: Mapping[str, Tensor]) -> Mapping[str, Tensor]:  # noqa: ARG002
        """See `Scorer`. Rotation leaves norms as they are."""
        return {"norm": seen.keys.norm(dim=-1)}

    def score(self, held: Held) -> Tensor:
        """See `Scorer`."""
        return -held.remembered["norm"]


METHODS.register("l2_norm")(
    Method(
        paper="Devoto et al., L2 norm, arXiv:2406.11430",
        summary="keys of the smallest L2 norm stay",
        saves="all but the kept tokens' KV; needs no attention weights",
        costs="4 bytes for each kept token of a KV head; nothing protects the latest tokens",
        deviates="the first layers are compressed as all others are, or they would outgrow the budget",
        scorer=SmallKeys(),
    )
)
