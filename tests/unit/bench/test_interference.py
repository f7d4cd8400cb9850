from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvservice.bench.interference import Case, InterferenceLoad, measure_interference
from kvservice.config.engine import EngineConfig
from kvservice.config.recipes import RECALL
from kvservice.engine import Engine
from kvservice.engine.ports import NoWriter
from kvservice.errors import ConfigError
from kvservice.models.tiny import tiny_model

CASES = (Case.ALONE, Case.OFFLOAD, Case.CONTROL)
LOAD = InterferenceLoad(decoding=2, document_tokens=100, prefill_tokens=500, recipe=RECALL, rounds=2, seed=7)


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


def test_each_case_has_its_turn_in_each_round(engine: Engine) -> None:
    turns: list[None] = []
    alone, offload, control = measure_interference(engine, LOAD, CASES, lambda: turns.append(None))
    assert len(turns) == LOAD.rounds * len(CASES)
    assert (alone.case, offload.case, control.case) == CASES
    assert alone.to_alone is alone.to_control is alone.prefill_tokens_per_s is None
    assert alone.num_intervals == LOAD.rounds * LOAD.decoding * 128
    assert offload.to_alone is not None
    assert offload.to_control is not None
    assert control.to_alone is not None
    assert control.to_control is None
    for one in (alone, offload, control):
        interval = one.interval_ms
        assert 0 < interval.p50 <= interval.p90 <= interval.p99 <= interval.max
        assert len(one.intervals_s) == one.num_intervals
    for one in (offload, control):
        assert one.prefill_tokens_per_s is not None
        assert one.prefill_tokens_per_s > 0


def test_a_load_over_the_positions_of_the_model_is_refused(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="2,048 positions"):
        measure_interference(engine, replace(LOAD, document_tokens=2000), CASES, lambda: None)


def test_a_load_over_the_budget_is_refused_by_the_option_to_raise(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="--kv-bytes"):
        measure_interference(engine, replace(LOAD, decoding=120), CASES, lambda: None)
