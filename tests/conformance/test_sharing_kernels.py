"""Keys that layers share, attended to by the CPU kernels on every instruction set, against torch.

What torch does for an engine is held against the slow reference in `tests.unit.engine.test_sharing`. Kernels round
queries to choose by, so where not all is recalled they may choose another token at the edge.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvservice.attention.batch import BatchAttention
from kvservice.compression.sharing import SharingMode
from kvservice.config.recipes import EXACT, POD, POD_EXACT, RECALL
from kvservice.kernels import cpu
from kvservice.models.cpu_llama import CpuLlama
from kvservice.models.families.llama import LLAMA
from kvservice.models.llama import LlamaModel
from kvservice.models.tiny import InMemory, tiny_spec, tiny_tensors
from kvservice.types import SessionId
from tests.conformance.test_kernels import isa, pytestmark  # noqa: F401
from tests.unit.engine.driving import Drive, answering, tokens
from tests.unit.engine.test_sharing import ALONE, MIXED, ODD, RECIPES, SMALL, WHOLE, make_engine, read, scores

FP32_LOGITS = 1e-3
# Recalls all that is distant, so that rounding can't show in what is chosen.
ALL = replace(SMALL[1], recalled_tokens=320)
EXACTLY = [SMALL[0], ALL]
# Wide enough heads for the matrix units, and three query heads to a key head.
SIZES = {"num_layers": 4, "num_heads": 6, "num_kv_heads": 2, "head_dim": 32}


def weights_of(dtype):
    spec = tiny_spec(**SIZES, dtype=dtype)
    source = InMemory({name: tensor.to(dtype) for name, tensor in tiny_tensors(spec, 0).items()})
    return spec, LLAMA.weights(spec, source)


def native(dtype=torch.float32, *, deterministic=False):
    return CpuLlama(*weights_of(dtype), deterministic=deterministic)


def by_torch(dtype=torch.float32):
    return LlamaModel(*weights_of(dtype), torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def one_thread_of_torch():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def without_torch(monkeypatch):
    def refuse(*_args, **_more):
        raise AssertionError("attention was left to torch")

    monkeypatch.setattr(BatchAttention, "add_recalled", refuse)


def torch_scores(recipe, document, continuation, groups=MIXED, mode=SharingMode.SCORE, **more):
    return scores(make_engine(by_torch(), groups, mode, **more), recipe, document, continuation)


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("recipe", EXACTLY, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("mode", SharingMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("groups", [MIXED, WHOLE, ODD], ids=["mixed", "whole", "odd"])
def test_logits_equal_those_of_torch(recipe, mode, groups) -> None:
    document, continuation = tokens(280), tokens(70, seed=1)
    ours = scores(make_engine(native(), groups, mode), recipe, document, continuation)
    expected = torch_scores(recipe, document, continuation, groups, mode)
    torch.testing.assert_close(ours, expected, atol=FP32_LOGITS, rtol=FP32_LOGITS)


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("mode", SharingMode, ids=lambda mode: mode.value)
def test_followers_recall_what_their_anchors_chose(mode) -> None:
    document, continuation = tokens(280), tokens(10, seed=1)
    engine = make_engine(native(), MIXED, mode)
    ours = scores(engine, SMALL[1], document, continuation)
    resident = engine._sequences.get(SessionId("s")).slots().resident[:, :, 0]
    for layer in range(4):
        for head in range(2):
            assert torch.equal(resident[layer, head], resident[MIXED.anchor(layer, head), head])
    # Few tokens at the edge are other ones; nearly all are the same.
    expected = torch_scores(SMALL[1], document, continuation, MIXED, mode)
    unshared = torch_scores(SMALL[1], document, continuation, ALONE)
    assert (ours - expected).abs().mean() < 0.1 * (unshared - expected).abs().mean()


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("mode", SharingMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("recipe", EXACTLY, ids=lambda recipe: recipe.name)
def test_a_question_is_answered_as_torch_does(recipe, mode) -> None:
    """Its tokens come in one step, so that several queries recall at a time, or their window slides among them."""
    document, question = tokens(180), tokens(90, seed=1)
    answers = []
    for model in (native(), by_torch()):
        drive = Drive(make_engine(model, mode=mode))
        drive.ask("s", recipe, document=document)
        call = drive.submit("s", recipe, document, prompt=question, call="q", sampling=answering(4, logprobs=0))
        drive.run()
        answers.append(drive.answers[call, 0])
    for (ours, our_logprobs), (theirs, their_logprobs) in zip(*answers, strict=True):
        assert ours == theirs
        assert our_logprobs[0].logprob == pytest.approx(their_logprobs[0].logprob, abs=FP32_LOGITS)


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("shared", "plain"), [(POD_EXACT, EXACT), (POD, RECALL)], ids=["exact", "recall"])
def test_where_every_cell_is_its_own_anchor_nothing_changes_in_any_bit(dtype, shared, plain) -> None:
    document, continuation = tokens(700), tokens(5, seed=1)
    expected = scores(make_engine(native(dtype), None), plain, document, continuation)
    for mode in SharingMode:
        ours = scores(make_engine(native(dtype), ALONE, mode), shared, document, continuation)
        assert torch.equal(ours, expected)


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("recipe", EXACTLY, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("mode", SharingMode, ids=lambda mode: mode.value)
def test_rounding_costs_no_more_than_it_does_torch(recipe, mode) -> None:
    document, continuation = tokens(280), tokens(20, seed=1)
    expected = torch_scores(recipe, document, continuation, MIXED, mode)
    errors = [
        (scores(make_engine(model, MIXED, mode), recipe, document, continuation) - expected).abs().mean()
        for model in (native(torch.bfloat16), by_torch(torch.bfloat16))
    ]
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_no_bit_depends_on_how_a_document_was_cut_into_steps(recipe, dtype) -> None:
    document, continuation = tokens(500), tokens(5, seed=1)
    logits = [
        scores(make_engine(native(dtype, deterministic=True), step_tokens=step), recipe, document, continuation)
        for step in (64, 192, 512)
    ]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.usefixtures("without_torch")
def test_a_document_read_in_spans_of_layers_beside_answers_gives_the_same_bits() -> None:
    """Anchors' queries wait while other sequences go through the layers."""
    fixed = native(deterministic=True)
    prompt, document = tokens(5, 1), tokens(600, 2)
    drive = Drive(make_engine(fixed, max_decode_stretch=1.001))
    drive.submit("short", POD, document=tokens(400), prompt=prompt, sampling=answering(200))
    drive.until(lambda: bool(drive.answers))
    long = drive.ask("long", POD, document=document, prompt=prompt, call="late", sampling=answering(6))
    alone = Drive(make_engine(fixed)).ask("long", POD, document=document, prompt=prompt, sampling=answering(6))
    assert long.appended_tokens == alone.appended_tokens


@pytest.mark.parametrize("recipe", EXACTLY, ids=lambda recipe: recipe.name)
def test_rows_that_may_skip_distant_tokens_are_left_to_torch(recipe) -> None:
    document, continuation = tokens(180), tokens(12, seed=1)
    engine = make_engine(native(), skip_above=0.5)
    ours = scores(engine, recipe, document, continuation)
    expected = torch_scores(recipe, document, continuation, skip_above=0.5)
    torch.testing.assert_close(ours, expected, atol=FP32_LOGITS, rtol=FP32_LOGITS)
    counters = engine._sequences.get(SessionId("s")).counters
    assert 0 < counters.skipped < counters.gated


@pytest.mark.usefixtures("without_torch")
def test_followers_fetch_values_alone() -> None:
    fetched = {}
    for recipe in (RECALL, POD):
        engine = make_engine(native(), WHOLE)
        read(engine, recipe, tokens(700))
        engine.score(SessionId("s"), tokens(1, 1))
        fetched[recipe.name] = engine.telemetry(SessionId("s")).recalled_bytes
    assert fetched["pod"] == 0.75 * fetched["recall"]
    again = engine.telemetry(SessionId("s"))
    assert (again.recall_hits, again.recall_lookups) == (0, 4 * 2 * POD.recalled_tokens)


@pytest.mark.usefixtures("without_torch")
def test_a_window_that_begins_short_is_attended_to_as_it_is() -> None:
    """Taken back to where keys were dropped, a sequence computes its window again, and goes on."""
    document = tokens(900)
    drive = Drive(make_engine(native()))
    drive.ask("s", POD_EXACT, document=document)
    finished = drive.ask("s", POD_EXACT, document[:500], prompt=tokens(5, 1), call="c", sampling=answering(5))
    torch_drive = Drive(make_engine(by_torch()))
    torch_drive.ask("s", POD_EXACT, document=document)
    expected = torch_drive.ask("s", POD_EXACT, document[:500], prompt=tokens(5, 1), call="c", sampling=answering(5))
    assert finished.usage.recomputed_tokens == expected.usage.recomputed_tokens > 0
    assert finished.appended_tokens == expected.appended_tokens


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"until_slide": 0}, "until_slide=0"),
        ({"cells": torch.zeros(2, 5, dtype=torch.int64)}, "cells is"),
        ({"chosen": torch.zeros(1, 2, 16, dtype=torch.int32)}, "chosen tokens are kept"),
        ({"key_slots": torch.zeros(2, 16, dtype=torch.int32)}, "slots of keys are kept"),
        ({"far_queries": torch.zeros(2, 6, 32)}, "far_queries is"),
    ],
)
def test_sharing_that_fits_nothing_is_refused(change, match) -> None:
    model = native()
    table = torch.zeros(16, 1, dtype=torch.int32)
    cells = torch.zeros(8, 5, dtype=torch.int64)
    fetched = torch.zeros(1, dtype=torch.int64)
    sharing = replace(cpu.StepSharing(cells=cells, until_slide=64, fetched=fetched), **change)
    step = model._step_for(torch.zeros(4, 16, 32), 1)
    with pytest.raises(ValueError, match=match):
        step.begin(torch.arange(1), [cpu.StepSequence(table, 0, 1, 0, 16, sharing=sharing)])
