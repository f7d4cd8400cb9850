"""An engine that computes nothing, so that what is measured is the gateway."""

from __future__ import annotations

from collections.abc import Sequence

from kvservice.kv.occupancy import ByteSeconds
from kvservice.types import (
    CallId,
    ChatMessage,
    EngineCall,
    EngineEvent,
    FinishedEvent,
    FinishReason,
    Headroom,
    KvTelemetry,
    Load,
    ModelInfo,
    ModelShape,
    ProgressEvent,
    PromptFormat,
    SessionId,
    TextRole,
    TokenEvent,
    Usage,
    WorkerStats,
)

ROOM = 1 << 50
"""Bytes: there is always room."""

MODEL = ModelInfo(
    name="instant",
    shape=ModelShape(
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        hidden_size=64,
        intermediate_size=128,
        vocab_size=256,
        max_positions=8192,
    ),
    recipes=("recall",),
    default_recipe="recall",
    origin="nothing is computed",
)


class InstantTokens:
    """A token is a byte."""

    def push(self, token_id: int) -> str:
        """Its character."""
        return chr(token_id)

    def flush(self) -> str:
        """Nothing is held back."""
        return ""


class InstantTokenizer:
    """A token is a byte."""

    def encode(self, text: str, role: TextRole, prompt_format: PromptFormat, *, first: bool) -> Sequence[int]:  # noqa: ARG002
        """The bytes of a text."""
        return list(text.encode())

    def encode_chat(self, messages: Sequence[ChatMessage], *, first: bool) -> tuple[Sequence[int], Sequence[int]]:  # noqa: ARG002
        """The bytes of the last message."""
        return [], list(messages[-1].content.encode())

    def stream(self) -> InstantTokens:
        """A fresh one."""
        return InstantTokens()


class InstantEngine:
    """Answers with one token. A call that asked for more stays open after it, until it is cancelled."""

    def __init__(self) -> None:
        self.info = MODEL
        self._calls: dict[CallId, EngineCall] = {}
        self._pending: list[EngineEvent] = []

    @property
    def has_work(self) -> bool:
        """Whether an event waits."""
        return bool(self._pending)

    def submit(self, call: EngineCall) -> None:
        """Takes the call, and has its events at the next step."""
        if call.sampling is None:
            tokens = len(call.document_tokens)
            self._pending += [ProgressEvent(call.call_id, tokens, tokens), _end(call, ())]
            return
        token = call.prompt_tokens[0] if call.prompt_tokens else 32
        self._pending.append(TokenEvent(call.call_id, token))
        if call.sampling.max_new_tokens == 1:
            self._pending.append(_end(call, (token,)))
        else:
            self._calls[call.call_id] = call

    def cancel(self, call_id: CallId) -> None:
        """Ends an open call."""
        call = self._calls.pop(call_id, None)
        if call is not None:
            self._pending.append(_end(call, (), FinishReason.CANCELLED))

    def stop(self, call_id: CallId, index: int) -> None:  # noqa: ARG002
        """No call here has stop strings."""
        self.cancel(call_id)

    def release(self, session_id: SessionId, tenant_tag: bytes, *, purge: bool) -> tuple[int, int]:  # noqa: ARG002
        """Nothing is held."""
        return 0, 0

    def take_byte_seconds(self, session_id: SessionId) -> ByteSeconds:  # noqa: ARG002
        """Nothing is held."""
        return ByteSeconds(0.0, 0.0)

    def fork(self, session_id: SessionId, fork_id: SessionId, num_tokens: int | None = None) -> None:
        """Nothing is held."""

    def step(self) -> Sequence[EngineEvent]:
        """All events that wait."""
        events, self._pending = self._pending, []
        return events

    def headroom(self) -> Headroom:
        """Always room."""
        return Headroom(ROOM, ROOM, ROOM, ROOM, ROOM, ROOM, running_calls=len(self._calls), load=Load(0, 1e9))

    def stats(self) -> WorkerStats:
        """Nothing but the headroom."""
        return WorkerStats(headroom=self.headroom())

    def check(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


def _end(call: EngineCall, answer: tuple[int, ...], reason: FinishReason = FinishReason.LENGTH) -> FinishedEvent:
    appended = () if reason is FinishReason.CANCELLED else (*call.document_tokens, *call.prompt_tokens, *answer)
    usage = Usage(len(call.base_tokens), len(call.prompt_tokens) + len(call.document_tokens), len(answer))
    return FinishedEvent(call.call_id, (reason,), usage, KvTelemetry(), appended, prefill_ms=0.0, decode_ms=0.0)
