"""More tokens in fewer bits: those that the end of a text looks at, packed once they are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from kvservice.compression.methods import EMPTY, METHODS, Codec, Held, Method, Scorer, Seen
from kvservice.kernels.cpu import HEAD_DIM_STEP, PACKED_TOKENS, PackedPart

_LEAST_STEP = 1e-6


@dataclass(frozen=True)
class ObservationWindow(Scorer):
    """Ranks by the attention of the last queries, smoothed over neighbours: SnapKV (Li et al., arXiv:2404.14469)."""

    window: int = 8
    """Queries that are asked, the last ones; their tokens stay."""
    kernel: int = 7
    """Neighbours, itself included, of which a token has the most attention."""

    remembers: ClassVar[tuple[str, ...]] = ("mass",)
    restarts: ClassVar[bool] = True

    def watches(self, num_after: int) -> bool:
        """See `Scorer`."""
        return num_after < self.window

    def observe(self, seen: Seen, remembered: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Scorer`."""
        return {"mass": remembered["mass"] + seen.probs[:, :, seen.among_last(self.window)].sum((1, 2))}

    def score(self, held: Held) -> Tensor:
        """See `Scorer`. Neighbours are those among the held tokens."""
        order = held.positions.masked_fill(held.positions == EMPTY, held.num_tokens).argsort(dim=1)
        pooled = max_pool1d(held.remembered["mass"].gather(1, order), self.kernel, 1, self.kernel // 2)
        worth = torch.empty_like(pooled).scatter_(1, order, pooled)
        return worth.masked_fill(held.pinned(0, self.window), torch.inf)


@dataclass(frozen=True)
class ChannelsAndTokens(Codec):
    """Keys by channel, values by token, each between its least and its greatest: as KIVI (arXiv:2402.02750) does."""

    exact_tokens: int = 8
    """As many as the window of the scorer has."""

    group_tokens: ClassVar[int] = PACKED_TOKENS

    def part_bytes(self, head_dim: int, dtype: torch.dtype, bits: int) -> tuple[int, ...]:
        """See `Codec`: codes of keys and values; steps and middles of keys; of values."""
        params = 2 * dtype.itemsize
        return 2 * self.group_tokens * head_dim * bits // 8, params * head_dim, params * self.group_tokens

    def encode(self, keys: Tensor, values: Tensor, bits: int) -> tuple[Tensor, ...]:
        """See `Codec`, and `PackedPart` for how codes lie."""
        key_codes, key_params = _quantised(keys, bits, 1)
        value_codes, value_params = _quantised(values, bits, 2)
        codes = torch.cat([key_codes.flatten(1), value_codes.flatten(1)], dim=1)
        return codes, key_params.view(torch.uint8), value_params.view(torch.uint8)

    def decode(self, parts: Sequence[Tensor], head_dim: int, dtype: torch.dtype, bits: int) -> tuple[Tensor, Tensor]:
        """See `Codec`."""
        codes, *params = parts
        shape = (codes.shape[0], 2, self.group_tokens, head_dim * bits // 8)
        key_codes, value_codes = codes.view(shape).unbind(1)
        key_params, value_params = (part.view(dtype).view(codes.shape[0], 2, -1) for part in params)
        return (
            _restored(key_codes, key_params.unsqueeze(2), bits).to(dtype),
            _restored(value_codes, value_params.unsqueeze(3), bits).to(dtype),
        )

    def for_kernels(self, parts: Sequence[Tensor], head_dim: int, dtype: torch.dtype, bits: int) -> PackedPart | None:
        """See `Codec`."""
        if head_dim % HEAD_DIM_STEP:
            return None
        codes, key_params, value_params = parts
        return PackedPart(codes.contiguous(), key_params.view(dtype), value_params.view(dtype), bits)


def _quantised(numbers: Tensor, bits: int, along: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8 `[n, tokens, d * bits / 8]`, and steps and middles, `[n, 2 * m]`, of `[n, tokens, d]`."""
    last = 2**bits - 1
    low, high = numbers.amin(along, keepdim=True).float(), numbers.amax(along, keepdim=True).float()
    # Both are rounded to the stored dtype before they are used, so that decoding needs nothing else.
    step = ((high - low) / last).clamp_(min=_LEAST_STEP).to(numbers.dtype)
    middle = ((high + low) / 2).to(numbers.dtype)
    levels = ((numbers.float() - middle.float()) / step.float() + last / 2).round_().clamp_(0, last).to(torch.uint8)
    fields = levels.unflatten(-1, (8 // bits, -1))
    codes = (fields << _shifts(bits, numbers.device)).sum(-2, dtype=torch.uint8)
    return codes, torch.cat([step.flatten(1), middle.flatten(1)], dim=1)


def _restored(codes: Tensor, params: Tensor, bits: int) -> Tensor:
    """fp32 `[n, tokens, d]`; params are `[n, 2, ...]` that fit."""
    levels = ((codes.unsqueeze(-2) >> _shifts(bits, codes.device)) & (2**bits - 1)).flatten(-2).float()
    step, middle = params.float().unbind(1)
    restored: Tensor = (levels - (2**bits - 1) / 2) * step + middle
    return restored


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device).unsqueeze(1)


METHODS.register("more_tokens")(
    Method(
        paper="Zhang et al., More Tokens, Lower Precision, arXiv:2412.12706",
        summary="tokens that the last 8 queries look at, nearly three times as many in the same bytes",
        saves="all but the kept tokens' KV; those in a quarter of the bytes",
        costs="the weights of the last 8 queries' attention; kept KV is unpacked for every token; quantisers take "
        "12 of a token's 76 bytes in a KV head",
        deviates="keys by channel and values by token in groups of 32, by their range, in place of HQQ; the latest 8 "
        "to 80 tokens are exact and count as such, so 4 bits keep 2.8 times the tokens and not 4; once packed, tokens "
        "are dropped in groups of 32, and not quantised again; all layers have the same bits",
        scorer=ObservationWindow(),
        codec=ChannelsAndTokens(),
    )
)
