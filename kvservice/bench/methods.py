"""Decode steps of a batch whose sessions have one recipe, or each another. Knows no quality."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from kvservice.engine import Engine
from kvservice.types import (
    CallId,
    EngineCall,
    FailedEvent,
    FinishedEvent,
    RecipeSpec,
    SamplingParams,
    SessionId,
    TokenEvent,
)

MIXED = "mixed"
WARM_STEPS = 3
"""The first steps of a batch copy what forks share."""


@dataclass(frozen=True, slots=True)
class BatchTime:
    """A decode step of a whole batch.

    Attributes:
        name: of the recipe that all its sessions have, or `mixed`.
        wall_ms: median of the steps.
        cpu_ms: likewise, of the engine's thread: without what other programs take from the machine.
    """

    name: str
    wall_ms: float
    cpu_ms: float


def measure_batches(
    engine: Engine,
    recipes: Sequence[RecipeSpec],
    document: Sequence[int],
    batch: int,
    new_tokens: int,
    report: Callable[[], None] = lambda: None,
) -> list[BatchTime]:
    """Times a batch of each recipe, and one that goes through all of them in turn. Blocks.

    Each recipe's document is read once; the sessions of a batch are forks of that one.

    Args:
        engine: without sessions; has room for a batch of the dense ones.
        recipes: of different names.
        document: token ids that each session begins with.
        batch: sessions that answer at a time.
        new_tokens: of each answer.
        report: told of each batch.
    """
    read = {spec.name: SessionId(f"bench-{spec.name}") for spec in recipes}
    for spec in recipes:
        engine.submit(EngineCall(CallId("read"), read[spec.name], spec, (), document_tokens=tuple(document)))
        _finish(engine, 1)
    mixed = [recipes[i % len(recipes)] for i in range(batch)]
    batches = [(spec.name, [spec] * batch) for spec in recipes] + [(MIXED, mixed)]
    times = []
    for name, specs in batches:
        sessions = []
        for number, spec in enumerate(specs):
            session = SessionId(f"bench-{number}")
            engine.fork(read[spec.name], session)
            sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
            engine.submit(
                EngineCall(CallId(session), session, spec, tuple(document), (), tuple(document[:1]), sampling)
            )
            sessions.append(session)
        times.append(BatchTime(name, *_steps(engine, batch)))
        for session in sessions:
            engine.release(session)
        report()
    for session in read.values():
        engine.release(session)
    return times


def _steps(engine: Engine, batch: int) -> tuple[float, float]:
    """Median wall and CPU milliseconds of the steps in which all sessions get a token."""
    walls, cpus, running = [], [], batch
    while running:
        wall, cpu = time.perf_counter(), time.thread_time()
        events = engine.step()
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
        running -= _ended(events)
        if sum(isinstance(event, TokenEvent) for event in events) == batch:
            walls.append(1e3 * wall)
            cpus.append(1e3 * cpu)
    return median(walls[WARM_STEPS:]), median(cpus[WARM_STEPS:])


def _finish(engine: Engine, count: int) -> None:
    while count:
        count -= _ended(engine.step())


def _ended(events: Sequence[object]) -> int:
    for event in events:
        if isinstance(event, FailedEvent):
            raise event.error
    return sum(isinstance(event, FinishedEvent) for event in events)


def slowest(times: Sequence[BatchTime], names: Sequence[str]) -> BatchTime:
    """Of some recipes' batches, the one whose steps take longest."""
    return max((one for one in times if one.name in names), key=lambda one: one.cpu_ms)
