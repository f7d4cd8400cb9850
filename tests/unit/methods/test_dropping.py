"""One example by hand for each method that drops tokens."""

import math

import pytest
import torch

from kvservice.compression.methods import METHODS, Dropping, Held, Seen
from kvservice.recall.held import highest

METHODS.discover("kvservice.methods")


def scorer(name, **params):
    return type(METHODS.get(name).scorer)(**params)


def seen(probs, num_after=0, num_answered=0, logits=None):
    """Attention `[q][t]` of one query head, of queries that come last."""
    probs = torch.tensor(probs)[None, None]
    count, width = probs.shape[2:]
    positions = torch.arange(width).unsqueeze(0)
    logits = probs.log() if logits is None else torch.tensor(logits)[None, None]
    return Seen(0, logits, probs, positions, width - count, num_after, num_answered)


def kept(method, limit, remembered=None, positions=range(12), slack=0, **more):
    """Positions that a row keeps."""
    positions = torch.tensor([list(positions)])
    numbers = {name: torch.tensor([each]) for name, each in (remembered or {}).items()}
    num_tokens = int(positions.max()) + 1
    more = {"token_ids": [0] * num_tokens, **more}
    held = Held(positions, num_tokens, limits=torch.tensor([limit]), num_kv_heads=1, remembered=numbers, **more)
    stays = highest(method.score(held), torch.tensor([limit - slack]))
    return sorted(positions[stays].tolist())


def observed(method, attention):
    width = attention.probs.shape[3]
    told = method.observe(attention, {name: torch.zeros(1, width) for name in method.remembers})
    return {name: numbers[0].tolist() for name, numbers in told.items()}


@pytest.mark.parametrize("surplus", [0, 1, 2, 7])
def test_the_highest_stay_and_of_equal_ones_the_earlier_slots(surplus):
    generator = torch.Generator().manual_seed(surplus)
    scores = torch.randint(0, 4, (6, 20), generator=generator).float()
    scores[:, 3], scores[0, :18] = -torch.inf, torch.inf
    limits = (scores > -torch.inf).sum(1) - surplus
    for row, limit, stays in zip(scores, limits, highest(scores, limits), strict=True):
        order = sorted((-float(score), slot) for slot, score in enumerate(row) if score > -torch.inf)
        assert stays.nonzero()[:, 0].tolist() == sorted(slot for _, slot in order[:limit])


FOUR = [[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.1, 0.4, 0.4]]
"""Four queries, each of which sees the tokens up to its own."""


def test_streaming_llm_keeps_sinks_and_window_and_counts_places_among_them():
    assert kept(scorer("streaming_llm", sinks=2), 6) == [0, 1, 8, 9, 10, 11]
    places = METHODS.get("streaming_llm").positions.places(torch.tensor([[9, 0, 8, -1, 1]]))
    assert places[0, [0, 1, 2, 4]].tolist() == [3, 0, 2, 1]


def test_h2o_keeps_half_by_the_sum_of_attention_and_half_that_is_recent():
    method = scorer("h2o")
    told = observed(method, seen(FOUR))
    assert told["mass"] == pytest.approx([1.8, 0.9, 0.9, 0.4])
    assert kept(method, 2, told, range(4)) == [0, 3]
    assert kept(method, 2, {"mass": [0.1, 1.8, 0.9, 0.4]}, range(4)) == [1, 3]


def test_scissorhands_counts_how_often_a_token_got_less_than_its_part():
    method = scorer("scissorhands", window=2, recent=1)
    attention = seen([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.5, 0.2, 0.3, 0], [0.4, 0.1, 0.3, 0.2]])
    told = observed(method, attention)
    assert told["low"] == [0, 2, 1, 1]  # Below 1/3, then below 1/4; the first two queries are too long ago.
    assert method.slack(4) == 2
    assert kept(method, 4, told, range(4), slack=2) == [0, 3]


def test_scissorhands_counts_the_queries_just_before_tokens_are_dropped():
    method = scorer("scissorhands", window=2)
    low = [[0.9, 0.1, 0, 0], [0.5, 0.2, 0.3, 0], [0.4, 0.1, 0.3, 0.2]]
    assert observed(method, seen(low, num_after=1))["low"] == [0, 1, 0, 1]
    assert observed(method, seen(low, num_after=2))["low"] == [0, 0, 0, 0]


def test_l2_norm_keeps_the_shortest_keys():
    keys = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [1.2, 1.6]]])
    told = {name: numbers[0].tolist() for name, numbers in scorer("l2_norm").meet(keys).items()}
    assert told["norm"] == pytest.approx([3, 1, 2])
    assert kept(scorer("l2_norm"), 2, told, range(3)) == [1, 2]


def test_keyformer_divides_by_a_temperature_that_rises_with_the_answer():
    method = scorer("keyformer", noise=0.0, temperature=1.0, rise=0.1)
    logits = [[2 * math.log(1), 2 * math.log(3)]]
    assert observed(method, seen([[0.1, 0.9]], logits=logits))["mass"] == pytest.approx([0.1, 0.9])
    assert observed(method, seen([[0.1, 0.9]], num_answered=10, logits=logits))["mass"] == pytest.approx([0.25, 0.75])


def test_keyformer_without_noise_at_temperature_one_is_h2o_bit_for_bit():
    logits = torch.randn(2, 3, 5, 40, generator=torch.Generator().manual_seed(0))
    attention = Seen(1, logits, logits.softmax(-1), torch.arange(40).expand(2, -1), 40, 0, 7)
    before = {"mass": torch.rand(2, 40)}
    plain = scorer("keyformer", noise=0.0, rise=0.0).observe(attention, before)
    assert torch.equal(plain["mass"], scorer("h2o").observe(attention, before)["mass"])


def test_keyformers_noise_is_gumbels_and_follows_from_seed_and_places():
    logits = torch.zeros(2, 2, 64, 500)
    attention = Seen(1, logits, logits.softmax(-1), torch.arange(500).expand(2, -1), 500, 0, 0)
    noise = scorer("keyformer", seed=3)._gumbel(attention)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)
    assert abs(float(torch.corrcoef(noise[0, 0, :2])[0, 1])) < 0.15
    assert not torch.equal(noise, scorer("keyformer", seed=4)._gumbel(attention))
    turned = Seen(1, logits, attention.probs, attention.positions.flip(1), 500, 0, 0)
    assert torch.equal(scorer("keyformer", seed=3)._gumbel(turned), noise.flip(3))


def test_sepllm_keeps_the_latest_separators_between_sinks_and_window():
    method = scorer("sepllm", sinks=1, recent_share=0.25, separator_share=1 / 6)
    ids = [7, 1, 1, 9, 1, 8, 1, 1, 9, 1, 1, 9]
    assert method.slack(12) == 6
    assert kept(method, 12, token_ids=ids, separators=frozenset({8, 9}), slack=6) == [0, 5, 8, 9, 10, 11]
    assert kept(method, 12, token_ids=ids, slack=6) == [0, 9, 10, 11]


def test_chunkkv_keeps_whole_chunks_by_their_mean():
    method = scorer("chunkkv", chunk=2, window=2)
    # Chunks of mean 0.45, 0.5, 0.1: the best token is in none of the best.
    assert kept(method, 8, {"mass": [0.0, 0.9, 0.5, 0.5, 0.1, 0.1, 0.0, 0.0]}, range(8), slack=4) == [2, 3, 6, 7]


def test_chunkkv_lets_a_layer_keep_what_the_one_before_it_chose():
    method = scorer("chunkkv", chunk=2, window=2)
    mass = torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1.0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1.0, 1, 0, 0]])
    held = Held(torch.arange(8).expand(3, -1), 8, [0] * 8, torch.tensor([8] * 3), 1, {"mass": mass})
    stays = highest(method.score(held), torch.tensor([4] * 3))
    assert [row.nonzero()[:, 0].tolist() for row in stays] == [[0, 1, 6, 7], [0, 1, 6, 7], [4, 5, 6, 7]]


def test_cascading_kv_takes_every_second_token_into_the_second_cascade():
    method = scorer("cascading_kv", cascades=2, sinks_share=0.0)
    held, seen_so_far = [0, 1, 2, 3], []
    for number in range(4, 8):
        held = kept(method, 4, {"attention": [0.5] * 5}, [*held, number])
        seen_so_far.append(held)
    assert seen_so_far == [[1, 2, 3, 4], [1, 3, 4, 5], [3, 4, 5, 6], [3, 5, 6, 7]]


def test_cascading_kv_keeps_the_one_of_more_attention_where_a_cascade_takes_none():
    method = scorer("cascading_kv", cascades=2, sinks_share=0.0)
    assert kept(method, 4, {"attention": [0.1, 0.9, 0.2, 0.1, 0.1]}, range(1, 6)) == [1, 2, 4, 5]


def test_cascading_kv_drops_many_at_once_as_one_after_the_other():
    method = scorer("cascading_kv", cascades=4, sinks_share=0.125)
    attention = torch.rand(100, generator=torch.Generator().manual_seed(1)).tolist()
    one_by_one = list(range(32))
    for number in range(32, 60):
        now = [*one_by_one, number]
        one_by_one = kept(method, 32, {"attention": [attention[each] for each in now]}, now)
    assert kept(method, 32, {"attention": attention[:60]}, range(60)) == one_by_one


def test_cascading_kv_reaches_back_by_powers_of_two():
    method = scorer("cascading_kv", cascades=4, sinks_share=0.0)
    spread = kept(method, 64, {"attention": [0.0] * 1000}, range(1000))
    gaps = torch.tensor(spread).diff().flip(0).float()
    assert [round(float(gaps[start + 2 : start + 14].mean())) for start in (0, 16, 32, 48)] == [1, 2, 4, 8]


def test_d2o_gives_more_blocks_to_the_layer_that_attends_evenly():
    mass = torch.tensor([[0.25] * 64, [10.0] + [0.0] * 63])
    positions = torch.arange(64).expand(2, -1)
    held = Held(positions, 64, [0] * 64, torch.tensor([32, 32]), 1, {"mass": mass})
    blocks = METHODS.get("d2o").allocator.allocate(held, 4)
    assert blocks.tolist() == [3, 1]  # softmax(0, -1) = 0.73, 0.27 of four


def test_d2o_merges_what_is_alike_and_drops_what_isnt():
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [-1.0, 0.1]]])
    values = torch.tensor([[[1.0, 1.0], [5.0, 5.0], [3.0, 3.0], [9.0, 9.0]]])
    stays, goes = torch.tensor([[True, True, False, False]]), torch.tensor([[False, False, True, True]])
    merger = METHODS.get("d2o").merger
    new_keys, new_values, threshold = merger.absorb(Dropping(keys, values, stays, goes), None)
    # Token 2 lies as token 0 does (cosine 1); token 3 is nearest to token 1 (0.0995), below their mean.
    assert threshold == pytest.approx((1 + 0.1 / math.hypot(1, 0.1)) / 2)
    assert new_keys[0, :2].tolist() == [[1.5, 0.0], [0.0, 1.0]]
    assert new_values[0, :2].tolist() == [[2.0, 2.0], [5.0, 5.0]]
    _, _, later = merger.absorb(Dropping(keys, values, stays, goes), 0.9)
    assert later == pytest.approx((0.9 + threshold) / 2)
