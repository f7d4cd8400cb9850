import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvservice.kernels import reference
from kvservice.kernels.fixed_order import FixedOrderAttention
from kvservice.types import GROUP_TOKENS, SINK_TOKENS

FP32_ROUNDING = 1e-5
BF16_ROUNDING = 2e-2

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
DIMS = st.sampled_from([16, 64, 80])
SEEDS = st.integers(0, 2**16)


def make(num_kv, rows, total, dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_kv, n, dim, generator=generator).to(dtype) for n in (rows, total, total)]


def attend(q, k, v, edges, mask=None):
    attention = FixedOrderAttention(q, q.shape[-1] ** -0.5)
    for a, b in pairwise(edges):
        attention.add(k[:, a:b], v[:, a:b], None if mask is None else mask[:, a:b])
    return attention.result()


def bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same_bits(ours, expected):
    assert torch.equal(bits(ours.out), bits(expected.out))
    assert torch.equal(bits(ours.lse), bits(expected.lse))


def rows_of(part, rows):
    return type(part)(part.out[:, rows], part.lse[:, rows])


@st.composite
def group_edges(draw, total):
    """Edges of parts as an engine has them: the sinks, then cuts at 16 + 64k."""
    cuts = range(SINK_TOKENS + GROUP_TOKENS, total, GROUP_TOKENS)
    some = draw(st.sets(st.sampled_from(cuts))) if cuts else set()
    return sorted({0, min(SINK_TOKENS, total), total, *some})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32_ROUNDING), (torch.bfloat16, BF16_ROUNDING)])
@pytest.mark.parametrize("dim", [16, 64, 80])
@pytest.mark.parametrize(("rows", "total"), [(1, 1), (3, 64), (24, 333), (200, 150)])
def test_it_equals_the_reference(dtype, tolerance, dim, rows, total):
    q, k, v = make(3, rows, total, dim, dtype)
    ours, expected = attend(q, k, v, [0, total]), reference.attend(q, k, v, dim**-0.5)
    assert ours.out.dtype is dtype
    torch.testing.assert_close(ours.out, expected.out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours.lse, expected.lse, atol=tolerance, rtol=tolerance)


@given(data=st.data(), total=st.integers(1, 500), rows=st.integers(1, 40), seed=SEEDS)
def test_it_equals_the_reference_under_any_mask(data, total, rows, seed):
    q, k, v = make(2, rows, total, 16, seed=seed)
    visible = torch.rand(rows, total, generator=torch.Generator().manual_seed(seed)) < data.draw(st.floats(0, 0.2))
    mask = torch.zeros(rows, total).masked_fill(~visible, -math.inf)
    ours = attend(q, k, v, data.draw(group_edges(total)), mask)
    expected = reference.attend(q, k, v, 0.25, mask)
    torch.testing.assert_close(ours.out, expected.out, atol=FP32_ROUNDING, rtol=FP32_ROUNDING)
    torch.testing.assert_close(ours.lse, expected.lse, atol=FP32_ROUNDING, rtol=FP32_ROUNDING)


@given(data=st.data(), start=st.integers(0, 400), count=st.integers(1, 70), dtype=DTYPES, dim=DIMS, seed=SEEDS)
def test_a_query_of_a_chunk_has_the_bits_of_the_query_alone(data, start, count, dtype, dim, seed):
    num_kv, group, total = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8)), start + count
    q, k, v = make(num_kv, count * group, total, dim, dtype, seed)
    mask = torch.full((count, total), -math.inf, dtype=dtype).triu(start + 1).repeat_interleave(group, 0)
    chunk = attend(q, k, v, data.draw(group_edges(total)), mask)
    for query in {0, count - 1, data.draw(st.integers(0, count - 1))}:
        rows, seen = slice(query * group, (query + 1) * group), start + query + 1
        alone = attend(q[:, rows], k[:, :seen], v[:, :seen], data.draw(group_edges(seen)))
        assert_same_bits(rows_of(chunk, rows), alone)


@given(data=st.data(), rows=st.integers(1, 100), total=st.integers(1, 2000), dtype=DTYPES, dim=DIMS, seed=SEEDS)
def test_cuts_at_groups_change_no_bit(data, rows, total, dtype, dim, seed):
    q, k, v = make(data.draw(st.integers(1, 3)), rows, total, dim, dtype, seed)
    first, second = data.draw(group_edges(total)), data.draw(group_edges(total))
    assert_same_bits(attend(q, k, v, first), attend(q, k, v, second))


@given(rows=st.integers(2, 80), total=st.integers(1, 400), dtype=DTYPES, dim=DIMS, seed=SEEDS)
def test_a_rows_bits_do_not_depend_on_the_other_rows_and_heads(rows, total, dtype, dim, seed):
    q, k, v = make(3, rows, total, dim, dtype, seed)
    whole = attend(q, k, v, [0, total])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    assert_same_bits(attend(q[:, order], k, v, [0, total]), rows_of(whole, order))
    head = type(whole)(whole.out[1:2], whole.lse[1:2])
    assert_same_bits(attend(q[1:2], k[1:2], v[1:2], [0, total]), head)
    few = order[: rows // 2]
    assert_same_bits(attend(q[:, few], k, v, [0, total]), rows_of(whole, few))


@given(total=st.integers(1, 300), tail=st.integers(1, 300), dtype=DTYPES, dim=DIMS, seed=SEEDS)
def test_a_masked_tail_changes_no_bit(total, tail, dtype, dim, seed):
    q, k, v = make(2, 5, total + tail, dim, dtype, seed)
    mask = torch.zeros(5, total + tail)
    mask[:, total:] = -math.inf
    expected = attend(q, k[:, :total], v[:, :total], [0, total])
    assert_same_bits(attend(q, k, v, [0, total + tail], mask), expected)


@given(total=st.integers(1, 300), dtype=DTYPES, seed=SEEDS)
def test_a_mask_that_hides_nothing_changes_no_bit(total, dtype, seed):
    q, k, v = make(2, 5, total, 64, dtype, seed)
    assert_same_bits(attend(q, k, v, [0, total], torch.zeros(5, total)), attend(q, k, v, [0, total]))


def test_layout_in_memory_changes_no_bit():
    q, k, v = make(3, 21, 200, 64, torch.bfloat16)
    pairs = torch.stack([k, v], 2)
    by_query = q.transpose(0, 1).contiguous().transpose(0, 1)
    strided = attend(by_query, pairs[:, :, 0], pairs[:, :, 1], [0, 200])
    assert_same_bits(strided, attend(q, k, v, [0, 200]))


@pytest.mark.parametrize(("rows", "total"), [(3, 1), (3, 2000), (300, 700)])
def test_the_number_of_threads_changes_no_bit(rows, total):
    q, k, v = make(3, rows, total, 64)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            results += [attend(q, k, v, [0, total]), rows_of(attend(q[:, :1], k, v, [0, total]), slice(None))]
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[0], results[2])
    assert_same_bits(results[1], results[3])
    assert_same_bits(rows_of(results[0], slice(0, 1)), results[1])


def test_a_negative_zero_is_the_same_with_a_masked_tail():
    q, k, v = make(1, 1, 128, 16)
    v.fill_(-0.0)
    mask = torch.zeros(1, 128)
    mask[:, 1:] = -math.inf
    assert_same_bits(attend(q, k, v, [0, 128], mask), attend(q, k, v, [0, 1]))


def test_a_result_may_be_taken_between_parts():
    q, k, v = make(2, 6, 300, 64)
    attention = FixedOrderAttention(q, 0.125)
    for a, b in pairwise([0, 16, 144, 300]):
        attention.add(k[:, a:b], v[:, a:b])
        assert_same_bits(attention.result(), attend(q, k[:, :b], v[:, :b], [0, 16, b]))


def test_a_row_that_sees_nothing_has_out_0_and_lse_minus_infinity():
    q, k, v = make(2, 4, 100, 16)
    attention = FixedOrderAttention(q, 0.25)
    attention.add(k[:, :0], v[:, :0])
    nothing = attention.result()
    assert torch.equal(nothing.out, torch.zeros_like(q))
    assert torch.equal(nothing.lse, torch.full((2, 4), -math.inf))
    mask = torch.zeros(4, 100)
    mask[:2] = -math.inf
    attention.add(k, v, mask)
    part = attention.result()
    assert torch.equal(part.out[:, :2], torch.zeros_like(q[:, :2]))
    assert (part.lse[:, :2] == -math.inf).all()
    assert_same_bits(rows_of(part, slice(2, 4)), attend(q[:, 2:], k, v, [0, 100]))


def test_an_empty_part_changes_no_bit():
    q, k, v = make(2, 4, 100, 16)
    assert_same_bits(attend(q, k, v, [0, 16, 16, 100]), attend(q, k, v, [0, 16, 100]))


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v = make(1, 3, 200, 64)
    ours, expected = attend(100 * q, k, v, [0, 200]), reference.attend(100 * q, k, v, 0.125)
    torch.testing.assert_close(ours.out, expected.out, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(ours.lse, expected.lse, atol=1e-3, rtol=1e-5)
