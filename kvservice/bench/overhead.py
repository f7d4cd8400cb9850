"""What the engine takes beside computing, in steps that decode a full batch and do nothing else."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvservice.bench.callers import SoakLoad
from kvservice.bench.load import random_ids
from kvservice.bench.steps import StepFigures, Steps
from kvservice.engine import Engine
from kvservice.types import (
    CallId,
    EngineCall,
    FailedEvent,
    FinishedEvent,
    SamplingParams,
    SessionId,
    TokenEvent,
    footprint,
)

OVERHEAD_STEPS = 60
PROMPT_TOKENS = 24
STEPS_A_PROMPT = 64
"""More than it takes to read a prompt, and the end of its document, in the pauses of others' answers."""
STEPS_A_FULL_ONE = 6
"""A step in which everybody decodes comes at least this often: sessions that read much from host memory miss some."""

_TAG = b"overhead tenant!"


@dataclass(frozen=True, slots=True)
class OverheadFigures:
    """Steps of `batch` sequences that all decode. Each recipe has its turn among the sequences.

    Attributes:
        document_tokens: of each sequence; sequences of one recipe share their document's KV.
    """

    batch: int
    document_tokens: int
    steps: StepFigures


def measure_overhead(engine: Engine, steps: Steps, load: SoakLoad, num_steps: int = OVERHEAD_STEPS) -> OverheadFigures:
    """Times decode steps of all sessions of a load at once. Leaves the engine empty.

    Args:
        engine: idle and without sessions; it takes `load.sessions` calls at a time.
        steps: of that engine; what it measured before is dropped, and what it measures here as well.
        load: its sessions, recipes and seed; documents are half way between the shortest and the longest, or as long as
            the budget allows.
        num_steps: steps to time in which all of them decode.
    """
    rng, shape = random.Random(load.seed), engine.info.shape
    length = _document_tokens(engine, load, num_steps)
    documents = {recipe.name: tuple(random_ids(rng, length, shape.vocab_size)) for recipe in load.recipes}
    for recipe in load.recipes:
        name = f"document {recipe.name}"
        call = EngineCall(CallId(name), SessionId(name), recipe, (), documents[recipe.name], tenant_tag=_TAG)
        steps.submit(call)
        _step_until(steps, {call.call_id})
    sampling = SamplingParams(max_new_tokens=_new_tokens(load, num_steps), ignore_eos=True)
    names = []
    for number in range(load.sessions):
        recipe = load.recipes[number % len(load.recipes)]
        names.append(SessionId(f"overhead {number}"))
        call = EngineCall(
            call_id=CallId(names[-1]),
            session_id=names[-1],
            recipe=recipe,
            base_tokens=(),
            document_tokens=documents[recipe.name],
            prompt_tokens=tuple(random_ids(rng, PROMPT_TOKENS, shape.vocab_size)),
            sampling=sampling,
            tenant_tag=_TAG,
        )
        steps.submit(call)
    decoding: set[CallId] = set()
    while len(decoding) < load.sessions:
        decoding |= _step(steps)
    steps.forget()
    full = 0
    for _ in range(STEPS_A_FULL_ONE * num_steps):
        full += len(_step(steps)) == load.sessions
        if full == num_steps:
            break
    figures = steps.figures(min_tokens=load.sessions, decoding_only=True)
    for name in [*names, *(SessionId(f"document {recipe.name}") for recipe in load.recipes)]:
        engine.release(name)
    while engine.has_work:  # the events of calls that were cancelled
        steps.step()
    steps.forget()
    return OverheadFigures(load.sessions, length, figures)


def _new_tokens(load: SoakLoad, num_steps: int) -> int:
    """The first answer must still run when the last has made its steps, and prompts are read slowly beside answers."""
    return STEPS_A_FULL_ONE * num_steps + STEPS_A_PROMPT * load.sessions


def _document_tokens(engine: Engine, load: SoakLoad, num_steps: int) -> int:
    shape, headroom = engine.info.shape, engine.headroom()
    more = PROMPT_TOKENS + _new_tokens(load, num_steps)
    length = min(sum(load.document_tokens) // 2, shape.max_positions - more)
    while length > 1:
        each = [footprint(shape, recipe, length + more) for recipe in load.recipes]
        share = -(-load.sessions // len(each)) + 1
        fits_device = share * sum(one.device_bytes for one in each) <= headroom.device_capacity_bytes
        if fits_device and share * sum(one.host_bytes for one in each) <= headroom.host_capacity_bytes:
            break
        length = length * 3 // 4
    return max(1, length)


def _step_until(steps: Steps, calls: set[CallId]) -> None:
    while calls:
        for event in steps.step():
            if isinstance(event, FailedEvent):
                raise event.error
            if isinstance(event, FinishedEvent):
                calls.discard(event.call_id)


def _step(steps: Steps) -> set[CallId]:
    """Calls that got a token."""
    events = steps.step()
    for event in events:
        if isinstance(event, FailedEvent):
            raise event.error
    return {event.call_id for event in events if isinstance(event, TokenEvent)}
