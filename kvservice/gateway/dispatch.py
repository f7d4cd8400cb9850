"""Carries one call out on a worker: admission, its events, cancellation; on another one if it is lost before a token.

Knows nothing of sessions' records.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvservice.errors import KVServiceError, PromptTooLong, Unavailable
from kvservice.gateway.admission import Admission
from kvservice.gateway.placement import PlacementRequest, WorkerView
from kvservice.gateway.worker_link import RETRY_AFTER_S, WorkerCall
from kvservice.internal.v1 import worker_pb2
from kvservice.types import ModelInfo
from kvservice.v1 import common_pb2

logger = logging.getLogger(__name__)

MAX_FAILOVERS = 2
"""Workers that one call may lose, and still be given to another: a call that ends its workers mustn't end them all."""
CANCEL_TIMEOUT_S = 10.0
"""A worker frees a cancelled call between two steps; the session stays locked no longer than this for it."""


class Stopwatch:
    """Times of one call, from the gateway's receipt of it, and the time by which its caller wants it."""

    def __init__(self, time_remaining_s: float | None) -> None:
        """Starts; None: the caller waits as long as it takes."""
        self._received = time.monotonic()
        self.deadline = None if time_remaining_s is None else self._received + time_remaining_s
        """Seconds of `time.monotonic`."""
        self._queue_ms = 0.0
        self._ttft_ms = 0.0

    @property
    def has_token(self) -> bool:
        """Whether one has come."""
        return self._ttft_ms > 0.0

    def admitted(self) -> None:
        """A worker has taken the call."""
        self._queue_ms = self._elapsed_ms()

    def token(self) -> None:
        """A token has come; only the first one counts."""
        self._ttft_ms = self._ttft_ms or self._elapsed_ms()

    def timings(self, done: worker_pb2.Done) -> common_pb2.Timings:
        """What the answer says; prefill and decode are as the worker measured them."""
        return common_pb2.Timings(
            queue_ms=self._queue_ms,
            prefill_ms=done.prefill_ms,
            ttft_ms=self._ttft_ms,
            decode_ms=done.decode_ms,
            total_ms=self._elapsed_ms(),
        )

    def _elapsed_ms(self) -> float:
        return (time.monotonic() - self._received) * 1000.0


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked of the workers, and who hears of it as it happens."""

    request: PlacementRequest
    submit: worker_pb2.Submit
    on_admitted: Callable[[WorkerView], None]
    """Called again for each further worker, where one is lost before its first token."""
    on_event: Callable[[worker_pb2.CallEvent], None]
    """May raise what the call is to fail with."""
    deadline: float | None
    """When the worker gives the call up, in seconds of `time.monotonic`; None: when it is told to."""

    @property
    def keep_partial(self) -> bool:
        """Whether tokens of a cancelled call are wanted."""
        return self.submit.generate.keep_partial


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended, and where."""

    done: worker_pb2.Done
    worker: WorkerView


async def carry_out(admission: Admission, order: Order, watch: Stopwatch) -> Outcome:
    """Has `order` carried out by a worker. Call it inside `Run.cancellable()`.

    A worker that is lost, or drains, before its first token is followed by another one: that one brings the session
    back from what is stored, or computes it from its tokens.

    Raises:
        asyncio.CancelledError: the caller was cancelled; the worker has freed what the call held.
        KVServiceError: no worker took it, or the one that did failed or was lost.
    """
    failovers = 0
    while True:
        call = await admission.admit(order.request, order.submit, order.deadline)
        watch.admitted()
        order.on_admitted(call.worker)
        try:
            return await _attend(call, order, watch)
        except Unavailable as error:
            if watch.has_token or failovers == MAX_FAILOVERS:
                raise
            logger.warning("call_failed_over", extra={"worker_id": call.worker.worker_id, "why": error.message})
        failovers += 1
        admission.failed_over += 1
        # What the lost worker may yet say of the call is nobody's.
        order.submit.call_id = secrets.token_hex(16)


async def _attend(call: WorkerCall, order: Order, watch: Stopwatch) -> Outcome:
    """Follows an admitted call to its end."""
    try:
        done = await _relay(call, order, watch)
    except asyncio.CancelledError:
        call.cancel()
        last = await _last_words(call)
        if last is None or not _is_kept(order, last):
            raise
        done = last
    if done.finish_reasons[0] == common_pb2.FINISH_REASON_CANCELLED and not _is_kept(order, done):
        raise Unavailable(
            f"worker {call.worker.worker_id} cancelled the call; the session is as before, make the call again",
            reason="worker_cancelled",
            retry_after_s=RETRY_AFTER_S,
        )
    return Outcome(done, call.worker)


def _is_kept(order: Order, done: worker_pb2.Done) -> bool:
    return order.keep_partial and len(done.appended_token_ids) > 0


async def _relay(call: WorkerCall, order: Order, watch: Stopwatch) -> worker_pb2.Done:
    async for event in call.events():
        kind = event.WhichOneof("event")
        if kind == "done":
            return event.done
        if kind == "tokens":
            watch.token()
        try:
            order.on_event(event)
        except KVServiceError:
            # Nobody wants the rest of it.
            call.cancel()
            await _last_words(call)
            raise
    raise AssertionError("events end with done")


async def _last_words(call: WorkerCall) -> worker_pb2.Done | None:
    """The end of a cancelled call; None when it failed instead, or its worker doesn't answer."""
    try:
        async with asyncio.timeout(CANCEL_TIMEOUT_S):
            async for event in call.events():
                if event.WhichOneof("event") == "done":
                    return event.done
    except (KVServiceError, TimeoutError):
        pass
    return None


def check_positions(model: ModelInfo, *, held: int, added: int, max_new_tokens: int) -> None:
    """Refuses a call whose tokens the model has no positions for.

    Raises:
        PromptTooLong: they are too many; the message has the numbers.
    """
    total = held + added + max_new_tokens
    if total > model.shape.max_positions:
        raise PromptTooLong(
            f"{held} tokens held + {added} added + {max_new_tokens} to generate = {total}: model {model.name!r} has "
            f"{model.shape.max_positions} positions; send fewer tokens or ask for fewer",
            metadata={"num_tokens": str(total), "max_positions": str(model.shape.max_positions)},
        )
