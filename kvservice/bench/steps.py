"""Where the time of an engine's steps goes: every step's parts, and the text of its tokens. Knows no load.

engine.step:  schedule · tables · forward · commit · sample · output        then, as a worker does:  detokenise
"""

from __future__ import annotations

import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvservice.engine import Engine
from kvservice.engine.stopwatch import Stopwatch
from kvservice.types import (
    CallId,
    EngineCall,
    EngineEvent,
    FailedEvent,
    FinishedEvent,
    ProgressEvent,
    TokenEvent,
    WorkerStats,
)
from kvservice.worker.answer import AnswerText, TokenStream

DETOKENISE = "detokenise"
PHASES = ("schedule", "tables", "forward", "commit", "sample", "output", DETOKENISE)
OVERHEAD_PHASES = ("schedule", "tables", "output", DETOKENISE)
"""What the engine does beside computing: sampling and moving KV apart."""

OVERHEAD = "overhead"
WHOLE = "whole step"


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """What a part of a step takes, over many steps.

    CPU time is that of the engine's thread alone: other threads of a kernel aren't in it, and neither is what other
    programs take from a shared machine.
    """

    name: str
    wall_ms_p50: float
    wall_ms_p99: float
    cpu_ms_p50: float
    cpu_ms_p99: float


@dataclass(frozen=True, slots=True)
class StepFigures:
    """The parts of some steps; the last two rows are the overhead's sum of each step, and the whole step."""

    num_steps: int
    phases: tuple[PhaseTime, ...]

    def phase(self, name: str) -> PhaseTime | None:
        """The row of that name; None if no step was measured."""
        return next((phase for phase in self.phases if phase.name == name), None)


class TwoClocks(Stopwatch):
    """A stopwatch that also counts the CPU time of the thread that uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.cpu_seconds: defaultdict[str, float] = defaultdict(float)
        self._last_cpu = time.thread_time()

    def start(self) -> None:
        """Begins a step."""
        super().start()
        self._last_cpu = time.thread_time()

    def lap(self, name: str) -> None:
        """Counts the time since the last lap as `name`'s."""
        super().lap(name)
        now = time.thread_time()
        self.cpu_seconds[name] += now - self._last_cpu
        self._last_cpu = now


class Steps:
    """Steps an engine, turns tokens to text as a worker does, and keeps what each part of each step took.

    Args:
        engine: its stopwatch is replaced.
        new_stream: of the model's tokenizer.

    Attributes:
        peak_arena_bytes: the most of the arena in use after any step.
        peak_host_bytes: of the host tier.
    """

    def __init__(self, engine: Engine, new_stream: Callable[[], TokenStream]) -> None:
        self._engine = engine
        self._new_stream = new_stream
        self._clocks = TwoClocks()
        engine.stopwatch = self._clocks
        self._answers: dict[CallId, list[AnswerText]] = {}
        self.peak_arena_bytes = 0
        self.peak_host_bytes = 0
        self.forget()

    def forget(self) -> None:
        """Drops the times measured so far."""
        names = (*PHASES, WHOLE)
        self._wall = {name: array("d") for name in names}
        self._cpu = {name: array("d") for name in names}
        self._num_tokens = array("l")
        self._reads = array("b")

    def submit(self, call: EngineCall) -> None:
        """Admits a call.

        Raises:
            KVServiceError: the engine refused it.
        """
        self._engine.submit(call)
        if call.sampling is not None:
            self._answers[call.call_id] = [
                AnswerText(self._new_stream(), call.sampling.stop) for _ in range(call.sampling.n)
            ]

    def step(self) -> list[EngineEvent]:
        """One step of the engine, and the text of its tokens. Answers that reached a stop string are ended."""
        wall_before, cpu_before = dict(self._clocks.seconds), dict(self._clocks.cpu_seconds)
        wall, cpu = time.perf_counter(), time.thread_time()
        events = self._engine.step()
        wall, cpu = _since(wall, cpu)
        self._wall[WHOLE].append(wall)
        self._cpu[WHOLE].append(cpu)
        for name in PHASES[:-1]:
            self._wall[name].append(self._clocks.seconds[name] - wall_before.get(name, 0.0))
            self._cpu[name].append(self._clocks.cpu_seconds[name] - cpu_before.get(name, 0.0))
        wall, cpu = time.perf_counter(), time.thread_time()
        self._read(events)
        wall, cpu = _since(wall, cpu)
        self._wall[DETOKENISE].append(wall)
        self._cpu[DETOKENISE].append(cpu)
        self._num_tokens.append(sum(isinstance(event, TokenEvent) for event in events))
        self._reads.append(any(isinstance(event, ProgressEvent) for event in events))
        stats = self._engine.stats()
        self.peak_arena_bytes = max(self.peak_arena_bytes, arena_bytes(stats))
        self.peak_host_bytes = max(self.peak_host_bytes, stats.host_bytes)
        return events

    def _read(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            match event:
                case TokenEvent(call_id, token_id, index):
                    answer = self._answers[call_id][index]
                    was_stopped = answer.stopped
                    answer.push(token_id)
                    if answer.stopped and not was_stopped:
                        self._engine.stop(call_id, index)
                case FinishedEvent(call_id) | FailedEvent(call_id):
                    for answer in self._answers.pop(call_id, ()):
                        answer.finish()
                case _:
                    pass

    def figures(self, *, min_tokens: int = 0, decoding_only: bool = False) -> StepFigures:
        """Medians and 99th percentiles of the steps so far.

        Args:
            min_tokens: only steps that gave at least so many tokens.
            decoding_only: only steps without prefill.
        """
        chosen = np.array(self._num_tokens) >= min_tokens
        if decoding_only:
            chosen &= np.array(self._reads) == 0
        if not chosen.any():
            return StepFigures(0, ())
        wall = {name: np.array(seconds)[chosen] for name, seconds in self._wall.items()}
        cpu = {name: np.array(seconds)[chosen] for name, seconds in self._cpu.items()}
        for seconds in (wall, cpu):
            seconds[OVERHEAD] = np.sum([seconds[name] for name in OVERHEAD_PHASES], axis=0)
            # The engine's own step ends before a worker makes text of its tokens.
            seconds[WHOLE] = seconds[WHOLE] + seconds[DETOKENISE]
        rows = (
            PhaseTime(name, *_milliseconds(wall[name]), *_milliseconds(cpu[name]))
            for name in (*PHASES, OVERHEAD, WHOLE)
        )
        return StepFigures(int(chosen.sum()), tuple(rows))


def arena_bytes(stats: WorkerStats) -> int:
    """Bytes of the arena in use, by all owners together."""
    return stats.workspace_bytes + stats.window_bytes + stats.index_bytes + stats.slot_bytes


def _since(wall: float, cpu: float) -> tuple[float, float]:
    return time.perf_counter() - wall, time.thread_time() - cpu


def _milliseconds(seconds: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float]:
    median, high = np.percentile(seconds, (50, 99)) * 1e3
    return float(median), float(high)
