from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvservice.compression.layer_groups import LayerGroups, uniform_groups
from kvservice.compression.sharing import SharingMode, SharingPlan
from kvservice.config.recipes import POD_EXACT
from kvservice.evaluation.calls import ignore_progress
from kvservice.evaluation.one_pass import DENSE_VARIANT, Rotation, Variant, last_logits
from kvservice.evaluation.sharing_helpers import fit_helpers, key_maps, offsets, pairs_of
from kvservice.models.tiny import tiny_model
from tests.unit.engine.driving import tokens
from tests.unit.engine.shared_reference import SharedReference

FP32_LOGITS = 1e-3
MIXED = LayerGroups(((0, 1, 1, 1), (0, 0, 2, 2)))


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=0, num_layers=4)


@pytest.mark.parametrize("mode", SharingMode, ids=lambda mode: mode.value)
def test_one_pass_equals_the_slow_reference(model, mode) -> None:
    text, plan = tokens(230), SharingPlan(MIXED, mode)
    ours = last_logits(model, text, 40, Variant(plan=plan, window_tokens=64))
    reference = SharedReference(model, replace(POD_EXACT, window_tokens=64), plan)
    theirs = reference.read(text, selects=False)[-40:]
    torch.testing.assert_close(ours, theirs, atol=FP32_LOGITS, rtol=FP32_LOGITS)


def test_where_nothing_is_shared_it_is_dense_bit_for_bit(model) -> None:
    text = tokens(400)
    alone = Variant(plan=SharingPlan(uniform_groups(4, 2, 8)))
    assert torch.equal(last_logits(model, text, 5, alone), last_logits(model, text, 5, DENSE_VARIANT))


def test_a_window_that_holds_the_text_drops_nothing(model) -> None:
    text = tokens(200)
    kept = last_logits(model, text, 5, Variant(drops_distant=True))
    torch.testing.assert_close(kept, last_logits(model, text, 5, DENSE_VARIANT), atol=FP32_LOGITS, rtol=FP32_LOGITS)
    short = last_logits(model, text, 5, Variant(drops_distant=True, window_tokens=64))
    assert (short - kept).abs().max() > 10 * FP32_LOGITS


def test_rotation_is_undone(model) -> None:
    rotation, keys = Rotation(model.spec, 50), torch.randn(2, 50, 16)
    torch.testing.assert_close(rotation.undo(rotation.apply(keys)), keys)


def test_helpers_are_fitted_to_what_they_replace(model) -> None:
    text = tokens(600)
    pairs = pairs_of([MIXED])
    fit = fit_helpers(model, [text], pairs, ignore_progress)
    assert pairs == {(1, 2, 0), (1, 3, 0), (0, 1, 1), (2, 3, 1)}
    found = offsets(fit, MIXED)
    for (layer, head), offset in found.items():
        anchor = MIXED.anchor(layer, head)
        near, own, others = fit.near[0][layer, head], fit.far[0][layer, head], fit.far[0][anchor, head]
        assert float((near - others - offset).sigmoid().mean()) == pytest.approx(
            float((near - own).sigmoid().mean()), abs=1e-4
        )
    assert set(key_maps(fit, MIXED)) == set(found)
    # A layer's own keys are best guessed from themselves.
    fit.products[2, 2, 0] = fit.squares[2, 0]
    torch.testing.assert_close(fit.key_map((2, 2, 0)), torch.eye(16), atol=0.1, rtol=0.0)
    with_maps = Variant(plan=SharingPlan(MIXED, SharingMode.KEY), key_maps=key_maps(fit, MIXED))
    plain = last_logits(model, text, 3, Variant(plan=SharingPlan(MIXED, SharingMode.KEY)))
    assert (last_logits(model, text, 3, with_maps) - plain).abs().max() > FP32_LOGITS
