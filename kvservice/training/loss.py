"""What training makes small: the distance of next-token distributions from the dense model's. Knows no layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ROWS = 128
"""Tokens whose logits are there at a time: 25 MB each of 49,152 tokens in fp32."""


def kl_to(target: Tensor, out: Tensor, head: Tensor) -> Tensor:
    """Mean KL(target ‖ out) of next tokens, in nats; differentiable in `out`.

    The gradient is worked out on the way forward, so that no more logits are ever kept than `CHUNK_ROWS`.

    Args:
        target: `[n, hidden]`, normed states of the dense model.
        out: `[n, hidden]`, those of the model that is trained.
        head: `[vocab, hidden]`, fixed.
    """
    loss: Tensor = _HeadKl.apply(target, out, head)  # type: ignore[no-untyped-call]
    return loss


def state_distance(target: Tensor, out: Tensor) -> Tensor:
    """Mean square distance of layers' outputs, as a share of the target's mean square; sinks' huge ones left out."""
    rest, mine = target[1:].float(), out[1:].float()
    return (mine - rest).square().mean() / rest.square().mean()


@dataclass(frozen=True, slots=True)
class Distances:
    """How far next-token distributions are from the dense model's; means over tokens, nats.

    Attributes:
        kl: KL(dense ‖ other).
        nll: of the text's own tokens.
        dense_nll: the same of the dense model.
        top1: share of tokens for which both rank the same one first.
    """

    kl: float
    nll: float
    dense_nll: float
    top1: float


@torch.no_grad()
def distances(target: Tensor, out: Tensor, head: Tensor, token_ids: Tensor) -> Distances:
    """As `kl_to`, with more figures and no gradient. `token_ids`, `[n]`, are those that really came next."""
    sums = torch.zeros(4, dtype=torch.float64)
    for first in range(0, out.shape[0], CHUNK_ROWS):
        rows = slice(first, first + CHUNK_ROWS)
        wanted, found = (F.linear(x[rows], head).float().log_softmax(-1) for x in (target, out))
        own = token_ids[rows].unsqueeze(1)
        sums += torch.stack(
            [
                (wanted.exp() * (wanted - found)).sum(),
                -found.gather(1, own).sum(),
                -wanted.gather(1, own).sum(),
                (wanted.argmax(-1) == found.argmax(-1)).sum(),
            ]
        ).cpu()
    return Distances(*(sums / out.shape[0]).tolist())


class _HeadKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, target: Tensor, out: Tensor, head: Tensor) -> Tensor:  # noqa: ANN401 -- torch gives no type
        total = torch.zeros((), device=out.device)
        gradient = torch.empty_like(out)
        for first in range(0, out.shape[0], CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            wanted = F.linear(target[rows], head).float().log_softmax(-1)
            found = F.linear(out[rows], head).float().log_softmax(-1)
            share = wanted.exp()
            total += (share * (wanted - found)).sum()
            gradient[rows] = (found.exp_().sub_(share) / out.shape[0]).to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return total / out.shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:  # noqa: ANN401 -- likewise
        (gradient,) = ctx.saved_tensors
        return None, gradient * grads[0].to(gradient.dtype), None
