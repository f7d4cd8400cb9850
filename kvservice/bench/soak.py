"""A full, mixed load on an engine for minutes: does anything drift, leak or fail? Prints nothing.

Every block, byte and reservation must be back at zero once all sessions are released, and memory must not grow beyond
what the terms of `MemoryTerms` add up to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvservice.bench.callers import Callers, Counts, SoakLoad
from kvservice.bench.overhead import OverheadFigures, measure_overhead
from kvservice.bench.process import MIB, ProcessMemory, read_memory, slope_mib_per_min
from kvservice.bench.steps import StepFigures, Steps, arena_bytes
from kvservice.engine import Engine
from kvservice.errors import InternalError
from kvservice.types import ModelShape, WorkerStats
from kvservice.worker.answer import TokenStream

logger = logging.getLogger(__name__)

SAMPLE_S = 1.0
CHECK_STEPS = 25
STUCK_S = 60.0
"""An engine that has work and gives no event for so long is at fault."""

WARM_UP = 0.2
"""Of the samples, the first that drift isn't told from: pages are committed as they are first used."""

ALLOWANCE_BYTES = 256 * MIB
"""For what nobody counts: the allocator's gaps, caches of torch's kernels, Python's objects, the load itself."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Budgets of the engine, and what its process had before the model was loaded."""

    kv_bytes: int
    step_tokens: int
    max_batch: int
    before_model_bytes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at engine and process.

    Attributes:
        running: calls admitted; `waiting`: callers that found no room.
        device_reserved_bytes: promised to sequences, what they share counted once.
        touched_bytes: the most of arena and host tier that was ever in use: those pages are resident.
    """

    time_s: float
    steps: int
    tokens_read: int
    tokens_generated: int
    running: int
    waiting: int
    workspace_bytes: int
    window_bytes: int
    index_bytes: int
    slot_bytes: int
    host_bytes: int
    device_reserved_bytes: int
    host_reserved_bytes: int
    free_blocks: int
    touched_bytes: int
    rss_bytes: int
    anonymous_bytes: int
    swapped_out: int
    forgotten: int
    idle_swapped_out: int
    idle_dropped: int


@dataclass(frozen=True, slots=True)
class Drift:
    """MiB a minute, least squares. `other` is anonymous memory without the touched pages of arena and host tier.

    The first of each pair is over all after the warm-up, the second over the second half.
    """

    rss: tuple[float, float]
    anonymous: tuple[float, float]
    other: tuple[float, float]


@dataclass(frozen=True, slots=True)
class MemoryTerms:
    """What the process's anonymous memory may come to, and the most it came to.

    Attributes:
        before_model_bytes: interpreter and libraries, measured before the model was loaded.
        host_touched_bytes: of the host tier, the most that was in use.
        activation_bytes: of the widest step, and of the logits of a full batch: see `activation_bytes`.
        allowance_bytes: `ALLOWANCE_BYTES`.
        other_bytes: the most that was measured beside the first two and what was touched of arena and host tier.
    """

    before_model_bytes: int
    weight_bytes: int
    kv_bytes: int
    host_touched_bytes: int
    activation_bytes: int
    allowance_bytes: int
    peak_bytes: int
    other_bytes: int

    @property
    def bound_bytes(self) -> int:
        """The sum of all terms."""
        known = self.before_model_bytes + self.weight_bytes + self.kv_bytes + self.host_touched_bytes
        return known + self.activation_bytes + self.allowance_bytes


@dataclass(frozen=True, slots=True)
class SoakResult:
    """What a soak has found.

    Attributes:
        faults: sentences; empty if all is well.
        left: what wasn't back at zero after everything had been released, by name.
        full_batch: steps that gave a token to as many answers as there are callers, or more.
    """

    seconds: float
    counts: Counts
    stats: WorkerStats
    num_checks: int
    faults: tuple[str, ...]
    left: dict[str, int]
    samples: tuple[Sample, ...]
    drift: Drift
    memory: MemoryTerms
    steps: StepFigures
    full_batch: StepFigures
    overhead: OverheadFigures


def run_soak(
    engine: Engine,
    load: SoakLoad,
    limits: Limits,
    new_stream: Callable[[], TokenStream],
    seconds: float,
    report: Callable[[float], None],
) -> SoakResult:
    """Measures the overhead of a full batch, then puts the load on the engine. Blocks. Leaves the engine empty.

    Args:
        engine: idle and without sessions, on a CPU, with `time.monotonic` as its clock.
        load: what the callers do.
        limits: of the engine.
        new_stream: of the model's tokenizer.
        seconds: how long callers make new calls.
        report: called about once a second with the seconds gone by.
    """
    steps = Steps(engine, new_stream)
    overhead = measure_overhead(engine, steps, load)
    soak = _Soak(engine, load, limits, steps, report)
    soak.run(seconds)
    return soak.result(overhead)


def activation_bytes(shape: ModelShape, step_tokens: int, max_batch: int) -> int:
    """What a step needs beside weights and KV: hidden states of its tokens, and logits of a full batch being sampled.

    Of a token: its hidden state eight times, queries, keys and values four times, the wide layer four times. Of an
    answer: its logits, their sorted copy with the order, probabilities and sums, 32 bytes an entry in all.
    """
    heads = shape.num_heads + 2 * shape.num_kv_heads
    per_token = 8 * shape.hidden_size + 4 * heads * shape.head_dim + 4 * shape.intermediate_size
    return (step_tokens + max_batch) * per_token * shape.dtype_bytes + max_batch * shape.vocab_size * 32


class _Soak:
    def __init__(
        self, engine: Engine, load: SoakLoad, limits: Limits, steps: Steps, report: Callable[[float], None]
    ) -> None:
        self._engine = engine
        self._load = load
        self._limits = limits
        self._steps = steps
        self._report = report
        self._callers = Callers(load, engine, steps, lambda seconds: time.monotonic() + seconds)
        self._started = time.monotonic()
        self._ended = self._started
        self._last_event = self._started
        self._before = engine.stats()
        self._samples: list[Sample] = []
        self._num_checks = 0
        self._faults: list[str] = []
        self._left: dict[str, int] = {}
        self._memory_peak = 0
        self._other_peak = 0

    def run(self, seconds: float) -> None:
        """Load, drain, release, count what is left. What goes wrong on the way is a fault, and ends the load."""
        self._guarded(lambda: self._put_load(seconds))
        self._guarded(self._drain)
        self._guarded(self._callers.release_all)
        self._ended = time.monotonic()
        self._guarded(self._check)
        self._left = self._what_is_left()
        if self._left:
            words = ", ".join(f"{name} {value:,}" for name, value in self._left.items())
            self._faults.append(f"not back at zero after everything was released: {words}")

    def result(self, overhead: OverheadFigures) -> SoakResult:
        """All that was found."""
        memory = self._memory_terms()
        if memory.peak_bytes > memory.bound_bytes:
            self._faults.append(
                f"{memory.peak_bytes:,} bytes of anonymous memory, {memory.bound_bytes:,} are what the terms add up to"
            )
        return SoakResult(
            seconds=self._ended - self._started,
            counts=self._callers.counts,
            stats=self._engine.stats(),
            num_checks=self._num_checks,
            faults=tuple(self._faults),
            left=self._left,
            samples=tuple(self._samples),
            drift=drift(self._samples),
            memory=memory,
            steps=self._steps.figures(),
            full_batch=self._steps.figures(min_tokens=self._load.sessions),
            overhead=overhead,
        )

    # ----------------------------------------------------------------------------------------------------------------

    def _guarded(self, part: Callable[[], None]) -> None:
        try:
            part()
        except Exception as error:  # whatever an engine fails with is what a soak is there to find
            logger.exception("soak_fault")
            self._faults.append(f"{type(error).__name__}: {error}")

    def _put_load(self, seconds: float) -> None:
        next_sample = 0.0
        while (gone := time.monotonic() - self._started) < seconds:
            self._callers.act()
            self._step()
            if gone >= next_sample:
                self._sample(gone)
                self._report(gone)
                next_sample = gone + SAMPLE_S
            if self._engine.stopwatch.steps % CHECK_STEPS == 0 or not self._engine.has_work:
                self._check()
        self._sample(time.monotonic() - self._started)

    def _drain(self) -> None:
        self._callers.stop_reading()
        while self._engine.has_work:
            self._step()

    def _step(self) -> None:
        events = self._steps.step() if self._engine.has_work else []
        now = time.monotonic()
        if events:
            self._last_event = now
        elif now - self._last_event > STUCK_S:
            raise InternalError(f"no event for {STUCK_S:.0f} s")
        self._callers.see(events)

    def _check(self) -> None:
        self._engine.check()
        self._num_checks += 1

    def _sample(self, gone: float) -> None:
        stats, counts, memory = self._engine.stats(), self._callers.counts, read_memory()
        headroom, before = stats.headroom, self._before
        self._note_memory(memory)
        self._samples.append(
            Sample(
                time_s=gone,
                steps=stats.steps - before.steps,
                tokens_read=counts.tokens_read,
                tokens_generated=counts.tokens_generated,
                running=headroom.running_calls,
                waiting=self._callers.num_waiting,
                workspace_bytes=stats.workspace_bytes,
                window_bytes=stats.window_bytes,
                index_bytes=stats.index_bytes,
                slot_bytes=stats.slot_bytes,
                host_bytes=stats.host_bytes,
                device_reserved_bytes=headroom.device_capacity_bytes - headroom.device_free_bytes,
                host_reserved_bytes=headroom.host_capacity_bytes - headroom.host_free_bytes,
                free_blocks=(self._limits.kv_bytes - arena_bytes(stats)) // self._engine.info.shape.block_bytes,
                touched_bytes=self._steps.peak_arena_bytes + self._steps.peak_host_bytes,
                rss_bytes=memory.rss_bytes,
                anonymous_bytes=memory.anonymous_bytes,
                swapped_out=stats.swapped_out - before.swapped_out,
                forgotten=stats.forgotten - before.forgotten,
                idle_swapped_out=stats.idle_swapped_out - before.idle_swapped_out,
                idle_dropped=stats.idle_dropped - before.idle_dropped,
            )
        )

    def _note_memory(self, memory: ProcessMemory) -> None:
        self._memory_peak = max(self._memory_peak, memory.anonymous_bytes)
        touched = self._steps.peak_arena_bytes + self._steps.peak_host_bytes
        known = self._limits.before_model_bytes + self._before.weight_bytes + touched
        self._other_peak = max(self._other_peak, memory.anonymous_bytes - known)

    def _memory_terms(self) -> MemoryTerms:
        limits = self._limits
        return MemoryTerms(
            before_model_bytes=limits.before_model_bytes,
            weight_bytes=self._before.weight_bytes,
            kv_bytes=limits.kv_bytes,
            host_touched_bytes=self._steps.peak_host_bytes,
            activation_bytes=activation_bytes(self._engine.info.shape, limits.step_tokens, limits.max_batch),
            allowance_bytes=ALLOWANCE_BYTES,
            peak_bytes=self._memory_peak,
            other_bytes=self._other_peak,
        )

    def _what_is_left(self) -> dict[str, int]:
        stats = self._engine.stats()
        headroom = stats.headroom
        amounts = {
            "window_bytes": stats.window_bytes,
            "index_bytes": stats.index_bytes,
            "slot_bytes": stats.slot_bytes,
            "host_bytes": stats.host_bytes,
            "device_reserved_bytes": headroom.device_capacity_bytes - headroom.device_free_bytes,
            "host_reserved_bytes": headroom.host_capacity_bytes - headroom.host_free_bytes,
            "workspace_bytes": stats.workspace_bytes - self._before.workspace_bytes,
            "weight_bytes": stats.weight_bytes - self._before.weight_bytes,
            "running_calls": headroom.running_calls,
            "resident_sessions": headroom.resident_sessions,
        }
        return {name: amount for name, amount in amounts.items() if amount}


def drift(samples: Sequence[Sample]) -> Drift:
    """How memory grew, by the samples after the warm-up."""

    def slopes(num_bytes: Callable[[Sample], int]) -> tuple[float, float]:
        warm = samples[int(len(samples) * WARM_UP) :]
        late = samples[len(samples) // 2 :]
        first, second = (
            slope_mib_per_min([sample.time_s for sample in some], [num_bytes(sample) for sample in some])
            for some in (warm, late)
        )
        return first, second

    return Drift(
        rss=slopes(lambda sample: sample.rss_bytes),
        anonymous=slopes(lambda sample: sample.anonymous_bytes),
        other=slopes(lambda sample: sample.anonymous_bytes - sample.touched_bytes),
    )
