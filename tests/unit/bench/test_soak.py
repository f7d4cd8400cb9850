from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from kvservice.bench.callers import SoakLoad
from kvservice.bench.process import read_memory, slope_mib_per_min
from kvservice.bench.soak import Limits, SoakResult, activation_bytes, run_soak
from kvservice.bench.steps import OVERHEAD, PHASES, WHOLE, Steps
from kvservice.config.engine import EngineConfig
from kvservice.config.recipes import DENSE, EXACT, RECALL
from kvservice.engine import Engine
from kvservice.engine.ports import NoWriter
from kvservice.models.tiny import tiny_model
from kvservice.recall.parking import Place
from kvservice.types import CallId, EngineCall, FinishedEvent, SamplingParams, SessionId

MIB = 1 << 20
LOAD = SoakLoad(sessions=6, document_tokens=(60, 500), recipes=(DENSE, EXACT, RECALL), seed=7)


class Letters:
    """A stream of text in which each token is one letter."""

    def push(self, token_id: int) -> str:
        return chr(ord("a") + token_id % 26)

    def flush(self) -> str:
        return ""


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=0)


@pytest.fixture
def make_engine(model) -> Callable[[int], Engine]:
    def make(kv_bytes: int) -> Engine:
        config = EngineConfig(kv_bytes=kv_bytes, host_bytes=16 * MIB, step_tokens=128)
        return Engine(model, config, NoWriter())

    return make


def soak(engine: Engine, kv_bytes: int, seconds: float, load: SoakLoad = LOAD) -> SoakResult:
    limits = Limits(kv_bytes, 128, 32, read_memory().anonymous_bytes)
    return run_soak(engine, load, limits, Letters, seconds, lambda gone: None)


def test_a_soak_ends_clean_and_its_callers_cancel_at_all_points(make_engine) -> None:
    engine = make_engine(16 * MIB)
    result = soak(engine, 16 * MIB, 2.0)
    assert result.faults == ()
    assert result.left == {}
    counts = result.counts
    assert counts.tokens_read > 0
    assert counts.tokens_generated > 0
    assert counts.finished > 0
    assert counts.cancelled_waiting + counts.cancelled_reading > 0
    assert counts.cancelled_answering > 0
    assert counts.sessions > LOAD.sessions
    assert result.num_checks > 1
    assert len(result.samples) >= 2
    assert result.samples[-1].steps <= result.steps.num_steps
    assert not engine.has_work


def test_a_soak_in_too_little_room_makes_sequences_give_way_and_ends_clean(make_engine) -> None:
    kv_bytes = 3 * MIB // 2
    result = soak(make_engine(kv_bytes), kv_bytes, 2.0)
    assert result.faults == ()
    stats = result.stats
    assert stats.swapped_out + stats.forgotten + stats.idle_swapped_out + stats.idle_dropped > 0


def test_every_part_of_a_step_is_timed_and_the_terms_of_memory_add_up(make_engine, model) -> None:
    engine = make_engine(16 * MIB)
    result = soak(engine, 16 * MIB, 0.1)
    overhead, memory = result.overhead, result.memory
    assert overhead.batch == LOAD.sessions
    assert overhead.document_tokens == sum(LOAD.document_tokens) // 2
    assert overhead.steps.num_steps == 60
    assert [phase.name for phase in overhead.steps.phases] == [*PHASES, OVERHEAD, WHOLE]
    for phase in overhead.steps.phases:
        assert 0 < phase.wall_ms_p50 <= phase.wall_ms_p99
        assert 0 < phase.cpu_ms_p50 <= phase.cpu_ms_p99
    whole, forward = overhead.steps.phase(WHOLE), overhead.steps.phase("forward")
    assert whole is not None
    assert forward is not None
    assert whole.wall_ms_p50 > forward.wall_ms_p50
    assert memory.weight_bytes == model.weight_bytes
    assert memory.activation_bytes == activation_bytes(engine.info.shape, 128, 32)
    assert memory.bound_bytes == (
        memory.before_model_bytes
        + memory.weight_bytes
        + memory.kv_bytes
        + memory.host_touched_bytes
        + memory.activation_bytes
        + memory.allowance_bytes
    )
    assert memory.peak_bytes <= memory.bound_bytes


def test_blocks_that_somebody_keeps_are_found(make_engine, monkeypatch) -> None:
    kept = []
    release = Engine.release

    def leaking(self: Engine, session_id: SessionId, *more: object, **options: object) -> tuple[int, int]:
        memory = self._sequences.get(session_id)
        if memory is not None and memory.place is Place.DEVICE and memory.num_computed and not kept:
            kept.append(memory.fork())
        return release(self, session_id, *more, **options)

    engine = make_engine(16 * MIB)
    monkeypatch.setattr(Engine, "release", leaking)
    result = soak(engine, 16 * MIB, 1.5)
    assert any("counted" in fault or "ledger" in fault for fault in result.faults)
    assert result.left["window_bytes"] > 0


def test_a_session_that_nobody_releases_is_found(make_engine, monkeypatch) -> None:
    fork = Engine.fork

    def forks_twice(self: Engine, session_id: SessionId, fork_id: SessionId, num_tokens: int | None = None) -> None:
        fork(self, session_id, fork_id, num_tokens)
        fork(self, session_id, SessionId(f"{fork_id} again"), num_tokens)

    engine = make_engine(16 * MIB)
    monkeypatch.setattr(Engine, "fork", forks_twice)
    result = soak(engine, 16 * MIB, 10.0, replace(LOAD, seed=3))
    assert result.counts.forks > 0
    assert result.left["resident_sessions"] == result.counts.forks
    assert "not back at zero" in result.faults[-1]


def test_an_engine_that_fails_is_a_fault_and_not_the_end_of_the_report(make_engine, monkeypatch) -> None:
    engine = make_engine(16 * MIB)
    checks = []

    def check() -> None:
        checks.append(None)
        if len(checks) == 2:
            raise RuntimeError("planted")

    monkeypatch.setattr(engine, "check", check)
    result = soak(engine, 16 * MIB, 5.0)
    assert result.faults == ("RuntimeError: planted",)
    assert result.seconds < 5.0
    assert result.left == {}


def test_memory_beyond_the_terms_is_a_fault(make_engine) -> None:
    engine = make_engine(16 * MIB)
    limits = Limits(16 * MIB, 128, 32, before_model_bytes=-(1 << 40))
    result = run_soak(engine, LOAD, limits, Letters, 0.1, lambda gone: None)
    assert "anonymous memory" in result.faults[-1]


def test_an_answer_ends_at_its_stop_string_as_at_a_worker(make_engine) -> None:
    engine = make_engine(16 * MIB)
    steps = Steps(engine, Letters)
    sampling = SamplingParams(max_new_tokens=200, temperature=2.0, ignore_eos=True, stop=("e",), seed=1)
    steps.submit(EngineCall(CallId("c"), SessionId("s"), DENSE, (), (5, 6, 7), (8,), sampling))
    finished = []
    while not finished:
        finished = [event for event in steps.step() if isinstance(event, FinishedEvent)]
    assert finished[0].usage.completion_tokens < 200
    assert "e" not in "".join(Letters().push(token) for token in finished[0].appended_tokens[4:-1])
    engine.release(SessionId("s"))


def test_slopes_are_in_mib_a_minute() -> None:
    assert slope_mib_per_min([0, 30, 60, 90], [0, 2 * MIB, 4 * MIB, 6 * MIB]) == pytest.approx(4.0)
    assert slope_mib_per_min([0, 30], [0, 2 * MIB]) == 0.0


def test_anonymous_memory_is_a_part_of_resident_memory() -> None:
    memory = read_memory()
    assert 0 < memory.anonymous_bytes <= memory.rss_bytes
