"""Jensen-Shannon divergence and distant attention, beside other ways to compute them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvservice.evaluation.layer_similarity import distant_attention, entropy, pairwise_js

ROUNDING = 1e-5
"""fp32 sums over hundreds of tokens."""


def distributions(*shape: int, seed: int = 0) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def kl_bits(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log2()).sum(-1)


def test_entropy_is_in_bits() -> None:
    assert entropy(torch.full((8,), 1 / 8)).item() == pytest.approx(3.0)
    assert entropy(torch.tensor([1.0, 0.0])).item() == pytest.approx(0.0)


def test_js_is_the_mean_kl_to_the_mixture() -> None:
    p = distributions(4, 6, 300).double()
    js = pairwise_js(p.float())
    for a in range(4):
        for b in range(4):
            mixed = (p[a] + p[b]) / 2
            expected = (kl_bits(p[a], mixed) + kl_bits(p[b], mixed)) / 2
            torch.testing.assert_close(js[a, b].double(), expected, atol=ROUNDING, rtol=0)


def test_js_is_0_for_equal_and_1_for_disjoint_distributions() -> None:
    left, right = torch.tensor([0.5, 0.5, 0, 0]), torch.tensor([0, 0, 0.25, 0.75])
    js = pairwise_js(torch.stack([left, right, left]).unsqueeze(1))[..., 0]
    assert js[0, 2].item() == pytest.approx(0.0, abs=ROUNDING)
    assert js[0, 1].item() == pytest.approx(1.0, abs=ROUNDING)
    assert torch.equal(js, js.T)


def test_js_leaves_its_argument_as_it_was() -> None:
    p = distributions(3, 2, 10)
    before = p.clone()
    pairwise_js(p)
    assert torch.equal(p, before)


def test_distant_attention_is_the_softmax_cut_out_and_renormalised() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 5, 16, generator=generator), torch.randn(40, 16, generator=generator)
    far, mass = distant_attention(q, k, slice(4, 20))
    scores = q @ k.T / math.sqrt(16)
    for query in range(5):
        whole = scores[:, query, : 36 + query].softmax(-1)[:, 4:20]
        torch.testing.assert_close(mass[:, query], whole.sum(-1))
        torch.testing.assert_close(far[:, query], whole / whole.sum(-1, keepdim=True))
