import json
from dataclasses import asdict, replace

import pytest
import torch

from kvservice.config.recipes import DENSE, EXACT, RECALL
from kvservice.errors import PromptTooLong
from kvservice.evaluation.quality import controls, distances, measure_text, summarize, tokens_needed

FP32_KL = 1e-6
CONTEXT, NEW = 700, 40
SMALL_RECALL = replace(RECALL, window_tokens=64, recalled_tokens=32)


def figures(engine, recipe, text, **more):
    result = measure_text(engine, recipe, "text", text, CONTEXT)
    return summarize([result], recipe, engine.info.shape.kv_bytes_per_token, **{"bootstrap_seed": None, **more})


def test_distances_are_those_of_the_formulas() -> None:
    dense, other = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    measured = distances(dense, other, torch.tensor([2]))
    p, q = dense.softmax(-1)[0], other.softmax(-1)[0]
    assert measured.kl.item() == pytest.approx(float((p * (p / q).log()).sum()))
    assert measured.agrees.tolist() == [False]
    assert measured.nll.item() == pytest.approx(float(-q[2].log()))


def test_exact_is_at_no_distance_from_dense(engine, text) -> None:
    result = figures(engine, EXACT, text)
    assert result.kl_mean < FP32_KL
    assert result.top1_agreement == 1.0
    assert result.nll == pytest.approx(result.nll_dense, abs=1e-4)


def test_recall_lies_between_oracle_and_random(engine, text) -> None:
    result = figures(engine, SMALL_RECALL, text)
    assert 0 < result.oracle_kl_mean < result.random_kl_mean
    assert result.kl_mean < result.random_kl_mean


def test_the_oracle_with_a_budget_of_all_tokens_is_dense(engine, text) -> None:
    oracle, random = controls(replace(RECALL, recalled_tokens=1024), dtype_bytes=4)
    assert figures(engine, oracle, text).kl_mean < FP32_KL
    assert figures(engine, random, text).kl_mean < FP32_KL


def test_controls_have_the_window_and_the_budget_of_the_recipe() -> None:
    oracle, random = controls(SMALL_RECALL, dtype_bytes=4)
    assert (oracle.window_tokens, oracle.recalled_tokens, oracle.index_bits) == (64, 32, 32)
    assert (random.window_tokens, random.recalled_tokens) == (64, 32)


def test_dense_is_measured_against_itself(engine, text) -> None:
    result = figures(engine, DENSE, text)
    assert result.kl_mean == 0.0
    assert result.distant_bytes_saved_fraction == 0.0
    assert result.device_kv_bytes >= result.dense_kv_bytes


def test_bytes_are_those_of_the_session_at_the_end_of_the_text(engine, text) -> None:
    shape = engine.info.shape
    result = figures(engine, SMALL_RECALL, text)
    assert result.dense_kv_bytes == (CONTEXT + NEW) * shape.kv_bytes_per_token
    assert result.host_kv_bytes == SMALL_RECALL.distant_groups(CONTEXT + NEW) * 64 * shape.kv_bytes_per_token
    assert result.distant_bytes_saved_fraction == 0.0


def test_figures_can_be_written_as_json(engine, text) -> None:
    written = json.loads(json.dumps(asdict(figures(engine, SMALL_RECALL, text, bootstrap_seed=1))))
    low, high = written["kl_interval"]
    assert low <= written["kl_mean"] <= high
    assert written["num_tokens"] == NEW
    assert written["texts"][0]["name"] == "text"


def test_every_computed_token_is_reported(engine, text) -> None:
    reported: list[int] = []
    measure_text(engine, SMALL_RECALL, "text", text, CONTEXT, reported.append)
    assert sum(reported) == 4 * (tokens_needed(CONTEXT, NEW) - 1)


def test_a_text_longer_than_the_model_is_refused_and_leaves_nothing(engine) -> None:
    with pytest.raises(PromptTooLong):
        measure_text(engine, RECALL, "text", [5] * 2200, 2100)
