"""Speed of prefill and decode in this process: no gateway, no RPC, no Redis."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvservice.bench.load import random_ids
from kvservice.engine import Engine
from kvservice.types import (
    CallId,
    EngineCall,
    EngineEvent,
    FailedEvent,
    FinishedEvent,
    Headroom,
    KvTelemetry,
    ModelShape,
    RecipeSpec,
    SamplingParams,
    SessionId,
    TokenEvent,
    footprint,
)

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One size of load; medians over the repeats.

    Attributes:
        prompt_tokens: of each document.
        batch: sequences.
        prefill_tokens_per_s: of all sequences together.
        decode_ms_per_token: time of one decode step, which is what each sequence waits for its next token.
        output_tokens_per_s: of all sequences together, while all decode.
        arrived_fraction: of what layers that use another's keys fetched, the share that a simulated link had brought
            when it was needed, 0 without a link; None where they fetched nothing.
        skipped_fraction: of the rows of such layers that might have left distant tokens out, those that did; likewise.
    """

    prompt_tokens: int
    batch: int
    prefill_tokens_per_s: float
    decode_ms_per_token: float
    output_tokens_per_s: float
    arrived_fraction: float | None = None
    skipped_fraction: float | None = None


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A size of load that the budget or the model doesn't allow."""

    prompt_tokens: int
    batch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Load:
    """What is measured.

    Attributes:
        recipe: of all sequences.
        prompt_tokens: of each document.
        batch: sequences.
        new_tokens: timed decode steps.
        seed: of the documents' random token ids.
    """

    recipe: RecipeSpec
    prompt_tokens: int
    batch: int
    new_tokens: int
    seed: int

    @property
    def max_new_tokens(self) -> int:
        """Sequences enter decode one after the other; the first must still run when the last has made its steps."""
        return self.new_tokens + self.batch + 1


def why_not(load: Load, shape: ModelShape, headroom: Headroom) -> str | None:
    """Why a load can't be measured in this budget, or None if it can."""
    num_tokens = load.prompt_tokens + load.max_new_tokens
    if num_tokens > shape.max_positions:
        return f"{num_tokens:,} tokens a sequence: the model has {shape.max_positions:,} positions"
    each = footprint(shape, load.recipe, num_tokens)
    for place, needed, capacity in (
        ("device", load.batch * each.device_bytes, headroom.device_capacity_bytes),
        ("host", load.batch * each.host_bytes, headroom.host_capacity_bytes),
    ):
        if needed > capacity:
            return f"needs {needed:,} {place} bytes, the budget leaves {capacity:,}"
    return None


def measure(engine: Engine, load: Load, repeats: int, clock: Clock = time.perf_counter) -> EngineRow | SkippedRow:
    """Reads the documents, then times decode steps of all of them; as often as `repeats` says. Blocks.

    Args:
        engine: idle and without sessions; it takes `batch` calls at a time.
        load: what is measured.
        repeats: how often, each time with other documents; a short untimed run comes first.
        clock: seconds.
    """
    shape = engine.info.shape
    reason = why_not(load, shape, engine.headroom())
    if reason is not None:
        return SkippedRow(load.prompt_tokens, load.batch, reason)
    rng = random.Random(load.seed)
    _run(engine, load, [random_ids(rng, 64, shape.vocab_size)], clock)
    prefill_s, step_s = [], []
    answers: list[KvTelemetry] = []
    for _ in range(repeats):
        documents = [random_ids(rng, load.prompt_tokens, shape.vocab_size) for _ in range(load.batch)]
        seconds, steps, kv = _run(engine, load, documents, clock)
        prefill_s.append(seconds)
        step_s.append(steps)
        answers += kv
    return replace(
        medians(load, prefill_s, step_s),
        arrived_fraction=_share(sum(kv.arrived_bytes for kv in answers), sum(kv.follower_bytes for kv in answers)),
        skipped_fraction=_share(sum(kv.skipped_rows for kv in answers), sum(kv.gated_rows for kv in answers)),
    )


def medians(load: Load, prefill_s: Sequence[float], step_s: Sequence[Sequence[float]]) -> EngineRow:
    """A row of the seconds of each repeat's prefill, and of its timed decode steps."""
    return EngineRow(
        prompt_tokens=load.prompt_tokens,
        batch=load.batch,
        prefill_tokens_per_s=load.batch * load.prompt_tokens / statistics.median(prefill_s),
        decode_ms_per_token=statistics.median(statistics.median(steps) for steps in step_s) * 1e3,
        output_tokens_per_s=load.batch * load.new_tokens / statistics.median(sum(steps) for steps in step_s),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _run(
    engine: Engine, load: Load, documents: Sequence[Sequence[int]], clock: Clock
) -> tuple[float, list[float], list[KvTelemetry]]:
    """Seconds of the whole prefill, and of each timed decode step; and what the answers' KV did."""
    sampling = SamplingParams(max_new_tokens=load.max_new_tokens, ignore_eos=True)
    reads, answers = [], []
    for number, document in enumerate(documents):
        tokens, name = tuple(document), f"sequence-{number}"
        reads.append(EngineCall(CallId(f"read {name}"), SessionId(name), load.recipe, (), document_tokens=tokens))
        answers.append(EngineCall(CallId(f"answer {name}"), SessionId(name), load.recipe, tokens, sampling=sampling))
    ended: list[KvTelemetry] = []
    try:
        prefill_s = _read(engine, reads, clock)
        return prefill_s, _decode(engine, answers, load.new_tokens, clock), ended
    finally:
        for call in reads:
            engine.release(call.session_id)
        while engine.has_work:  # what is left are the events of calls that were cancelled
            ended += [event.telemetry for event in engine.step() if isinstance(event, FinishedEvent)]


def _read(engine: Engine, calls: Sequence[EngineCall], clock: Clock) -> float:
    started = clock()
    for call in calls:
        engine.submit(call)
    finished = 0
    while finished < len(calls):
        finished += sum(isinstance(event, FinishedEvent) for event in _step(engine))
    return clock() - started


def _decode(engine: Engine, calls: Sequence[EngineCall], num_steps: int, clock: Clock) -> list[float]:
    for call in calls:
        engine.submit(call)
    begun: set[CallId] = set()
    while len(begun) < len(calls):
        begun |= {event.call_id for event in _step(engine) if isinstance(event, TokenEvent)}
    seconds = []
    for _ in range(num_steps):
        started = clock()
        _step(engine)
        seconds.append(clock() - started)
    return seconds


def _step(engine: Engine) -> list[EngineEvent]:
    events = engine.step()
    for event in events:
        if isinstance(event, FailedEvent):
            raise event.error
    return events
