"""Calls on an engine, one at a time and to their end. Knows nothing of what is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvservice.engine import Engine
from kvservice.types import (
    CallId,
    EngineCall,
    FailedEvent,
    FinishedEvent,
    ProgressEvent,
    RecipeSpec,
    SamplingParams,
    SessionId,
)

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
) -> None:
    """Opens a session and reads a document into it. The session stays until it is released.

    Raises:
        KVServiceError: it doesn't fit in the engine's budget, or has more tokens than the model has positions.
    """
    call = EngineCall(CallId("read"), session_id, recipe, base_tokens=(), document_tokens=tuple(token_ids))
    _finish(engine, call, report)


def go_on(
    engine: Engine,
    session_id: SessionId,
    recipe: RecipeSpec,
    token_ids: Sequence[int],
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    ignore_eos: bool = False,
) -> list[int]:
    """What a session of `token_ids` says greedily after a prompt. The session then has that as well.

    Raises:
        KVServiceError: as `read_document`.
    """
    call = EngineCall(
        CallId("go on"),
        session_id,
        recipe,
        base_tokens=tuple(token_ids),
        prompt_tokens=tuple(prompt),
        sampling=SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=ignore_eos),
    )
    return list(_finish(engine, call, ignore_progress).appended_tokens[len(prompt) :])


def _finish(engine: Engine, call: EngineCall, report: Report) -> FinishedEvent:
    engine.submit(call)
    done = 0
    while True:
        for event in engine.step():
            match event:
                case ProgressEvent():
                    report(event.done_tokens - done)
                    done = event.done_tokens
                case FailedEvent():
                    raise event.error
                case FinishedEvent():
                    return event
