import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvservice.kernels import reference
from kvservice.kernels.base import PartAttention
from kvservice.kernels.fixed_order import FixedOrderAttention
from kvservice.kernels.flash import FlashAttention

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
KINDS: list[type[PartAttention]] = [FlashAttention, FixedOrderAttention]


@pytest.mark.parametrize("kind", KINDS)
@given(
    start=st.integers(0, 90),
    count=st.integers(1, 20),
    cuts=st.lists(st.integers(0, 110), max_size=4),
    dtype=st.sampled_from(list(TOLERANCES)),
    seed=st.integers(0, 2**16),
)
def test_causal_attention_over_any_parts_equals_the_reference(kind, start, count, cuts, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    total, group = start + count, 3
    q, k, v = (torch.randn(2, n, 16, generator=generator).to(dtype) for n in (count * group, total, total))
    mask = torch.full((count, total), -math.inf).triu(start + 1).repeat_interleave(group, 0)
    attention = kind(q, 0.25)
    # Cuts may repeat, which makes empty parts, and may leave a part of which the first queries see nothing.
    for a, b in pairwise(sorted([0, total, *(min(cut, total) for cut in cuts)])):
        attention.add(k[:, a:b], v[:, a:b], mask[:, a:b])
    ours, expected = attention.result(), reference.attend(q, k, v, 0.25, mask)
    tolerance = TOLERANCES[dtype]
    assert ours.out.dtype is dtype
    torch.testing.assert_close(ours.out, expected.out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours.lse, expected.lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_have_seen_nothing_have_out_0_and_lse_minus_infinity(kind):
    q, k = torch.randn(2, 3, 16), torch.randn(2, 70, 16)
    attention = kind(q, 0.25)
    for result in (attention.result, lambda: attention.add(k[:, :0], k[:, :0]) or attention.result()):
        assert torch.equal(result().out, torch.zeros_like(q))
        assert (result().lse == -math.inf).all()
    mask = torch.zeros(3, 70)
    mask[1] = -math.inf
    attention.add(k, k, mask)
    attention.add(k, k, mask)
    assert torch.equal(attention.result().out[:, 1], torch.zeros(2, 16))
    assert (attention.result().lse[:, 1] == -math.inf).all()
    assert attention.result().lse[:, ::2].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_may_be_added_after_a_result_was_taken(kind):
    q, k, v = torch.randn(2, 3, 16), torch.randn(2, 90, 16), torch.randn(2, 90, 16)
    attention = kind(q, 0.25)
    attention.add(k[:, :50], v[:, :50])
    attention.result()
    attention.add(k[:, 50:], v[:, 50:])
    expected = reference.attend(q, k, v, 0.25)
    torch.testing.assert_close(attention.result().out, expected.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention.result().lse, expected.lse, atol=1e-5, rtol=1e-5)
