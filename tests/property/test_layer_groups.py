"""Layer groups are partitions into runs whatever the similarities, and what they save is what isn't stored."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.compression.layer_groups import (
    LayerGroups,
    Linkage,
    Per,
    Similarity,
    delta_for_saving,
    group_layers,
    random_groups,
    uniform_groups,
)

LEVELS = 20
"""Similarities and deltas are drawn from few values, so that they often meet."""

BYTES_TOLERANCE = 1e-12


@st.composite
def similarities(draw: st.DrawFn) -> Similarity:
    num_kv_heads, num_layers = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    level = st.integers(0, LEVELS).map(lambda value: value / LEVELS)
    matrices = []
    for _ in range(num_kv_heads):
        matrix = [[1.0] * num_layers for _ in range(num_layers)]
        for high in range(num_layers):
            for low in range(high):
                matrix[low][high] = matrix[high][low] = draw(level)
        matrices.append(tuple(map(tuple, matrix)))
    return tuple(matrices)


deltas = st.integers(0, LEVELS).map(lambda value: value / LEVELS)
linkages = st.sampled_from(Linkage)
pers = st.sampled_from(Per)


def assert_runs(groups: LayerGroups, num_kv_heads: int, num_layers: int) -> None:
    """Spelled out anew, apart from the checks that LayerGroups makes."""
    assert len(groups.runs) == num_kv_heads
    for runs in groups.runs:
        assert [layer for run in runs for layer in run] == list(range(num_layers))
        assert all(runs)


@given(similarities(), deltas, linkages, pers)
def test_groups_are_a_partition_into_runs_of_consecutive_layers(
    similarity: Similarity, delta: float, linkage: Linkage, per: Per
) -> None:
    groups = group_layers(similarity, delta, linkage, per)
    assert_runs(groups, len(similarity), len(similarity[0]))
    assert LayerGroups.of_runs(groups.runs) == groups
    assert groups.num_groups == sum(len(runs) for runs in groups.runs)
    assert groups.is_per_layer or per is Per.KV_HEAD


@given(similarities(), deltas, linkages)
def test_a_group_holds_what_is_similar_enough_and_ends_where_that_ends(
    similarity: Similarity, delta: float, linkage: Linkage
) -> None:
    for matrix, runs in zip(similarity, group_layers(similarity, delta, linkage).runs, strict=True):
        for run in runs:
            others = run[:1] if linkage is Linkage.ANCHOR else run
            assert all(matrix[other][layer] >= delta for layer in run for other in others)
            following = run[-1] + 1
            if following < len(matrix):
                assert any(matrix[other][following] < delta for other in others)


@given(similarities(), linkages, pers)
def test_above_1_every_cell_is_its_own_group(similarity: Similarity, linkage: Linkage, per: Per) -> None:
    groups = group_layers(similarity, 1.0001, linkage, per)
    assert groups.num_groups == groups.num_cells
    assert groups.saved_fraction() == 0.0
    assert all(groups.stores_distant_key(layer, 0) for layer in range(groups.num_layers))


@given(similarities(), linkages, pers)
def test_at_0_all_layers_are_one_group(similarity: Similarity, linkage: Linkage, per: Per) -> None:
    groups = group_layers(similarity, 0.0, linkage, per)
    assert groups.num_groups == len(similarity)


@given(similarities(), deltas, deltas, pers)
def test_a_higher_delta_never_gives_fewer_groups_with_complete_linkage(
    similarity: Similarity, one: float, other: float, per: Per
) -> None:
    low, high = sorted((one, other))
    few = group_layers(similarity, low, Linkage.COMPLETE, per)
    many = group_layers(similarity, high, Linkage.COMPLETE, per)
    assert few.num_groups <= many.num_groups


@given(similarities(), deltas, deltas, linkages)
def test_a_higher_delta_never_makes_the_lowest_group_longer(
    similarity: Similarity, one: float, other: float, linkage: Linkage
) -> None:
    low, high = sorted((one, other))
    for longer, shorter in zip(
        group_layers(similarity, low, linkage).runs, group_layers(similarity, high, linkage).runs, strict=True
    ):
        assert len(shorter[0]) <= len(longer[0])


@given(similarities(), st.floats(0, 0.5), linkages, pers)
def test_the_delta_of_a_saving_is_the_highest_that_reaches_it(
    similarity: Similarity, share: float, linkage: Linkage, per: Per
) -> None:
    num_layers = len(similarity[0])
    wanted = share * (1 - 1 / num_layers)
    delta = delta_for_saving(similarity, wanted, linkage, per)
    assert group_layers(similarity, delta, linkage, per).saved_fraction() >= wanted
    # Means over KV heads lie between the levels.
    tried = [level / LEVELS / 4 for level in range(4 * LEVELS + 1)] + [delta + 1e-9, 1.1]
    for higher in (value for value in tried if delta < value < 2):
        assert group_layers(similarity, higher, linkage, per).saved_fraction() < wanted


@given(similarities(), deltas, linkages, st.integers(0, 5), st.integers(0, 7), st.integers(1, 64))
def test_what_is_saved_is_what_no_cell_stores(
    similarity: Similarity, delta: float, linkage: Linkage, distant: int, proximal: int, head_bytes: int
) -> None:
    if distant + proximal == 0:
        return
    groups = group_layers(similarity, delta, linkage)
    stored = shared = 0
    for layer in range(groups.num_layers):
        for kv_head in range(groups.num_kv_heads):
            keys = distant if groups.stores_distant_key(layer, kv_head) else 0
            shared += distant - keys
            stored += (proximal + keys) * head_bytes + (proximal + distant) * head_bytes
    dense = 2 * groups.num_cells * (distant + proximal) * head_bytes
    saved = groups.saved_fraction(distant / (distant + proximal))
    assert saved == pytest.approx(1 - stored / dense, abs=BYTES_TOLERANCE)
    assert groups.shared_fraction * groups.num_cells * distant == pytest.approx(shared)


@given(st.integers(1, 5), st.integers(1, 12), st.data())
def test_baselines_have_as_many_groups_as_they_are_asked_for(
    num_kv_heads: int, num_layers: int, data: st.DataObject
) -> None:
    num_groups = data.draw(st.integers(num_kv_heads, num_kv_heads * num_layers))
    seed = data.draw(st.integers(0, 99))
    for groups in (
        uniform_groups(num_layers, num_kv_heads, num_groups),
        random_groups(num_layers, num_kv_heads, num_groups, seed),
    ):
        assert_runs(groups, num_kv_heads, num_layers)
        assert groups.num_groups == num_groups
    lengths = [len(run) for runs in uniform_groups(num_layers, num_kv_heads, num_groups).runs[:1] for run in runs]
    assert max(lengths) - min(lengths) <= 1
