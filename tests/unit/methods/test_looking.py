"""When TidalDecode and Recycled Attention look at all tokens, by hand."""

from types import SimpleNamespace

import pytest
import torch

from kvservice.compression.methods import METHODS
from kvservice.recall.looking import Looking

METHODS.discover("kvservice.methods")


def test_tidal_decode_looks_in_its_first_layers_and_once_more():
    plan = METHODS.get("tidal_decode").reuse
    assert [plan.source(layer) for layer in (0, 1, 2, 3, 12, 13, 14, 29)] == [None, None, None, 2, 2, None, 13, 13]
    assert plan.looks(5, 1, lambda: 1.0)
    assert not plan.looks(5, 0, lambda: 1.0)


def test_recycled_attention_looks_every_so_often_or_when_the_query_has_changed():
    plan = METHODS.get("recycled_attention").reuse
    assert plan.looks(0, 50, lambda: 1.0)
    assert plan.looks(0, 10, lambda: 0.79)
    assert not plan.looks(0, 10, lambda: 0.81)
    assert not plan.looks(0, 11, lambda: 0.1)


@pytest.fixture
def looking():
    plan = type(METHODS.get("recycled_attention").reuse)(tokens=3)
    return Looking(plan, SimpleNamespace(num_computed=6))


def test_new_tokens_take_the_places_of_those_that_mattered_least(looking):
    q = torch.ones(1, 1, 4)
    assert looking.usable(0, q) is None
    looking.learn(0, q, torch.tensor([[[0.1, 0.3, 0.05, 0.25, 0.2, 0.1, 0.0]]]))
    looking.state.num_computed = 7
    assert looking.usable(0, q).tolist() == [[[1, 3, 7]]]
    looking.state.num_computed = 8
    assert looking.usable(0, q).tolist() == [[[1, 7, 8]]]
    looking.state.num_computed = 9
    assert looking.usable(0, q) is None
    assert (looking.num_looked, looking.num_reused) == (2, 2)


def test_what_an_earlier_answer_found_is_of_no_use(looking):
    q = torch.ones(1, 1, 4)
    looking.learn(0, q, torch.full((1, 1, 7), 1 / 7))
    looking.state.num_computed, looking.read_until = 8, 8
    assert looking.usable(0, q) is None
