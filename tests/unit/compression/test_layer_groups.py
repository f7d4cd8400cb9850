"""Layer groups on examples that can be followed by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from kvservice.compression.layer_groups import (
    LayerGroups,
    Linkage,
    Per,
    Similarity,
    delta_for_saving,
    for_kv_heads,
    group_layers,
    random_groups,
    uniform_groups,
)
from kvservice.errors import ConfigError


def symmetric(*upper: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """A matrix from the rows above its diagonal."""
    size = len(upper) + 1
    matrix = [[1.0] * size for _ in range(size)]
    for low, row in enumerate(upper):
        for offset, value in enumerate(row, start=1):
            matrix[low][low + offset] = matrix[low + offset][low] = value
    return tuple(map(tuple, matrix))


CHAIN = symmetric((0.9, 0.6, 0.2), (0.4, 0.3), (0.7,))
"""Layer 2 is like layer 0, not like layer 1; layer 3 is like layer 2 only."""


def test_anchor_linkage_asks_the_lowest_layer_only() -> None:
    assert group_layers((CHAIN,), 0.5).runs == (((0, 1, 2), (3,)),)


def test_complete_linkage_asks_all_layers_of_the_group() -> None:
    assert group_layers((CHAIN,), 0.5, Linkage.COMPLETE).runs == (((0, 1), (2, 3)),)


def test_a_similarity_equal_to_delta_is_enough() -> None:
    assert group_layers((CHAIN,), 0.9).runs == (((0, 1), (2,), (3,)),)


def test_with_anchor_linkage_a_higher_delta_may_save_more() -> None:
    matrix = symmetric((0.5, 0.1, 0.1), (0.9, 0.9), (0.1,))
    assert group_layers((matrix,), 0.5).runs == (((0, 1), (2,), (3,)),)
    assert group_layers((matrix,), 0.6).runs == (((0,), (1, 2, 3)),)


def test_per_layer_groups_follow_the_mean_over_kv_heads() -> None:
    similarity: Similarity = (symmetric((0.9, 0.1), (0.8,)), symmetric((0.3, 0.1), (0.0,)))
    assert group_layers(similarity, 0.5).runs == (((0, 1), (2,)), ((0,), (1,), (2,)))
    per_layer = group_layers(similarity, 0.5, per=Per.LAYER)
    assert per_layer.runs == (((0, 1), (2,)), ((0, 1), (2,)))
    assert per_layer.is_per_layer


def test_anchors_say_whose_keys_a_cell_uses() -> None:
    groups = LayerGroups(((0, 0, 2), (0, 1, 1)))
    assert [groups.anchor(layer, 0) for layer in range(3)] == [0, 0, 2]
    assert [groups.stores_distant_key(layer, 1) for layer in range(3)] == [True, True, False]
    assert (groups.num_groups, groups.num_cells) == (4, 6)


def test_the_papers_saving_needs_four_cells_of_five_to_share() -> None:
    groups = uniform_groups(num_layers=30, num_kv_heads=3, num_groups=18)
    assert groups.shared_fraction == pytest.approx(0.8)
    assert groups.saved_fraction(28 / 32) == pytest.approx(0.35)


def test_the_digest_tells_groups_apart() -> None:
    assert LayerGroups(((0, 0, 2),)).digest == LayerGroups.of_runs((((0, 1), (2,)),)).digest
    assert LayerGroups(((0, 0, 2),)).digest != LayerGroups(((0, 1, 1),)).digest


@pytest.mark.parametrize(
    ("anchors", "why"),
    [
        ((), "no layers"),
        (((),), "no layers"),
        (((1, 1),), "layer 0 has the anchor 1"),
        (((0, 1, 0),), "layer 2 has the anchor 0"),
        (((0, 2, 2),), "layer 1 has the anchor 2"),
        (((0, 0), (0,)), "KV head 1 has 1 layers"),
    ],
)
def test_anchors_that_make_no_runs_are_refused(anchors: tuple[tuple[int, ...], ...], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        LayerGroups(anchors)


@pytest.mark.parametrize("runs", [((0, 2), (1,)), ((0,), (2,)), ((0, 1), (1, 2)), ((1, 2),), ((0,), (), (1,))])
def test_runs_that_are_no_partition_are_refused(runs: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ConfigError, match="each layer from 0 on must come once"):
        LayerGroups.of_runs((runs,))


def test_a_saving_is_found_by_the_highest_delta_that_reaches_it() -> None:
    assert delta_for_saving((CHAIN,), 0.1) == 0.9
    assert delta_for_saving((CHAIN,), 0.25) == 0.7
    assert delta_for_saving((CHAIN,), 0.375) == 0.2
    assert delta_for_saving((CHAIN,), 0.25, per=Per.LAYER) == 0.7
    assert delta_for_saving((CHAIN,), 0.0) > 1


def test_more_than_one_group_a_head_can_save_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"saves 0\.375"):
        delta_for_saving((CHAIN,), 0.4)


def test_random_groups_depend_on_the_seed_alone_and_reach_every_partition() -> None:
    assert random_groups(6, 2, 5, seed=3) == random_groups(6, 2, 5, seed=3)
    seen = Counter(random_groups(3, 2, 4, seed).runs for seed in range(400))
    # Two of the four places where a group may begin: six partitions.
    assert len(seen) == 6
    assert min(seen.values()) > 30


def test_groups_of_one_head_can_be_given_to_all() -> None:
    groups = for_kv_heads(random_groups(6, 1, 3, seed=1), 4)
    assert groups.num_groups == 12
    assert groups.is_per_layer


@pytest.mark.parametrize("num_groups", [1, 7])
def test_a_number_of_groups_that_cannot_be_is_refused(num_groups: int) -> None:
    with pytest.raises(ConfigError, match="make 2 to 6 groups"):
        uniform_groups(3, 2, num_groups)
