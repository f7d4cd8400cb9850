"""What calibration measures on a tiny model, beside all its attention computed at once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvservice.compression.layer_groups import Linkage, Per, group_layers
from kvservice.compression.sharing_map import CalibrationText, Measurement
from kvservice.demo.document import shipped_text
from kvservice.errors import ConfigError
from kvservice.evaluation import calibration
from kvservice.evaluation.calibration import (
    Choice,
    LayerFigures,
    TextAttention,
    distant_range,
    make_map,
    measure_text,
    steps_per_text,
    summarize,
)
from kvservice.evaluation.layer_similarity import pairwise_js
from kvservice.models.llama import LlamaModel
from kvservice.models.loader import read_model
from kvservice.models.sharing import model_facts
from kvservice.models.tiny import tiny_model
from kvservice.models.tokenizer import Tokenizer
from kvservice.types import PromptFormat, TextRole

CONTEXT, QUERIES, LAYERS = 420, 10, 3
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def model() -> LlamaModel:
    return tiny_model(num_layers=LAYERS)


def token_ids(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(256) for _ in range(CONTEXT)]


class WholeAttention:
    """Every probability of every layer: what calibration never holds."""

    def __init__(self) -> None:
        self.p: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(heads, 1).transpose(0, 1) for x in (k, v))
        scores = q.transpose(0, 1) @ keys.transpose(1, 2) / q.shape[-1] ** 0.5
        p = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        self.p.append(p)
        return (p @ values).transpose(0, 1)


@pytest.mark.parametrize("compared_bytes", [15_000, calibration.COMPARED_BYTES])
def test_figures_are_those_of_the_whole_attention(model: LlamaModel, monkeypatch, compared_bytes: int) -> None:
    monkeypatch.setattr(calibration, "COMPARED_BYTES", compared_bytes)
    text = measure_text(model, token_ids(1), QUERIES)
    whole = WholeAttention()
    model.forward(model.embed(torch.tensor(token_ids(1))), torch.arange(CONTEXT), whole)
    # [l, kv, g, q, t]
    p = torch.stack(whole.p).unflatten(1, (2, 2))[..., -QUERIES:, :]
    far = p[..., distant_range(CONTEXT, QUERIES)]
    mass = far.sum(-1)
    torch.testing.assert_close(text.mass, mass.mean((2, 3)).T, atol=ROUNDING, rtol=0)
    for kv_head in range(2):
        normed = (far / mass.unsqueeze(-1))[:, kv_head].flatten(1, 2)
        js = pairwise_js(normed)
        torch.testing.assert_close(text.js[kv_head], js.mean(-1), atol=ROUNDING, rtol=0)
        heads_mass = mass[:, kv_head].flatten(1)
        weights = (heads_mass.unsqueeze(0) + heads_mass.unsqueeze(1)) / 2
        torch.testing.assert_close(text.mass_js[kv_head], (js * weights).mean(-1), atol=ROUNDING, rtol=0)


def test_progress_comes_to_what_was_promised(model: LlamaModel) -> None:
    done: list[int] = []
    measure_text(model, token_ids(1), QUERIES, done.append)
    assert sum(done) == steps_per_text(model) == LAYERS + 2


def test_texts_weigh_the_same_and_figures_are_shares(model: LlamaModel) -> None:
    texts = [measure_text(model, token_ids(seed), QUERIES) for seed in (1, 2)]
    figures = summarize(texts)
    expected = 1 - (texts[0].js + texts[1].js) / 2
    torch.testing.assert_close(torch.tensor(figures.similarity), expected, atol=1e-5, rtol=0)
    for matrix in (*figures.similarity, *figures.mass_similarity):
        assert all(matrix[layer][layer] == 1.0 for layer in range(LAYERS))
        assert all(0 <= value <= 1 for row in matrix for value in row)
        assert matrix == tuple(zip(*matrix, strict=True))


def test_sums_that_differ_in_the_last_bit_give_symmetric_figures() -> None:
    # On both sides of where the sixth digit is rounded.
    js = torch.tensor([[[0.0, 0.1234564], [0.1234566, 0.0]]])
    figures = summarize([TextAttention(js, js.mT.contiguous(), torch.ones(1, 2))])
    assert figures.similarity == (((1.0, 0.876544), (0.876544, 1.0)),)
    assert figures.mass_similarity == (((1.0, 0.876543), (0.876543, 1.0)),)


def test_the_distant_part_is_what_every_query_finds_outside_its_window() -> None:
    assert distant_range(2048, 64) == slice(16, 16 + 26 * 64)
    assert distant_range(16 + 64 + 256 + 8, 8) == slice(16, 80)


def test_a_text_without_a_distant_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="344 are the least"):
        distant_range(343, 8)


FIGURES = LayerFigures(
    similarity=(
        ((1.0, 0.6, 0.2), (0.6, 1.0, 0.2), (0.2, 0.2, 1.0)),
        ((1.0, 0.4, 0.2), (0.4, 1.0, 0.8), (0.2, 0.8, 1.0)),
    ),
    mass_similarity=(((1.0,) * 3,) * 3,) * 2,
    distant_mass=((0.5,) * 3,) * 2,
)
MEASUREMENT = Measurement(
    texts=(CalibrationText(name="a.txt", sha256="00", first_token=0),),
    context_tokens=2048,
    queries=64,
    sink_tokens=16,
    distant_tokens=1664,
    dtype="fp32",
    seed=7,
)


@pytest.mark.parametrize(
    ("choice", "delta", "runs"),
    [
        (Choice(delta=0.5), 0.5, (((0, 1), (2,)), ((0,), (1, 2)))),
        (Choice(delta=None, save_fraction=0.05), 0.8, (((0,), (1,), (2,)), ((0,), (1, 2)))),
        (Choice(delta=0.5, per=Per.LAYER), 0.5, (((0, 1), (2,)), ((0, 1), (2,)))),
        (Choice(delta=0.2, linkage=Linkage.COMPLETE), 0.2, (((0, 1, 2),), ((0, 1, 2),))),
        (Choice(delta=0.9, mass_weighted=True), 0.9, (((0, 1, 2),), ((0, 1, 2),))),
    ],
)
def test_a_map_has_the_groups_that_were_asked_for(
    model: LlamaModel, choice: Choice, delta: float, runs: object
) -> None:
    made = make_map(model_facts(model.spec), MEASUREMENT, FIGURES, choice)
    assert made.grouping.delta == delta
    assert made.layer_groups.runs == runs
    assert made.grouping.save_fraction == choice.save_fraction


@pytest.mark.real_model
def test_layers_3_to_10_of_the_real_model_attend_alike_and_hardly_others(real_model_folder: Path) -> None:
    text = shipped_text()
    tokens = Tokenizer.load(real_model_folder).encode(text, TextRole.DOCUMENT, PromptFormat.RAW, first=True)[:1024]
    model = LlamaModel(*read_model(real_model_folder, torch.bfloat16), torch.device("cpu"))
    figures = summarize([measure_text(model, tokens, 16)])
    runs = group_layers(figures.similarity, 0.65, per=Per.LAYER).runs[0]
    assert [run for run in runs if len(run) > 1] == [tuple(range(3, 11))]
