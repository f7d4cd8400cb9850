from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvservice.kernels import flash, reference
from kvservice.kv.partial import AttnPartial, merge_partials, merge_with_lse

FP32_ROUNDING = 1e-5
BF16_ROUNDING = 2e-2


@given(
    num_kv=st.integers(1, 3),
    rows=st.integers(1, 6),
    total=st.integers(1, 90),
    cuts=st.lists(st.integers(1, 89), max_size=4),
    seed=st.integers(0, 2**16),
)
def test_any_split_into_parts_equals_one_softmax(num_kv, rows, total, cuts, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (3 * torch.randn(num_kv, n, 16, generator=generator) for n in (rows, total, total))
    edges = sorted({0, total, *(cut for cut in cuts if cut < total)})
    parts = [reference.attend(q, k[:, a:b], v[:, a:b], 0.25) for a, b in pairwise(edges)]
    whole = reference.attend(q, k, v, 0.25)
    torch.testing.assert_close(merge_partials(parts), whole.out, atol=FP32_ROUNDING, rtol=FP32_ROUNDING)
    torch.testing.assert_close(merge_with_lse(parts).lse, whole.lse, atol=FP32_ROUNDING, rtol=FP32_ROUNDING)


def test_a_part_that_a_row_saw_nothing_of_counts_for_nothing():
    q, k = torch.randn(2, 3, 16), torch.randn(2, 20, 16)
    nothing, something = AttnPartial.of_nothing(q), reference.attend(q, k, k, 0.25)
    merged = merge_with_lse([nothing, something, nothing])
    torch.testing.assert_close(merged.out, something.out)
    torch.testing.assert_close(merged.lse, something.lse)
    empty = merge_with_lse([nothing, nothing])
    assert torch.equal(empty.out, nothing.out)
    assert torch.equal(empty.lse, nothing.lse)


def test_flash_and_reference_agree_on_rows_that_see_nothing():
    q, k = torch.randn(2, 3, 16), torch.randn(2, 70, 16)
    mask = torch.zeros(3, 70)
    mask[1] = -torch.inf
    for keys, hidden in ((k, mask), (k[:, :0], None)):
        ours, expected = flash.attend(q, keys, keys, 0.25, hidden), reference.attend(q, keys, keys, 0.25, hidden)
        torch.testing.assert_close(ours.out, expected.out, atol=FP32_ROUNDING, rtol=FP32_ROUNDING)
        torch.testing.assert_close(ours.lse, expected.lse, atol=FP32_ROUNDING, rtol=FP32_ROUNDING)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32_ROUNDING), (torch.bfloat16, BF16_ROUNDING)])
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_flash_kernel_equals_the_reference(dtype, tolerance, masked):
    torch.manual_seed(1)
    q, k, v = (torch.randn(3, n, 64).to(dtype) for n in (24, 200, 200))
    mask = torch.full((24, 200), -torch.inf).triu(150) if masked else None
    ours, expected = flash.attend(q, k, v, 0.125, mask), reference.attend(q, k, v, 0.125, mask)
    torch.testing.assert_close(ours.out, expected.out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours.lse, expected.lse, atol=tolerance, rtol=tolerance)


def test_torchs_flash_kernel_reads_strided_keys_and_values():
    torch.manual_seed(2)
    q, pairs = torch.randn(3, 6, 64), torch.randn(3, 100, 2, 64)
    ours = flash.attend(q, pairs[:, :, 0], pairs[:, :, 1], 0.125)
    expected = reference.attend(q, pairs[:, :, 0].contiguous(), pairs[:, :, 1].contiguous(), 0.125)
    torch.testing.assert_close(ours.out, expected.out, atol=FP32_ROUNDING, rtol=FP32_ROUNDING)
