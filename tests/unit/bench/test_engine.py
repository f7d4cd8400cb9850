from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import pytest

from kvservice.bench.engine import EngineRow, Load, SkippedRow, measure, why_not
from kvservice.compression.layer_groups import LayerGroups
from kvservice.compression.sharing import SharingPlan
from kvservice.config.engine import EngineConfig
from kvservice.config.recipes import DENSE, POD, RECALL
from kvservice.engine import Engine
from kvservice.engine.ports import NoWriter
from kvservice.models.tiny import tiny_model

LOAD = Load(DENSE, prompt_tokens=200, batch=3, new_tokens=5, seed=7)


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=0)


@pytest.fixture
def engine(model) -> Iterator[Engine]:
    engine = Engine(model, EngineConfig(kv_bytes=16 << 20, host_bytes=16 << 20, step_tokens=128), NoWriter())
    yield engine
    engine.check()
    assert not engine.has_work
    assert engine.headroom().resident_sessions == 0


def test_figures_are_those_of_the_clock(engine: Engine) -> None:
    ticks = count()
    row = measure(engine, LOAD, repeats=3, clock=lambda: float(next(ticks)))
    # One second between any two looks at the clock: one for the whole prefill, one for each decode step.
    assert row == EngineRow(
        prompt_tokens=200,
        batch=3,
        prefill_tokens_per_s=600.0,
        decode_ms_per_token=1000.0,
        output_tokens_per_s=3.0,
    )


@pytest.mark.parametrize("recipe", [DENSE, RECALL], ids=lambda recipe: recipe.name)
def test_recipes_are_measured_beyond_their_window(engine: Engine, recipe) -> None:
    row = measure(engine, replace(LOAD, recipe=recipe, prompt_tokens=500), repeats=1)
    assert isinstance(row, EngineRow)
    assert row.decode_ms_per_token > 0


def test_a_load_over_the_budget_is_skipped_with_the_bytes_it_needs(engine: Engine) -> None:
    skipped = measure(engine, replace(LOAD, prompt_tokens=1500, batch=40), repeats=1)
    assert isinstance(skipped, SkippedRow)
    assert "device bytes" in skipped.reason


def test_a_load_over_the_positions_of_the_model_is_skipped(engine: Engine) -> None:
    skipped = measure(engine, replace(LOAD, prompt_tokens=3000), repeats=1)
    assert isinstance(skipped, SkippedRow)
    assert "2,048 positions" in skipped.reason


def test_host_bytes_can_be_what_is_short(engine: Engine) -> None:
    headroom = replace(engine.headroom(), host_capacity_bytes=1000)
    reason = why_not(replace(LOAD, recipe=RECALL, prompt_tokens=1000), engine.info.shape, headroom)
    assert reason is not None
    assert "host bytes" in reason


def test_what_followers_fetch_and_skip_is_told_where_layers_share_keys() -> None:
    model = tiny_model(seed=0, num_layers=4)
    groups = LayerGroups(((0, 0, 2, 2), (0, 0, 2, 2)))
    load = Load(replace(POD, window_tokens=64, recalled_tokens=32), prompt_tokens=300, batch=1, new_tokens=4, seed=7)
    config = EngineConfig(kv_bytes=16 << 20, host_bytes=16 << 20, step_tokens=128, host_link_bytes_per_s=10 << 30)
    row = measure(Engine(model, config, NoWriter(), sharing=SharingPlan(groups)), load, repeats=1)
    assert row.arrived_fraction is not None
    assert 0.5 <= row.arrived_fraction <= 1
    assert row.skipped_fraction is None
    gated = Engine(model, config, NoWriter(), sharing=SharingPlan(groups, skip_above=0.5))
    skipping = measure(gated, load, repeats=1)
    assert 0 < skipping.skipped_fraction < 1
