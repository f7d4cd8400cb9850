import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvservice.compression.protocols import RECALL_INDEXES, Choice, ScanTally, Selection
from kvservice.methods import paged_key_index
from kvservice.recall.planner import select

SAME = 1e-4
"""Groups scored apart and together differ by rounding, bf16 products included."""


def encode(keys, bits):
    num_kv, tokens, dim = keys.shape
    codes, params = RECALL_INDEXES.get("paged_key_index").encode(keys.reshape(-1, 64, dim), bits)
    return codes.view(num_kv, tokens // 64, -1), params.view(num_kv, tokens // 64, -1, dim)


def asked(keys, q, bits, choice=None):
    codes, params = encode(keys, bits)
    return Selection(q, codes, params, keys.shape[1], q.shape[-1] ** -0.5, 0, choice)


def walk(num_kv, tokens, dim, step):
    """Keys that wander, so that groups lie apart."""
    return torch.randn(num_kv, tokens, dim).mul_(step).cumsum(1)


def scan(keys, q, bits, proximal, choosers, budget):
    """The paged scores, the full scan's, and the tally."""
    tally = ScanTally()
    index = RECALL_INDEXES.get("paged_key_index")
    paged = index.scores(asked(keys, q, bits, Choice(proximal, choosers, budget, tally)))
    return paged, RECALL_INDEXES.get("key_index").scores(asked(keys, q, bits)), tally


def test_it_encodes_as_the_key_index_does():
    keys = torch.randn(5, 64, 16)
    for mine, its in zip(
        RECALL_INDEXES.get("paged_key_index").encode(keys, 2),
        RECALL_INDEXES.get("key_index").encode(keys, 2),
        strict=True,
    ):
        assert torch.equal(mine, its)


@given(
    seed=st.integers(0, 2**20),
    num_groups=st.integers(1, 40),
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([1, 3]),
    choosers=st.sampled_from([1, 2]),
    budget=st.sampled_from([1, 16, 64, 100]),
    step=st.sampled_from([0.02, 0.2, 1.0]),
    near=st.sampled_from([-5.0, 0.0, 8.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_choice_of_a_full_scan_is_among_what_was_scanned(
    seed, num_groups, bits, group, choosers, budget, step, near, dtype
):
    torch.manual_seed(seed)
    keys = walk(2, 64 * num_groups, 16, step).to(dtype)
    q = (2 * torch.randn(2, choosers * group, 16)).to(dtype)
    proximal = near + torch.randn(2, choosers * group)
    paged, full, tally = scan(keys, q, bits, proximal, choosers, budget)
    assert tally.groups == 2 * num_groups
    assert 0 < tally.scanned <= tally.groups
    # Where the two agree in every row the token was scanned, but for coincidences.
    scanned = torch.isclose(paged, full, rtol=SAME, atol=SAME).all(1, keepdim=True)
    assert int(scanned.view(2, num_groups, 64).all(-1).sum()) >= tally.scanned
    best = select(full, proximal, choosers, budget)
    assert scanned.expand(-1, choosers, -1).gather(2, best).all()
    # The planner's own choice by these scores stays within them.
    chosen = select(paged, proximal, choosers, budget)
    assert scanned.expand(-1, choosers, -1).gather(2, chosen).all()
    if group == 1:
        kth = full.topk(best.shape[2], dim=-1).values[..., -1:]
        assert (full.gather(2, chosen) >= kth).all(), "alone, a row chooses as by a full scan"


def test_groups_that_lie_apart_are_not_all_scanned():
    torch.manual_seed(3)
    keys = (4 * torch.randn(2, 100, 1, 16)).repeat(1, 1, 64, 1).flatten(1, 2) + 0.05 * torch.randn(2, 6400, 16)
    q = torch.randn(2, 3, 16)
    _, _, tally = scan(keys, q, 2, torch.zeros(2, 3), 1, 128)
    assert tally.scanned < 0.1 * tally.groups


@pytest.mark.parametrize("budget", [128, 1000])
def test_with_a_budget_of_all_tokens_everything_is_scanned(budget):
    keys, q = torch.randn(2, 128, 16), torch.randn(2, 3, 16)
    paged, full, tally = scan(keys, q, 2, torch.zeros(2, 3), 1, budget)
    assert torch.equal(paged, full)
    assert (tally.scanned, tally.groups) == (4, 4)


def test_without_a_choice_everything_is_scored():
    keys, q = torch.randn(2, 640, 16), torch.randn(2, 3, 16)
    mine, its = (RECALL_INDEXES.get(name).scores(asked(keys, q, 2)) for name in ("paged_key_index", "key_index"))
    assert torch.equal(mine, its)


def test_mass_that_a_head_has_where_nothing_was_scanned_counts_against_its_tokens():
    """Head 0 likes the scanned token, but has far more mass elsewhere; head 1 may like one that wasn't scanned."""
    scores = torch.full((1, 2, 128), -20.0)
    scores[0, 0, 0] = 2.0
    scanned = torch.tensor([[True, False]])
    choice = Choice(torch.zeros(1, 2), num_choosers=1, budget=1, tally=ScanTally())
    elsewhere = [torch.tensor([[[2.0, head_0], [-20.0, -1.0]]]) for head_0 in (-20.0, 0.5)]
    proven = [
        paged_key_index._is_proven(scores, paged_key_index._Outlook(most, most), scanned, choice) for most in elsewhere
    ]
    assert proven == [True, False]
