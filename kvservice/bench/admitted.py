"""How many sessions decode at once in one device memory: by arithmetic, by what is admitted, by the tokens of one step.

Keys and values of the documents are random numbers (`bench.context`): what counts is where they lie.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvservice.bench.context import SyntheticContext
from kvservice.bench.load import random_ids
from kvservice.config.engine import EngineConfig
from kvservice.engine import Engine
from kvservice.engine.ports import NoWriter
from kvservice.errors import InternalError, KVServiceError
from kvservice.models.base import Model
from kvservice.types import (
    CallId,
    EngineCall,
    EngineEvent,
    FailedEvent,
    RecipeSpec,
    SamplingParams,
    SessionId,
    TokenEvent,
    footprint,
)

MOST_SESSIONS = 1024
ANSWER_TOKENS = 512
"""Longer than anybody decodes here: none may end before all have begun."""
SEED = 7
FURTHER_STEPS = 4
"""Once all have begun. None has outgrown its first bytes by then."""

Texts = Callable[[int], tuple[int, ...]]
"""Of a session, by its number."""

_TAG = b"admitted tenants"


@dataclass(frozen=True, slots=True)
class AdmittedRow:
    """One recipe at one length.

    Attributes:
        recipe: its name.
        context_tokens: of each session.
        device_bytes: that one of them takes.
        host_bytes: the same in host memory.
        fitting: how many of them the free device memory of an idle engine holds, by arithmetic.
        admitted: calls that an engine took on until it refused one.
        decoding_at_once: tokens of one step; 0 if nothing was computed.
    """

    recipe: str
    context_tokens: int
    device_bytes: int
    host_bytes: int
    fitting: int
    admitted: int
    decoding_at_once: int


def measure_admitted(
    model: Model, recipe: RecipeSpec, context: int, *, kv_bytes: int, host_bytes: int, decodes: bool
) -> AdmittedRow:
    """Fills an engine of these budgets with sessions of one length. Blocks.

    Args:
        model: decodes.
        recipe: of all sessions.
        context: tokens of each, questions included.
        kv_bytes: of the device arena.
        host_bytes: bound of the host tier; what is admitted takes it.
        decodes: whether all go on to decode, which fills host memory.
    """
    longest = SyntheticContext(model, context + ANSWER_TOKENS + 64)
    shape = longest.spec.shape
    config = EngineConfig(kv_bytes=kv_bytes, host_bytes=host_bytes, max_batch=MOST_SESSIONS, max_prefills=1)
    engine = Engine(longest, config, NoWriter())
    try:
        # As much as an admitted call has: its tokens, and the beginning of its answer.
        need = footprint(shape, recipe, context + 64)
        fitting = engine.headroom().device_free_bytes // need.device_bytes
        if need.host_bytes:
            fitting = min(fitting, engine.headroom().host_free_bytes // need.host_bytes)

        def texts(number: int) -> tuple[int, ...]:
            # No two begin alike: nothing is shared.
            return tuple(random_ids(random.Random(SEED + number), context, shape.vocab_size))

        admitted = _fill(engine, recipe, texts)
        at_once = _decode(engine, recipe, texts, admitted) if decodes else 0
    finally:
        engine.close()
    return AdmittedRow(recipe.name, context, need.device_bytes, need.host_bytes, fitting, admitted, at_once)


def _fill(engine: Engine, recipe: RecipeSpec, texts: Texts) -> int:
    """Submits calls until one is refused; gives the number of those that weren't. Leaves the engine empty."""
    admitted = 0
    for number in range(MOST_SESSIONS):
        name, tokens = f"session-{number}", texts(number)
        try:
            engine.submit(_question(name, recipe, (), tokens[:-1], tokens[-1:]))
        except KVServiceError:
            break
        admitted += 1
    for number in range(admitted):
        engine.cancel(CallId(f"session-{number}"))
    _step_until_idle(engine)
    for number in range(admitted):
        engine.release(SessionId(f"session-{number}"))
    return admitted


def _decode(engine: Engine, recipe: RecipeSpec, texts: Texts, sessions: int) -> int:
    """Has as many documents read, and then questions about all of them asked at once; the most tokens of one step."""
    for number in range(sessions):
        name = f"session-{number}"
        engine.submit(
            EngineCall(CallId(f"read {name}"), SessionId(name), recipe, (), texts(number)[:-1], tenant_tag=_TAG)
        )
        _step_until_idle(engine)
    for number in range(sessions):
        tokens = texts(number)
        engine.submit(_question(f"session-{number}", recipe, tokens[:-1], (), tokens[-1:]))
    most = 0
    # One begins at each step.
    for _ in range(sessions + FURTHER_STEPS):
        events = engine.step()
        _check(events)
        most = max(most, sum(isinstance(event, TokenEvent) for event in events))
    return most


def _question(
    name: str, recipe: RecipeSpec, base: tuple[int, ...], document: tuple[int, ...], prompt: tuple[int, ...]
) -> EngineCall:
    sampling = SamplingParams(max_new_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
    return EngineCall(CallId(name), SessionId(name), recipe, base, document, prompt, sampling, tenant_tag=_TAG)


def _step_until_idle(engine: Engine) -> None:
    while engine.has_work:
        _check(engine.step())


def _check(events: Iterable[EngineEvent]) -> None:
    for event in events:
        if isinstance(event, FailedEvent):
            raise InternalError(f"an admitted call failed: {event.error}")
