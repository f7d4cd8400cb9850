"""The one thread that owns the engine: takes commands between steps, hands over what each step gave.

    any thread ──commands──► queue ──► engine thread: commands · step · text · deliver ──► listeners

Nobody else touches the engine. With nothing to do the thread blocks on the queue. Knows nothing of gRPC, protobuf or
asyncio: a listener gets its part of a step in one call, in the engine thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from kvservice.engine.faults import step_failure
from kvservice.errors import Conflict, InternalError, KVServiceError, NotFound, Overloaded, Unavailable
from kvservice.kv.occupancy import ByteSeconds
from kvservice.types import (
    CallId,
    EngineCall,
    EngineEvent,
    FailedEvent,
    FinishedEvent,
    Headroom,
    ModelInfo,
    SessionId,
    TokenEvent,
    WorkerStats,
)
from kvservice.worker.answer import AnswerText, TokenStream
from kvservice.worker.outputs import (
    Admission,
    CallOutput,
    Connected,
    Listener,
    Output,
    Released,
    Stepped,
    call_outputs,
    is_fault,
    is_served,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_FAULTS_IN_A_ROW = 3
"""After so many steps that went wrong inside, with no call served between them, the engine gets no more work."""

KV_MISSING = "kv_missing"
"""Reason of an engine's refusal of a call that must not compute anything again."""

CHECK_INTERVAL_S = 1.0
"""An engine that falls idle more often isn't checked each time."""


class EngineLike(Protocol):
    """What the loop needs of an engine. Every method is called in the engine thread only."""

    @property
    def info(self) -> ModelInfo:
        """The model it runs."""

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something, a pending event included."""

    def submit(self, call: EngineCall) -> None:
        """Admits a call or raises a KVServiceError that says why not; on an error nothing has changed."""

    def cancel(self, call_id: CallId) -> None:
        """Frees what the call holds; the next `step` gives its FinishedEvent(CANCELLED)."""

    def stop(self, call_id: CallId, index: int) -> None:
        """Ends one of a call's answers with FinishReason.STOP at the next `step`."""

    def release(self, session_id: SessionId, tenant_tag: bytes, *, purge: bool) -> tuple[int, int]:
        """Drops a session's KV, with `purge` its stored blobs too: (device, host) bytes freed."""

    def take_byte_seconds(self, session_id: SessionId) -> ByteSeconds:
        """What a session's KV has taken since its last call's end."""

    def fork(self, session_id: SessionId, fork_id: SessionId, num_tokens: int | None = None) -> None:
        """Makes a session's KV known under one more name. Raises NotFound or Overloaded if that can't be."""

    def step(self) -> Sequence[EngineEvent]:
        """One batch step. Failures of a call are FailedEvents; an exception is a fault of the engine."""

    def headroom(self) -> Headroom:
        """What is left now."""

    def stats(self) -> WorkerStats:
        """The counters."""

    def check(self) -> None:
        """Raises unless what it holds adds up. Called when no call runs."""

    def close(self) -> None:
        """Frees everything."""


class Detokenizer(Protocol):
    """Where the text of answers comes from."""

    def stream(self) -> TokenStream:
        """A fresh stream for one answer."""


@dataclass(slots=True)
class _RunningCall:
    listener: Listener
    answers: tuple[AnswerText, ...]


@dataclass(frozen=True, slots=True)
class _Command:
    run: Callable[[], None]
    abandon: Callable[[KVServiceError], None]


class EngineLoop:
    """Runs an engine in a thread of its own. All methods may be called from any thread and none blocks.

    Call ids must be unique among all listeners.
    """

    def __init__(
        self,
        engine_factory: Callable[[], EngineLike],
        detokenizer: Detokenizer,
        on_unhealthy: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        on_ended: Callable[[CallId, FinishedEvent | None], None] | None = None,
    ) -> None:
        """`engine_factory` is called in the engine thread; `on_unhealthy` too, once, when the engine is given up.

        `on_ended` is called there for each call that was submitted, once it was refused or has ended, with its end if
        it ended well. It must neither block nor raise.
        """
        self._on_ended = on_ended or _nobody_asked
        self._engine_factory = engine_factory
        self._engine: EngineLike
        self._detokenizer = detokenizer
        self._on_unhealthy = on_unhealthy
        self._clock = clock
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._started: Future[ModelInfo] = Future()
        self._stopped: Future[None] = Future()
        self._ended = threading.Event()
        # From here on, the engine thread's alone.
        self._calls: dict[CallId, _RunningCall] = {}
        self._listeners: set[Listener] = set()
        self._idle_waiters: list[Future[None]] = []
        self._last_headroom = Headroom()
        self._faults_in_a_row = 0
        self._refusal: Unavailable | None = None
        self._healthy = True
        self._stopping = False
        self._unchecked = False
        """A step has been made since the engine was checked."""
        self._checked_at = -CHECK_INTERVAL_S
        self.num_faults = 0
        """Steps that went wrong inside, since the start."""

    def start(self) -> Future[ModelInfo]:
        """Starts the thread. The future holds the engine's model once it is ready, or what its factory raised."""
        self._thread.start()
        return self._started

    def connect(self, listener: Listener) -> None:
        """Adds a listener; it is answered by Connected, and told when the worker begins to drain."""
        self._tell(lambda: self._connect(listener))

    def disconnect(self, listener: Listener) -> None:
        """Cancels the listener's calls and forgets it; nothing more is delivered to it."""
        self._tell(lambda: self._disconnect(listener))

    def submit(self, listener: Listener, call: EngineCall, on_probed: Callable[[int], None] | None = None) -> None:
        """Submits a call; answered by an Admission.

        Args:
            listener: who hears of it.
            call: the call.
            on_probed: the call is a probe, which fails when KV is missing. Called in the engine thread with of how many
                tokens it is; if it is, that is all the answer. Must neither block nor raise.
        """
        self._tell(lambda: self._submit(listener, call, on_probed))

    def fork(self, session_id: SessionId, fork_id: SessionId, num_tokens: int | None = None) -> Future[bool]:
        """Makes a session's KV, or that of its first tokens, known under one more name.

        False if it isn't held where that is possible.
        """
        return self._ask(lambda: self._fork(session_id, fork_id, num_tokens))

    def drop(self, session_id: SessionId) -> Future[None]:
        """Drops a session's KV, whoever holds it."""
        return self._ask(lambda: self._drop(session_id))

    def refuse(self, listener: Listener, call_id: CallId, error: KVServiceError) -> None:
        """Answers a call that never reaches the engine, with fresh headroom like any refusal."""
        self._tell(lambda: self._deliver(listener, Admission(call_id, error)))

    def cancel(self, call_id: CallId) -> None:
        """Cancels a call; one that has ended already is none."""
        self._tell(lambda: self._cancel(call_id))

    def release(self, listener: Listener, session_id: SessionId, tenant_tag: bytes, *, purge: bool) -> None:
        """Drops a session's KV, with `purge` its stored blobs too; answered by Released once that is done."""
        self._tell(lambda: self._release(listener, session_id, tenant_tag, purge=purge))

    def stats(self) -> Future[WorkerStats]:
        """The engine's counters. The future holds Unavailable when the loop ends first."""
        return self._ask(self._stats)

    def beat(self) -> Future[bool]:
        """Done when the loop comes by: whether its engine can be trusted. Holds Unavailable when it ends first."""
        return self._ask(lambda: self._healthy)

    def drain(self) -> Future[int]:
        """From now on refuses new calls; tells every listener. Gives the number of calls that still run."""
        return self._ask(self._drain)

    def idle(self) -> Future[None]:
        """Done when no call runs, or when the loop has ended."""
        waiter: Future[None] = Future()
        self._post(_Command(lambda: self._idle_waiters.append(waiter), lambda _: _resolve(waiter, None)))
        return waiter

    def fail_running(self, error: KVServiceError) -> None:
        """Ends every running call with `error`."""
        self._tell(lambda: self._fail_running(error))

    def stop(self) -> Future[None]:
        """Ends running calls, closes the engine and ends the thread. Done when the engine is closed."""
        if self._thread.ident is None:
            self._end()
        else:
            self._tell(self._stop)
        return self._stopped

    def _post(self, command: _Command) -> None:
        self._commands.put(command)
        if self._ended.is_set():
            # The thread may have emptied the queue before this command was in it.
            self._abandon_commands()

    def _tell(self, run: Callable[[], None]) -> None:
        self._post(_Command(run, lambda _: None))

    def _ask(self, run: Callable[[], T]) -> Future[T]:
        answer: Future[T] = Future()
        self._post(_Command(lambda: _resolve(answer, run()), lambda error: _fail(answer, error)))
        return answer

    def _abandon_commands(self) -> None:
        while True:
            try:
                self._commands.get_nowait().abandon(Unavailable("the worker has stopped", reason="stopped"))
            except queue.Empty:
                return

    # ── in the engine thread ────────────────────────────────────────────────────────────────────────────────────────

    def _main(self) -> None:
        try:
            self._engine = self._engine_factory()
            info = self._engine.info
        except BaseException as error:  # noqa: BLE001 (it is handed to whoever waits for the start)
            self._end()
            _fail(self._started, error)
            return
        _resolve(self._started, info)
        try:
            while not self._stopping:
                self._take_commands(wait=not self._can_step())
                if self._can_step() and not self._stopping:
                    self._step()
                if not self._calls:
                    self._wake_idle_waiters()
                if not self._calls and not self._can_step() and not self._stopping:
                    self._check_engine()
        finally:
            if not self._stopping:
                self._on_unhealthy()
            self._close_engine()
            self._end()

    def _can_step(self) -> bool:
        return self._healthy and self._engine.has_work

    def _take_commands(self, *, wait: bool) -> None:
        """Carries out what is in the queue; with `wait`, blocks for the first."""
        try:
            command = self._commands.get(block=wait)
            while True:
                self._carry_out(command)
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _carry_out(self, command: _Command) -> None:
        try:
            command.run()
        except Exception:
            # The loop must live; a command's own errors are answered where they are expected.
            logger.exception("engine_command_failed")
            command.abandon(InternalError("the engine failed to do it; the worker's log says why"))

    def _connect(self, listener: Listener) -> None:
        self._listeners.add(listener)
        self._deliver(listener, Connected())

    def _disconnect(self, listener: Listener) -> None:
        self._listeners.discard(listener)
        for call_id in [call_id for call_id, call in self._calls.items() if call.listener is listener]:
            del self._calls[call_id]
            self._engine.cancel(call_id)
            self._on_ended(call_id, None)
        self._tell_of_room(())

    def _submit(self, listener: Listener, call: EngineCall, on_probed: Callable[[int], None] | None) -> None:
        refusal: KVServiceError | None = None
        try:
            self._admit(listener, call)
        except KVServiceError as error:
            refusal = error
        except Exception:
            logger.exception("submit_failed", extra={"call_id": call.call_id})
            refusal = InternalError("the engine failed to take the call; the worker's log says why")
        is_missing = refusal is not None and refusal.reason == KV_MISSING
        if on_probed is not None:
            on_probed(int(refusal.metadata["num_missing"]) if refusal is not None and is_missing else 0)
            if is_missing:
                return
        if refusal is not None:
            logger.info("call_refused", extra={"call_id": call.call_id, "reason": refusal.reason})
            self._on_ended(call.call_id, None)
        self._deliver(listener, Admission(call.call_id, refusal))

    def _admit(self, listener: Listener, call: EngineCall) -> None:
        if self._refusal is not None:
            raise self._refusal
        if listener not in self._listeners:
            raise Unavailable("the stream that submitted the call has ended", reason="stream_ended")
        if call.call_id in self._calls:
            raise Conflict(f"call_id {call.call_id!r} is running already: choose a new one", reason="call_id_in_use")
        answers: tuple[AnswerText, ...] = ()
        if (sampling := call.sampling) is not None:
            answers = tuple(AnswerText(self._detokenizer.stream(), sampling.stop) for _ in range(sampling.n))
        self._engine.submit(call)
        self._calls[call.call_id] = _RunningCall(listener, answers)

    def _cancel(self, call_id: CallId) -> None:
        if call_id in self._calls:
            self._engine.cancel(call_id)

    def _release(self, listener: Listener, session_id: SessionId, tenant_tag: bytes, *, purge: bool) -> None:
        device_bytes, host_bytes = self._engine.release(session_id, tenant_tag, purge=purge)
        byte_seconds = self._engine.take_byte_seconds(session_id)
        self._deliver(listener, Released(session_id, device_bytes, host_bytes, byte_seconds))
        if device_bytes or host_bytes:
            self._tell_of_room((listener,))

    def _fork(self, session_id: SessionId, fork_id: SessionId, num_tokens: int | None) -> bool:
        try:
            self._engine.fork(session_id, fork_id, num_tokens)
        except (NotFound, Overloaded) as error:
            logger.info("session_not_forked_here", extra={"session_id": session_id, "why": error.message})
            return False
        return True

    def _drop(self, session_id: SessionId) -> None:
        self._engine.release(session_id, b"", purge=False)

    def _stats(self) -> WorkerStats:
        return replace(self._engine.stats(), headroom=self._headroom())

    def _drain(self) -> int:
        if self._refusal is None:
            self._refuse_from_now(Unavailable("the worker is draining: call again", reason="draining"))
        return len(self._calls)

    def _refuse_from_now(self, refusal: Unavailable) -> None:
        self._refusal = refusal
        for listener in self._listeners:
            self._deliver(listener, Stepped(()))

    def _stop(self) -> None:
        self._fail_running(Unavailable("the worker has stopped: call again", reason="stopped"))
        self._stopping = True

    def _fail_running(self, error: KVServiceError) -> None:
        calls, self._calls = self._calls, {}
        outputs: dict[Listener, list[CallOutput]] = {}
        for call_id, call in calls.items():
            outputs.setdefault(call.listener, []).append(FailedEvent(call_id, error))
            self._on_ended(call_id, None)
            try:
                self._engine.cancel(call_id)
            except Exception:
                # After a fault of the engine this may fault too; the other calls must still be told.
                logger.exception("cancel_failed", extra={"call_id": call_id})
        self._deliver_step(outputs)

    def _step(self) -> None:
        self._unchecked = True
        try:
            events = self._engine.step()
            running = len(self._calls)
            outputs = self._take_events(events)
            self._deliver_step(outputs)
            if len(self._calls) < running:
                self._tell_of_room([listener for listener, told in outputs.items() if told])
        except Exception as error:
            logger.exception("step_failed", extra={"running_calls": len(self._calls)})
            failure = step_failure(error)
            self._fail_running(failure)
            if isinstance(failure, InternalError):
                self._note_fault()
            return
        if any(is_served(event) for event in events):
            self._faults_in_a_row = 0
        elif any(is_fault(event) for event in events):
            self._note_fault()

    def _note_fault(self) -> None:
        self.num_faults += 1
        self._faults_in_a_row += 1
        if self._faults_in_a_row >= MAX_FAULTS_IN_A_ROW:
            self._give_up("the worker's engine fails again and again: call another worker")

    def _check_engine(self) -> None:
        """Has the engine checked once it has become idle, when that costs nobody time."""
        now = self._clock()
        if not self._healthy or not self._unchecked or now - self._checked_at < CHECK_INTERVAL_S:
            return
        self._unchecked, self._checked_at = False, now
        try:
            self._engine.check()
        except Exception:
            # Whatever it says: an engine whose books are wrong can't be trusted with another session.
            logger.exception("engine_check_failed")
            self.num_faults += 1
            self._give_up("the worker's engine has lost count of its memory: call another worker")

    def _give_up(self, why: str) -> None:
        logger.error("engine_given_up", extra={"faults": self.num_faults})
        self._healthy = False
        self._fail_running(InternalError("the worker's engine was given up; its log says why"))
        self._refuse_from_now(Unavailable(why, reason="unhealthy"))
        self._on_unhealthy()

    def _take_events(self, events: Sequence[EngineEvent]) -> dict[Listener, list[CallOutput]]:
        """Post-processes a step: text from tokens, stop strings, the end of calls."""
        outputs: dict[Listener, list[CallOutput]] = {}
        stopped: list[tuple[CallId, int]] = []
        for event in events:
            call = self._calls.get(event.call_id)
            if call is None:
                continue  # Its listener has gone, or was told of a failure already.
            answer = call.answers[event.index] if isinstance(event, TokenEvent) else None
            was_stopped = _is_stopped(answer)
            outputs.setdefault(call.listener, []).extend(call_outputs(event, call.answers))
            if isinstance(event, FinishedEvent | FailedEvent):
                del self._calls[event.call_id]
                self._on_ended(event.call_id, event if isinstance(event, FinishedEvent) else None)
            elif isinstance(event, TokenEvent) and _is_stopped(answer) and not was_stopped:
                stopped.append((event.call_id, event.index))
        for call_id, index in stopped:
            if call_id in self._calls:
                self._engine.stop(call_id, index)
        return outputs

    def _deliver_step(self, outputs: dict[Listener, list[CallOutput]]) -> None:
        for listener, events in outputs.items():
            if events:
                self._deliver(listener, Stepped(tuple(events)))

    def _tell_of_room(self, told: Collection[Listener]) -> None:
        """Bytes were freed: all but those that were `told` just now get headroom, as calls may wait there for it."""
        for listener in self._listeners:
            if listener not in told:
                self._deliver(listener, Stepped(()))

    def _deliver(self, listener: Listener, output: Output) -> None:
        listener.deliver(output, self._headroom())

    def _headroom(self) -> Headroom:
        try:
            self._last_headroom = self._engine.headroom()
        except Exception:
            # A faulty engine must not keep its failures from being told; the last hint does.
            logger.exception("headroom_failed")
        return self._last_headroom if self._refusal is None else replace(self._last_headroom, draining=True)

    def _wake_idle_waiters(self) -> None:
        waiters, self._idle_waiters = self._idle_waiters, []
        for waiter in waiters:
            _resolve(waiter, None)

    def _close_engine(self) -> None:
        try:
            self._engine.close()
        except Exception:
            logger.exception("engine_close_failed")

    def _end(self) -> None:
        self._ended.set()
        self._abandon_commands()
        self._wake_idle_waiters()
        _resolve(self._stopped, None)


def _nobody_asked(_call_id: CallId, _end: FinishedEvent | None) -> None:
    """Nobody wants to know that a call has ended."""


def _is_stopped(answer: AnswerText | None) -> bool:
    return answer is not None and answer.stopped


def _resolve(answer: Future[T], value: T) -> None:
    """Sets a result, unless nobody waits any more."""
    if not answer.done() and answer.set_running_or_notify_cancel():
        answer.set_result(value)


def _fail(answer: Future[T], error: BaseException) -> None:
    """Sets an error, unless nobody waits any more."""
    if not answer.done() and answer.set_running_or_notify_cancel():
        answer.set_exception(error)
