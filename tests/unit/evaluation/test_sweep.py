from dataclasses import replace

import pytest

from kvservice.config.recipes import CLUSTERKV, RECALL
from kvservice.errors import InvalidRequest
from kvservice.evaluation.sweep import COMPARED, measure_text, summarize, with_budgets

CONTEXT, NEW = 700, 12
FP32_KL = 1e-6


def small(name, budget):
    (spec,) = with_budgets([name], [budget], dtype_bytes=4)
    return replace(spec, window_tokens=64)


def test_every_recipe_that_recalls_is_compared_and_all_share_one_window() -> None:
    assert {"recall", "clusterkv", "recall-quest", "recall-paged", "recall-oracle", "recall-random"} <= set(COMPARED)
    specs = with_budgets(COMPARED, [32, 64], dtype_bytes=4)
    assert len(specs) == 2 * len(COMPARED)
    assert {spec.window_tokens for spec in specs} == {RECALL.window_tokens}
    assert {spec.recalled_tokens for spec in specs} == {32, 64}
    assert {spec.index_bits for spec in specs if spec.name == "recall-oracle"} == {32}


@pytest.mark.parametrize(("name", "budget"), [("recall", 40), ("recall", 0), ("recall", 2048), ("dense", 64)])
def test_what_can_t_be_compared_is_refused(name, budget) -> None:
    with pytest.raises(InvalidRequest):
        with_budgets([name], [budget], dtype_bytes=4)


def test_all_choose_among_the_same_tokens_so_that_with_a_budget_of_all_each_is_dense(engine, text) -> None:
    specs = [small(name, 1024) for name in COMPARED]
    for spec, measured in zip(specs, measure_text(engine, specs, text[: CONTEXT + NEW + 1], CONTEXT), strict=True):
        row = summarize(spec, [measured], bootstrap_seed=None)
        assert row.kl_mean < FP32_KL, spec.name
        assert row.top1_agreement == 1.0


def test_the_figures_are_of_the_forced_tokens(engine, text) -> None:
    shape = engine.info.shape
    specs = [small(name, 32) for name in ("recall", "recall-paged", "clusterkv", "recall-random")]
    reported: list[int] = []
    tokens = text[: CONTEXT + NEW + 1]
    rows = {
        spec.name: summarize(spec, [measured], bootstrap_seed=1)
        for spec, measured in zip(specs, measure_text(engine, specs, tokens, CONTEXT, reported.append), strict=True)
    }
    assert sum(reported) == (1 + len(specs)) * (CONTEXT + NEW)
    row_bytes = 2 * shape.head_dim * shape.dtype_bytes
    all_bytes = 32 * shape.num_layers * shape.num_kv_heads * row_bytes
    for row in rows.values():
        assert row.recalled_bytes_per_token == pytest.approx((1 - row.hit_rate) * all_bytes)
        low, high = row.kl_interval
        assert low <= row.kl_mean <= high
    assert rows["recall"].scanned_fraction is None
    assert 0 < rows["recall-paged"].scanned_fraction <= 1
    assert rows["clusterkv"].streamed_bytes_per_token > rows["recall"].streamed_bytes_per_token == 0
    assert 0 < rows["clusterkv"].index_bytes < rows["recall"].index_bytes
    assert rows["recall"].kl_mean < rows["recall-random"].kl_mean


def test_the_served_recipe_of_clusters_is_the_one_that_is_compared() -> None:
    assert small("clusterkv", 512) == replace(CLUSTERKV, window_tokens=64)
