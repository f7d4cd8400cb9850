"""Key tokens: accumulated attention with noise, and a temperature that rises as the answer goes on."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvservice.compression.methods import METHODS, Held, Method, Scorer, Seen

_DRAWS = 1 << 18
"""Numbers of noise that there are; which of them a score gets follows from where it stands."""

_ODD = 0x9E3779B1


@dataclass(frozen=True)
class GumbelMass(Scorer):
    """Ranks by the sum over queries of a softmax of scores with Gumbel noise."""

    recent_share: float = 0.3
    """Of the kept tokens, those that are the latest."""
    temperature: float = 1.0
    """Of what is read."""
    rise: float = 0.01
    """Added with every token of an answer."""
    noise: float = 1.0
    """0: none."""
    seed: int = 0

    remembers: ClassVar[tuple[str, ...]] = ("mass",)

    def observe(self, seen: Seen, remembered: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Scorer`."""
        count = seen.logits.shape[2]
        step = (seen.num_answered + torch.arange(count, device=seen.logits.device)).view(-1, 1)
        answered = step if seen.num_answered else torch.zeros_like(step)
        logits = seen.logits + self.noise * self._gumbel(seen) if self.noise else seen.logits
        probs = (logits / (self.temperature + self.rise * answered)).softmax(-1)
        return {"mass": remembered["mass"] + probs.sum((1, 2))}

    def score(self, held: Held) -> Tensor:
        """See `Scorer`."""
        recent = (held.limits * self.recent_share).long().unsqueeze(1)
        return held.remembered["mass"].masked_fill(held.pinned(0, recent), torch.inf)

    def _gumbel(self, seen: Seen) -> Tensor:
        """Noise that follows from seed, layer, head and the positions of query and key: fp32 `[kv, g, q, t]`."""
        num_kv, group, count, _ = seen.logits.shape
        device = seen.logits.device
        heads = torch.arange(num_kv * group, device=device).view(num_kv, group, 1, 1)
        queries = (seen.first + torch.arange(count, device=device)).view(-1, 1)
        of_query = _scrambled((self.seed * 1009 + seen.layer) * 4099 + heads + _scrambled(queries) * 31)
        of_key = _scrambled(seen.positions.view(num_kv, 1, 1, -1) * 8191 + 1)
        # Adding is all that is done for each score: of a long text there are a billion.
        places = (of_query + of_key).to(torch.int32) & (_DRAWS - 1)
        return _draws(self.seed, device)[places]


@functools.cache
def _draws(seed: int, device: torch.device) -> Tensor:
    """Gumbel's numbers, fp32 `[_DRAWS]`."""
    share = torch.rand(_DRAWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return -(-share.clamp(min=1e-12).log()).log().float().to(device)


def _scrambled(numbers: Tensor) -> Tensor:
    """Spreads int64 numbers over 24 bits."""
    numbers = (numbers ^ (numbers >> 15)) * _ODD & 0xFFFFFFFF
    numbers = (numbers ^ (numbers >> 13)) * _ODD & 0xFFFFFFFF
    return numbers >> 8


METHODS.register("keyformer")(
    Method(
        paper="Adnan et al., Keyformer, arXiv:2403.09054",
        summary="as H2O, with Gumbel noise on the scores and a temperature that rises during the answer",
        saves="all but the kept tokens' KV",
        costs="the weights of all attention, and a second softmax; 4 bytes for each kept token of a KV head",
        deviates="the query heads of a KV head choose together; keeps a number of tokens, not 60 % of the prompt; "
        "noise follows from (seed, layer, head, positions); the variants for models with a bias by position are left "
        "out",
        scorer=GumbelMass(),
    )
)
