"""What one gateway is still to be sent: a bounded queue between the engine thread and a gRPC stream.

Knows the internal protocol's messages and nothing of engines or sockets.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import NoReturn

from kvservice.errors import LimitExceeded
from kvservice.internal.convert import headroom_to_proto, model_to_proto
from kvservice.internal.v1 import worker_pb2
from kvservice.types import CallId, Headroom, ModelInfo, WorkerId
from kvservice.worker import convert
from kvservice.worker.call_spans import CallSpans
from kvservice.worker.outputs import Admission, Connected, Output, Released, Stepped

logger = logging.getLogger(__name__)


class GatewayStream:
    """A listener of the engine loop: takes outputs in the engine thread, gives messages in the event loop.

    The queue is bounded. A gateway that falls so far behind loses its stream, and so its calls: a worker must neither
    wait for it nor keep its messages for ever.
    """

    def __init__(
        self,
        key: int,
        gateway_id: str,
        worker_id: WorkerId,
        epoch: int,
        model: ModelInfo,
        max_messages: int,
    ) -> None:
        """Made in the event loop that will read `messages`. `key` tells this stream's calls from other streams'."""
        self.gateway_id = gateway_id
        self._prefix = f"{key}:"
        self._worker_id = worker_id
        self._spans = CallSpans()
        self._welcome = worker_pb2.Welcome(worker_id=worker_id, epoch=epoch, model=model_to_proto(model))
        self._max_messages = max_messages
        self._waiting: deque[tuple[Output, Headroom]] = deque()
        self._event_loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._overflow = asyncio.Event()
        self._has_overflowed = False  # The engine thread's own copy.
        self._has_ended = False
        self._told_prefixes: tuple[int, ...] | None = None

    def internal_id(self, call_id: str) -> CallId:
        """The worker's own name of the gateway's `call_id`."""
        return CallId(self._prefix + call_id)

    def trace(self, call_id: CallId, parent: str, session_id: str) -> str:
        """Has a call traced that is about to be submitted, if its gateway traces it; gives its span."""
        return self._spans.begin(call_id, parent, worker=self._worker_id, session_id=session_id)

    def deliver(self, output: Output, headroom: Headroom) -> None:
        """See `Listener`."""
        if self._has_overflowed:
            return
        if len(self._waiting) < self._max_messages:
            self._waiting.append((output, headroom))
            self._call_soon(self._news.set)
        else:
            self._has_overflowed = True
            self._call_soon(self._overflow.set)

    def end(self) -> None:
        """After what is waiting nothing follows: `messages` ends."""
        self._has_ended = True
        self._news.set()

    async def messages(self) -> AsyncIterator[worker_pb2.ConnectResponse]:
        """What to send, as it comes, until the end."""
        while True:
            self._news.clear()
            while self._waiting:
                self._spans.take(self._waiting[0][0])
                yield self._message(*self._waiting.popleft())
            if self._has_ended:
                return
            await self._news.wait()

    async def fail_on_overflow(self) -> NoReturn:
        """Waits until the gateway is too slow; what waits for it is dropped then.

        Raises:
            LimitExceeded: always.
        """
        await self._overflow.wait()
        self._waiting.clear()
        logger.warning("gateway_too_slow", extra={"gateway_id": self.gateway_id, "messages": self._max_messages})
        raise LimitExceeded(
            f"gateway {self.gateway_id!r} reads too slowly: {self._max_messages} messages wait for it; "
            "its calls on this worker are cancelled, connect again",
            reason="gateway_too_slow",
        )

    def _call_soon(self, callback: Callable[[], None]) -> None:
        try:
            self._event_loop.call_soon_threadsafe(callback)
        except RuntimeError:
            # The event loop is closed: nobody is left to read.
            self._waiting.clear()

    def _message(self, output: Output, headroom: Headroom) -> worker_pb2.ConnectResponse:
        message = worker_pb2.ConnectResponse(headroom=headroom_to_proto(headroom))
        if (prefixes := headroom.load.prefixes) is not self._told_prefixes:
            self._told_prefixes = prefixes
            message.held_prefixes.names.extend(prefixes)
            message.held_prefixes.SetInParent()
        match output:
            case Connected():
                message.welcome.CopyFrom(self._welcome)
            case Admission(call_id, refusal):
                message.admission.call_id = self._gateways_id(call_id)
                message.admission.admitted = refusal is None
                if refusal is not None:
                    message.admission.refusal.CopyFrom(convert.failure(refusal))
            case Stepped(events):
                message.step.SetInParent()
                message.step.events.extend(
                    convert.call_event(event, self._gateways_id(event.call_id)) for event in events
                )
            case Released(session_id, device_bytes, host_bytes, byte_seconds):
                message.released.device_byte_s = byte_seconds.device
                message.released.host_byte_s = byte_seconds.host
                message.released.session_id = session_id
                message.released.freed_device_bytes = device_bytes
                message.released.freed_host_bytes = host_bytes
        return message

    def _gateways_id(self, call_id: CallId) -> str:
        return call_id.removeprefix(self._prefix)
