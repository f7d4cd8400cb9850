from dataclasses import replace

import pytest
import torch

from kvservice.compression.protocols import RECALL_INDEXES, ScanTally
from kvservice.config.recipes import RECALL, RECIPES
from kvservice.kv.arena import Arena
from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Ledger
from kvservice.recall.choosing import Query, choose_by_scores, new_index, take_turns
from kvservice.recall.memory import SequenceMemory, Store
from kvservice.recall.planner import select
from kvservice.recall.residency import RecallSlots
from kvservice.tier.host import HostTier
from kvservice.tier.swap import SwapSpace

LAYOUT = KVLayout(2, 2, 16, torch.float32)
SCALE = 16**-0.5


@pytest.fixture(autouse=True)
def methods():
    RECALL_INDEXES.discover("kvservice.methods")


@pytest.fixture
def groups():
    torch.manual_seed(0)
    return torch.randn(8, *LAYOUT.group_shape)


def filled(recipe, groups):
    index = new_index(recipe, Arena(LAYOUT, 4000, 0, Ledger(1 << 30, 1 << 30), torch.device("cpu")))
    index.append(groups)
    return index


def query(num_queries, group=3):
    torch.manual_seed(1)
    rows = num_queries * group
    return Query(1, 3 * torch.randn(2, rows, 16), torch.randn(2, rows), num_queries, SCALE, seed=0)


def test_turns_take_the_best_of_each_in_turn_and_nothing_twice():
    orders = torch.tensor([[[[4, 1, 0, 2], [4, 2, 3, 1]]]])
    # First turn 4 and 4, second 1 and 2.
    assert sorted(take_turns(orders, total=5, budget=3)[0, 0].tolist()) == [1, 2, 4]
    # In the third turn the first head goes first.
    assert sorted(take_turns(orders, total=5, budget=4)[0, 0].tolist()) == [0, 1, 2, 4]


def test_a_budget_of_the_whole_group_holds_what_each_head_would_choose_alone(groups):
    recipe = replace(RECALL, index_bits=8, recalled_tokens=60, per_query_head=True)
    index, asked = filled(recipe, groups), query(num_queries=2)
    chosen = choose_by_scores(index, recipe, asked, ScanTally())
    assert chosen.shape == (2, 2, 60)
    scores = index.scores(1, asked.q, SCALE, 0).view(2, 2, 3, -1)
    for head in range(3):
        alone = scores[:, :, head].topk(20).indices
        assert (alone.unsqueeze(3) == chosen.unsqueeze(2)).any(3).all()


def test_a_head_that_looks_nearby_has_its_turn_too(groups):
    recipe = replace(RECALL, index_bits=8, recalled_tokens=32)
    index, asked = filled(recipe, groups), query(num_queries=1)
    nearby = replace_lse(asked, torch.tensor([[-9.0, -9.0, 90.0]] * 2))
    best = index.scores(1, asked.q, SCALE, 0)[:, 2].argmax(-1)
    together = choose_by_scores(index, recipe, nearby, ScanTally())
    in_turn = choose_by_scores(index, replace(recipe, per_query_head=True), nearby, ScanTally())
    assert all(best[head] in in_turn[head, 0] for head in range(2))
    assert not all(best[head] in together[head, 0] for head in range(2))


def replace_lse(asked, lse):
    return replace(asked, proximal_lse=lse)


@pytest.mark.parametrize("per_query_head", [False, True])
@pytest.mark.parametrize("name", ["recall", "recall-paged", "recall-quest", "recall-random", "recall-recency"])
def test_every_index_fills_the_budget_with_distinct_tokens(groups, name, per_query_head):
    recipe = replace(RECIPES[name], recalled_tokens=48, per_query_head=per_query_head)
    chosen = choose_by_scores(filled(recipe, groups), recipe, query(num_queries=3), ScanTally()).sort(-1).values
    assert chosen.shape == (2, 3, 48)
    assert (chosen.diff(dim=-1) > 0).all()
    assert 0 <= chosen.min() <= chosen.max() < 8 * 64


@pytest.mark.parametrize("per_query_head", [False, True])
def test_a_budget_of_more_than_there_is_takes_all(groups, per_query_head):
    recipe = replace(RECALL, recalled_tokens=1024, per_query_head=per_query_head)
    chosen = choose_by_scores(filled(recipe, groups[:2]), recipe, query(num_queries=2), ScanTally())
    assert chosen.sort(-1).values.tolist() == [[list(range(128))] * 2] * 2


def test_the_paged_index_chooses_what_a_full_scan_does_where_heads_choose_alone(groups):
    full, paged = (replace(RECIPES[n], recalled_tokens=40, per_query_head=True) for n in ("recall", "recall-paged"))
    tally, asked = ScanTally(), query(num_queries=2)
    chosen = choose_by_scores(filled(paged, groups), paged, asked, tally)
    expected = choose_by_scores(filled(full, groups), full, asked, ScanTally())
    assert torch.equal(chosen.sort(-1).values, expected.sort(-1).values)
    assert tally.groups == 2 * 8


def test_together_they_choose_as_the_planner_does(groups):
    index, asked = filled(RECALL, groups), query(num_queries=2)
    scores = index.scores(1, asked.q, SCALE, 0)
    expected = select(scores, asked.proximal_lse, 2, 128)
    assert torch.equal(choose_by_scores(index, RECALL, asked, ScanTally()), expected)


def test_a_single_missing_token_is_fetched():
    arena = Arena(LAYOUT, 400, 32, Ledger(1 << 30, 1 << 30), torch.device("cpu"))
    slots, staged = RecallSlots(arena, 16), arena.workspace.view(-1, 32)
    for chosen in (torch.arange(16).repeat(2, 1), torch.stack([torch.arange(16), torch.arange(1, 17)])):
        placed = slots.admit(0, chosen)
        count = placed.heads.numel()
        staged[:count] = torch.arange(100.0, 100 + count).unsqueeze(1)
        slots.write(0, placed.heads, placed.slots, staged[:count])
    assert count == 1
    keys, values = slots.read(0, placed.where, placed.where)
    assert keys[1, 15].tolist() == values[1, 15].tolist() == [100.0] * 16


@pytest.mark.parametrize("name", ["recall", *(name for name, spec in RECIPES.items() if spec.evaluation_only)])
def test_kernels_choose_by_low_bit_keys_only_where_heads_choose_together_among_all(name):
    ledger = Ledger(1 << 30, 1 << 30)
    arena, host = Arena(LAYOUT, 16, 0, ledger, torch.device("cpu")), HostTier(LAYOUT, 1, ledger, pin=False)
    spec = replace(RECIPES[name], index_bits=32) if name == "recall-oracle" else RECIPES[name]
    memory = SequenceMemory(spec, Store(arena, host, SwapSpace(arena, host)))
    assert (memory.key_index is not None) == (name == "recall")
