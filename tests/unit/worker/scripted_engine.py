"""A scripted engine and a toy tokenizer: no model, no tensors, every step under the test's control."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvservice.errors import KVServiceError, NotFound
from kvservice.kv.occupancy import ByteSeconds
from kvservice.types import (
    CallId,
    EngineCall,
    EngineEvent,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    Headroom,
    KvTelemetry,
    ModelInfo,
    ModelShape,
    ProgressEvent,
    PromptFormat,
    SessionId,
    TextRole,
    TokenEvent,
    TokenLogprob,
    Usage,
    WorkerStats,
)

MODEL = ModelInfo(
    name="scripted",
    shape=ModelShape(
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        hidden_size=32,
        intermediate_size=64,
        vocab_size=0x110000,
        max_positions=8192,
    ),
    recipes=("dense", "exact", "recall"),
    default_recipe="recall",
    origin="scripted",
)


class ToyTokenStream:
    """A token is a code point."""

    def push(self, token_id: int) -> str:
        return chr(token_id)

    def flush(self) -> str:
        return ""


class ToyTokenizer:
    """A token is a code point; a question is put in brackets in chat form."""

    def __init__(self) -> None:
        self.may_encode = threading.Event()
        self.may_encode.set()

    def encode(self, text: str, role: TextRole, prompt_format: PromptFormat, *, first: bool) -> list[int]:
        assert self.may_encode.wait(20)
        if prompt_format is PromptFormat.CHAT and role is TextRole.QUESTION:
            text = f"[{text}]"
        return [ord(character) for character in ("^" if first else "") + text]

    def stream(self) -> ToyTokenStream:
        return ToyTokenStream()


@dataclass
class _Running:
    call: EngineCall
    generated: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, FinishReason] = field(default_factory=dict)
    cancelled: bool = False


class ScriptedEngine:
    """Answers a call with its own prompt, one token a step, over and over until `max_new_tokens`.

    Answer `i` begins at token `i` of the prompt. A prompt token 0 ends the answer (EOS). An Append reports progress,
    then ends. The log-probability of token `t` is -1 - t, whatever it is.
    """

    def __init__(self) -> None:
        self.info = MODEL
        self.thread = threading.current_thread()
        self.permits: threading.Semaphore | None = None
        """If set, every step takes one: the test decides when a step happens."""
        self.refusal: KVServiceError | Exception | None = None
        """What the next submits raise."""
        self.step_errors: list[Exception] = []
        """What the next steps raise, while a call runs."""
        self.call_error: Exception | None = None
        """What running calls fail with."""
        self.headroom_error: Exception | None = None
        self.check_error: Exception | None = None
        self.checks = 0
        self.cancelled: list[CallId] = []
        self.stopped: list[tuple[CallId, int]] = []
        self.submitted: list[EngineCall] = []
        self.purged: list[tuple[bytes, SessionId]] = []
        self.closed = False
        self.sessions: set[SessionId] = set()
        self._running: dict[CallId, _Running] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    def submit(self, call: EngineCall) -> None:
        self._check_thread()
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append(call)
        num_answers = call.sampling.n if call.sampling is not None else 0
        self._running[call.call_id] = _Running(call, {index: [] for index in range(num_answers)})
        self.sessions.add(call.session_id)

    def cancel(self, call_id: CallId) -> None:
        self._check_thread()
        self.cancelled.append(call_id)
        self._running[call_id].cancelled = True

    def stop(self, call_id: CallId, index: int) -> None:
        self._check_thread()
        self.stopped.append((call_id, index))
        self._running[call_id].reasons[index] = FinishReason.STOP

    def release(self, session_id: SessionId, tenant_tag: bytes, *, purge: bool) -> tuple[int, int]:
        self._check_thread()
        if purge:
            self.purged.append((tenant_tag, session_id))
        held = session_id in self.sessions
        self.sessions.discard(session_id)
        return (100, 200) if held else (0, 0)

    def take_byte_seconds(self, session_id: SessionId) -> ByteSeconds:
        self._check_thread()
        return ByteSeconds(2.5, 3.5)

    def fork(self, session_id: SessionId, fork_id: SessionId, num_tokens: int | None = None) -> None:
        self._check_thread()
        if session_id not in self.sessions:
            raise NotFound(f"session {session_id} is not on this device", reason="not_held")
        self.sessions.add(fork_id)

    def step(self) -> list[EngineEvent]:
        self._check_thread()
        if self.permits is not None:
            self.permits.acquire()
        if self.step_errors and not all(running.cancelled for running in self._running.values()):
            raise self.step_errors.pop(0)
        events: list[EngineEvent] = []
        for running in list(self._running.values()):
            events += self._step_call(running)
        return events

    def headroom(self) -> Headroom:
        self._check_thread()
        if self.headroom_error is not None:
            raise self.headroom_error
        return Headroom(
            device_capacity_bytes=1000,
            device_free_bytes=1000 - 10 * len(self._running),
            running_calls=len(self._running),
            resident_sessions=len(self.sessions),
        )

    def stats(self) -> WorkerStats:
        return WorkerStats(headroom=self.headroom(), weight_bytes=7, steps=3)

    def check(self) -> None:
        self._check_thread()
        assert not self._running, "a running engine was checked"
        self.checks += 1
        if self.check_error is not None:
            raise self.check_error

    def close(self) -> None:
        self._check_thread()
        self.closed = True

    def _step_call(self, running: _Running) -> Sequence[EngineEvent]:
        call, call_id = running.call, running.call.call_id
        if self.call_error is not None:
            del self._running[call_id]
            return [FailedEvent(call_id, self.call_error)]
        if running.cancelled:
            return [self._finish(running)]
        if call.sampling is None:
            total = len(call.document_tokens)
            return [ProgressEvent(call_id, total, total), self._finish(running)]
        events: list[EngineEvent] = []
        for index, generated in running.generated.items():
            if index in running.reasons:
                continue
            token = call.prompt_tokens[(index + len(generated)) % len(call.prompt_tokens)]
            if token == 0:
                running.reasons[index] = FinishReason.EOS
                continue
            generated.append(token)
            events.append(TokenEvent(call_id, token, index, _logprobs(call, token)))
            if len(generated) == call.sampling.max_new_tokens:
                running.reasons[index] = FinishReason.LENGTH
        if len(running.reasons) == call.sampling.n:
            events.append(self._finish(running))
        return events

    def _finish(self, running: _Running) -> FinishedEvent:
        call = running.call
        del self._running[call.call_id]
        other = FinishReason.CANCELLED if running.cancelled else FinishReason.LENGTH
        reasons = tuple(running.reasons.get(index, other) for index in running.generated) or (other,)
        first = running.generated.get(0, [])
        return FinishedEvent(
            call.call_id,
            reasons,
            Usage(len(call.base_tokens), len(call.prompt_tokens), sum(map(len, running.generated.values()))),
            KvTelemetry(window_bytes=64),
            () if running.cancelled else (*call.document_tokens, *call.prompt_tokens, *first),
            prefill_ms=1.5,
            decode_ms=2.5,
        )

    def _check_thread(self) -> None:
        assert threading.current_thread() is self.thread, "the engine was touched from another thread"


def _logprobs(call: EngineCall, token: int) -> tuple[TokenLogprob, ...]:
    if call.sampling is None or call.sampling.logprobs is None:
        return ()
    likeliest = [TokenLogprob(number, -1.0 - number) for number in range(call.sampling.logprobs)]
    return (TokenLogprob(token, -1.0 - token), *likeliest)
