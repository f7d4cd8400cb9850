"""What the engine loop hands over, and what a step's raw events become before. Knows no thread and no message."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from kvservice.errors import InternalError, KVServiceError
from kvservice.kv.occupancy import ByteSeconds
from kvservice.types import (
    CallId,
    EngineEvent,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    Headroom,
    ProgressEvent,
    SessionId,
    TokenEvent,
    TokenLogprob,
)
from kvservice.worker.answer import AnswerText

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TextEvent:
    """Tokens of an answer, and the text that may be shown for them (and for earlier ones)."""

    call_id: CallId
    token_ids: tuple[int, ...]
    text: str
    index: int = 0
    """Which of the call's answers."""
    logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    """If asked for: of each token, as in TokenEvent."""


CallOutput = ProgressEvent | TextEvent | FinishedEvent | FailedEvent


@dataclass(frozen=True, slots=True)
class Connected:
    """First output to a listener."""


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer to a submitted call; `refusal` None: admitted. Comes before the call's first event."""

    call_id: CallId
    refusal: KVServiceError | None


@dataclass(frozen=True, slots=True)
class Stepped:
    """All that one step gave to the listener's calls. Without events only the headroom is news."""

    events: tuple[CallOutput, ...]


@dataclass(frozen=True, slots=True)
class Released:
    """The answer to a release."""

    session_id: SessionId
    device_bytes: int
    host_bytes: int
    byte_seconds: ByteSeconds


Output = Connected | Admission | Stepped | Released


class Listener(Protocol):
    """Who submitted calls. Compared by identity."""

    def deliver(self, output: Output, headroom: Headroom) -> None:
        """Takes an output. Called in the engine thread: must neither block nor raise."""


def call_outputs(event: EngineEvent, answers: Sequence[AnswerText]) -> list[CallOutput]:
    """What an engine's event is to the call's listener; `answers`: the texts of the call's answers, by index."""
    match event:
        case TokenEvent():
            return _token_outputs(event, answers[event.index])
        case FinishedEvent() if answers:
            return _finished_outputs(event, answers)
        case FailedEvent(call_id, error) if not isinstance(error, KVServiceError):
            logger.error("call_failed", extra={"call_id": call_id}, exc_info=error)
            return [FailedEvent(call_id, InternalError("the call failed inside; the worker's log says why"))]
        case _:
            return [event]


def _token_outputs(event: TokenEvent, answer: AnswerText) -> list[CallOutput]:
    if answer.stopped:
        return []
    logprobs = (event.logprobs,) if event.logprobs else ()
    return [TextEvent(event.call_id, (event.token_id,), answer.push(event.token_id), event.index, logprobs)]


def _finished_outputs(event: FinishedEvent, answers: Sequence[AnswerText]) -> list[CallOutput]:
    outputs: list[CallOutput] = []
    reasons: list[FinishReason] = []
    for index, (answer, reason) in enumerate(zip(answers, event.finish_reasons, strict=True)):
        if rest := answer.finish():
            outputs.append(TextEvent(event.call_id, (), rest, index))
        # The last token may have completed a stop string.
        is_cut = answer.stopped and reason in (FinishReason.LENGTH, FinishReason.EOS)
        reasons.append(FinishReason.STOP if is_cut else reason)
    return [*outputs, replace(event, finish_reasons=tuple(reasons))]


def is_served(event: EngineEvent) -> bool:
    """Whether the engine got on with a call."""
    return not isinstance(event, FailedEvent) and not (
        isinstance(event, FinishedEvent) and event.finish_reason is FinishReason.CANCELLED
    )


def is_fault(event: EngineEvent) -> bool:
    """Whether the engine, not the call, was at fault."""
    return isinstance(event, FailedEvent) and (
        isinstance(event.error, InternalError) or not isinstance(event.error, KVServiceError)
    )
