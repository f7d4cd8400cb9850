import torch

from kvservice.compression.protocols import RECALL_INDEXES, Selection
from kvservice.recall.planner import select


def ask(keys, q):
    num_kv, tokens, dim = keys.shape
    codes, params = RECALL_INDEXES.get("quest").encode(keys.reshape(-1, 64, dim), 0)
    groups = tokens // 64
    return Selection(q, codes.view(num_kv, groups, 0), params.view(num_kv, groups, 8, dim), tokens, 1.0, 0)


def test_the_bound_of_a_page_is_that_of_the_paper():
    keys = torch.zeros(1, 64, 2)
    keys[0, :16] = torch.tensor([-1.0, 5.0])
    keys[0, 3] = torch.tensor([2.0, -3.0])
    # Channel 0 lies in [-1, 2] and channel 1 in [-3, 5]: 1 * 2 + -1 * -3.
    scores = RECALL_INDEXES.get("quest").scores(ask(keys, torch.tensor([[[1.0, -1.0]]])))
    assert scores[0, 0].tolist() == [5.0] * 16 + [0.0] * 48


def test_no_key_scores_above_the_bound_of_its_page():
    torch.manual_seed(1)
    keys, q = torch.randn(2, 192, 16), torch.randn(2, 6, 16)
    assert (RECALL_INDEXES.get("quest").scores(ask(keys, q)) + 1e-5 >= q @ keys.transpose(1, 2)).all()


def test_whole_pages_are_chosen_but_for_the_last():
    torch.manual_seed(2)
    scores = RECALL_INDEXES.get("quest").scores(ask(torch.randn(2, 640, 16), torch.randn(2, 3, 16)))
    chosen = select(scores, torch.zeros(2, 3), num_queries=1, budget=40)
    for head in chosen[:, 0]:
        pages, counts = (head // 16).unique(return_counts=True)
        assert len(pages) == 3
        assert sorted(counts.tolist()) == [8, 16, 16]
