"""Calls on an engine, to their end. Knows nothing of what is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from kvservice.engine import Engine
from kvservice.types import (
    CallId,
    EngineCall,
    FailedEvent,
    FinishedEvent,
    ProgressEvent,
    RecipeSpec,
    SessionId,
)

T = TypeVar("T")

Conversation = Generator[EngineCall, FinishedEvent, T]
"""Calls one after the other, each made in the light of how the last one ended, and what comes of them."""

Report = Callable[[int], None]
"""Told how many more tokens were read."""


def ignore_progress(num_tokens: int) -> None:
    """Reports to nobody."""


def read_document(
    engine: Engine,
    session_id: SessionId,
    recipe: RecipeSpec,
    token_ids: Sequence[int],
    report: Report = ignore_progress,
    *,
    base: Sequence[int] = (),
) -> None:
    """Reads a document into a session, which is opened if `base`, its tokens, are none. It stays until it is released.

    Raises:
        KVServiceError: it doesn't fit in the engine's budget, or has more tokens than the model has positions.
    """
    call = EngineCall(CallId("read"), session_id, recipe, tuple(base), document_tokens=tuple(token_ids))
    engine.submit(call)
    done = 0
    for event in _outcomes(engine, {call.call_id}):
        if isinstance(event, ProgressEvent):
            report(event.done_tokens - done)
            done = event.done_tokens


def converse(engine: Engine, conversations: Iterable[Conversation[T]], at_once: int) -> Iterator[T]:
    """Lets some conversations go on side by side: many that answer take little longer than one.

    All that are under way make their next call together, so that none reads while others answer.

    Args:
        engine: idle.
        conversations: each yields calls, of ids that no other uses, and is sent how each ended.
        at_once: so many at a time.

    Yields:
        Their results, in order.

    Raises:
        KVServiceError: a call failed.
    """
    waiting = iter(conversations)
    while some := list(islice(waiting, at_once)):
        results: dict[int, T] = {}
        ends: dict[int, FinishedEvent | None] = dict.fromkeys(range(len(some)))
        while ends:
            calls: dict[CallId, int] = {}
            for number, end in ends.items():
                try:
                    call = some[number].send(end) if end else next(some[number])
                except StopIteration as stop:
                    results[number] = stop.value
                else:
                    engine.submit(call)
                    calls[call.call_id] = number
            outcomes = _outcomes(engine, set(calls))
            ends = {calls[end.call_id]: end for end in outcomes if isinstance(end, FinishedEvent)}
        yield from (results[number] for number in range(len(some)))


def _outcomes(engine: Engine, call_ids: set[CallId]) -> Iterator[ProgressEvent | FinishedEvent]:
    """How calls come along, until all have ended; raises what one failed with."""
    while call_ids:
        for event in engine.step():
            match event:
                case FailedEvent():
                    raise event.error
                case FinishedEvent():
                    call_ids.discard(event.call_id)
                    yield event
                case ProgressEvent():
                    yield event
