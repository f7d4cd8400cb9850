"""One connected worker: its stream, and the calls that run on it. Knows nothing of sessions' contents or of tenants.

Events stay protobuf messages here and above: they are relayed, not looked into.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

import grpc

from kvservice.errors import QUOTA_KEY, KVServiceError, Unavailable, error_class
from kvservice.gateway.placement import WorkerView
from kvservice.internal import convert
from kvservice.internal.tls import PemFiles, channel_credentials, server_name_options
from kvservice.internal.v1 import worker_pb2, worker_pb2_grpc
from kvservice.store.base import WorkerRecord
from kvservice.store.tasks import end_tasks
from kvservice.telemetry.tracing import TRACING
from kvservice.types import CallId, Headroom, PromptFormat, SessionId, TenantId, TextRole, WorkerId
from kvservice.v1 import admin_pb2, common_pb2

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
UNARY_TIMEOUT_S = 60.0
"""The longest a worker takes to tokenise the largest document."""
ADMISSION_TIMEOUT_S = 60.0
"""A worker answers between two steps of its engine; a step is never longer than this."""
VERIFY_TIMEOUT_S = 600.0
"""The longest a worker takes to read all that is stored of a tenant."""
RETRY_AFTER_S = 1.0

_OPTIONS = (
    # Both ends are ours: a session's tokens go in one message.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Each link has a connection of its own, so that a restarted worker isn't met with the backoff of its predecessor.
    ("grpc.use_local_subchannel_pool", 1),
    # A network that was cut is tried again soon: an attempt that nobody answers waits ever longer by itself.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A worker that is frozen, or cut off without a word, is lost after these two.
    ("grpc.keepalive_time_ms", 3_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(frozen=True, slots=True)
class ChannelSecurity:
    """Mutual TLS to workers; their certificates hold `server_name`."""

    files: PemFiles
    server_name: str


def _channel(address: str, security: ChannelSecurity | None) -> grpc.aio.Channel:
    if security is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    options = (*_OPTIONS, *server_name_options(security.server_name))
    return grpc.aio.secure_channel(address, channel_credentials(security.files), options=options)


def failure_error(failure: worker_pb2.Failure) -> KVServiceError:
    """The error that a worker reported."""
    cls = error_class(failure.code, failure.reason, retryable=failure.retryable)
    retry_after_s = RETRY_AFTER_S if cls.retryable else None
    metadata = {QUOTA_KEY: failure.quota} if failure.quota else None
    return cls(failure.message, reason=failure.reason, retry_after_s=retry_after_s, metadata=metadata)


def _is_refused(answer: asyncio.Future[worker_pb2.Admission]) -> bool:
    if not answer.done() or answer.cancelled():
        return False
    return answer.exception() is not None or not answer.result().admitted


def _rpc_error(error: grpc.aio.AioRpcError, worker_id: WorkerId) -> KVServiceError:
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return _lost(worker_id)
    cls = error_class(error.code().name, "", retryable=False)
    return cls(error.details() or f"worker {worker_id} answered {error.code().name}")


def _lost(worker_id: WorkerId) -> Unavailable:
    return Unavailable(
        f"worker {worker_id} was lost during the call; the session is as before, make the call again",
        reason="worker_lost",
        retry_after_s=RETRY_AFTER_S,
    )


class WorkerCall:
    """A call that a worker has admitted."""

    def __init__(self, call_id: CallId, link: WorkerLink) -> None:
        self.call_id = call_id
        self._link = link
        self._events: asyncio.Queue[worker_pb2.CallEvent | KVServiceError] = asyncio.Queue()

    @property
    def worker(self) -> WorkerView:
        """The worker it runs on."""
        return self._link.view

    async def events(self) -> AsyncIterator[worker_pb2.CallEvent]:
        """Progress and tokens, then `done`.

        Raises:
            KVServiceError: the worker reported a failure, or was lost.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, KVServiceError):
                raise event
            yield event
            if event.WhichOneof("event") == "done":
                return

    def cancel(self) -> None:
        """Asks the worker to end the call; `events` goes on to its `done`. Never blocks."""
        self._link.send(worker_pb2.ConnectRequest(cancel=worker_pb2.Cancel(call_id=self.call_id)))

    def deliver(self, event: worker_pb2.CallEvent | KVServiceError) -> None:
        """Called by the link."""
        self._events.put_nowait(event)


class WorkerLink:
    """The stream to one worker. `on_change` is called when headroom changes and when the worker is lost.

    Without `security` the worker is on loopback, without TLS.
    """

    def __init__(
        self,
        record: WorkerRecord,
        gateway_id: str,
        on_change: Callable[[], None],
        security: ChannelSecurity | None = None,
    ) -> None:
        self.record = record
        self.closed = False
        self._gateway_id = gateway_id
        self._on_change = on_change
        self._security = security
        self._view: WorkerView | None = None
        self._prefixes: tuple[int, ...] = ()
        self._outgoing: asyncio.Queue[worker_pb2.ConnectRequest | None] = asyncio.Queue()
        self._admissions: dict[CallId, asyncio.Future[worker_pb2.Admission]] = {}
        self._releases: dict[str, asyncio.Future[worker_pb2.Released]] = {}
        self._calls: dict[CallId, WorkerCall] = {}
        self._reader: asyncio.Task[None] | None = None
        self._channel: grpc.aio.Channel | None = None
        self._stub: worker_pb2_grpc.WorkerServiceAsyncStub | None = None

    @property
    def worker_id(self) -> WorkerId:
        """Who is at the other end."""
        return self.record.worker_id

    @property
    def view(self) -> WorkerView:
        """The worker as its last message showed it. Only after `connect`."""
        if self._view is None:
            raise self._gone()
        return self._view

    async def connect(self) -> None:
        """Opens the stream and waits for the worker's welcome.

        Raises:
            Unavailable: the worker can't be reached, or is another one than the lease says.
        """
        self._channel = _channel(self.record.address, self._security)
        self._stub = worker_pb2_grpc.WorkerServiceStub(self._channel)
        self.send(worker_pb2.ConnectRequest(hello=worker_pb2.Hello(gateway_id=self._gateway_id)))
        stream = self._stub.Connect(self._requests())
        welcomed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read(stream, welcomed), name=f"worker-link-{self.worker_id}")
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await welcomed
        except TimeoutError:
            await self.aclose()
            raise Unavailable(f"worker {self.worker_id} at {self.record.address} sent no welcome") from None
        except KVServiceError:
            await self.aclose()
            raise

    def send(self, request: worker_pb2.ConnectRequest) -> None:
        """Queues a command; they are sent in order."""
        self._outgoing.put_nowait(request)

    async def submit(self, submit: worker_pb2.Submit) -> WorkerCall:
        """Asks the worker to admit a call.

        Raises:
            KVServiceError: what the worker refused it with, or Unavailable when it is lost.
        """
        if self.closed:
            raise self._gone()
        submit.traceparent = TRACING.traceparent()
        call_id = CallId(submit.call_id)
        call = WorkerCall(call_id, self)
        answer: asyncio.Future[worker_pb2.Admission] = asyncio.get_running_loop().create_future()
        self._admissions[call_id] = answer
        # Events may come right behind the admission, so the route is there before it.
        self._calls[call_id] = call
        self.send(worker_pb2.ConnectRequest(submit=submit))
        admitted = False
        try:
            async with asyncio.timeout(ADMISSION_TIMEOUT_S):
                admission = await answer
            if not admission.admitted:
                raise failure_error(admission.refusal)
            admitted = True
        except TimeoutError:
            raise Unavailable(f"worker {self.worker_id} didn't answer", retry_after_s=RETRY_AFTER_S) from None
        finally:
            self._admissions.pop(call_id, None)
            if not admitted:
                self._calls.pop(call_id, None)
                if not _is_refused(answer):
                    # It has been admitted as the caller went away, or may yet be, with nobody to listen.
                    call.cancel()
        return call

    async def release(self, session_id: SessionId, tenant_tag: bytes, *, purge: bool) -> worker_pb2.Released:
        """Drops the session's KV on this worker; `purge` deletes its blobs too."""
        if self.closed:
            raise self._gone()
        answer = self._releases.get(session_id)
        if answer is None:
            answer = self._releases[session_id] = asyncio.get_running_loop().create_future()
        release = worker_pb2.Release(session_id=session_id, tenant_tag=tenant_tag, purge=purge)
        self.send(worker_pb2.ConnectRequest(release=release))
        try:
            async with asyncio.timeout(ADMISSION_TIMEOUT_S):
                return await asyncio.shield(answer)
        except TimeoutError:
            raise Unavailable(f"worker {self.worker_id} didn't answer", retry_after_s=RETRY_AFTER_S) from None

    async def tokenize(self, text: str, role: TextRole, prompt_format: PromptFormat, *, first: bool) -> list[int]:
        """Token ids of `text` under the worker's tokenizer."""
        request = worker_pb2.TokenizeRequest(
            text=text,
            role=convert.TEXT_ROLE_CODES[role],
            prompt_format=convert.PROMPT_FORMAT_CODES[prompt_format],
            first=first,
        )
        try:
            response = await self._connected().Tokenize(request, timeout=UNARY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _rpc_error(error, self.worker_id) from None
        return list(response.token_ids)

    async def tokenize_chat(
        self, messages: Sequence[common_pb2.ChatMessage], *, first: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of all messages but the last, and of the last, under the worker's tokenizer and chat template."""
        request = worker_pb2.TokenizeRequest(messages=messages, first=first)
        try:
            response = await self._connected().Tokenize(request, timeout=UNARY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _rpc_error(error, self.worker_id) from None
        ids, cut = tuple(response.token_ids), response.num_document_tokens
        return ids[:cut], ids[cut:]

    async def stats(self) -> admin_pb2.WorkerStats:
        """The worker's counters."""
        try:
            response = await self._connected().GetStats(worker_pb2.GetStatsRequest(), timeout=UNARY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _rpc_error(error, self.worker_id) from None
        return response.stats

    async def verify(self, tenant: TenantId, tenant_tag: bytes, session_id: str) -> admin_pb2.VerifyResponse:
        """What is stored of a tenant, frames read back; takes time in proportion to it."""
        request = worker_pb2.VerifyRequest(tenant=tenant, tenant_tag=tenant_tag, session_id=session_id)
        try:
            response = await self._connected().Verify(request, timeout=VERIFY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _rpc_error(error, self.worker_id) from None
        return response.findings

    async def fork(self, request: worker_pb2.ForkRequest) -> worker_pb2.ForkResponse:
        """Makes a session's KV known under one more name."""
        try:
            return await self._connected().Fork(request, timeout=UNARY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _rpc_error(error, self.worker_id) from None

    async def hand_over(self, session_id: SessionId, timeout_s: float, *, keeps_kv: bool = False) -> bool:
        """The worker publishes what is left of a session and lets it go; whether a manifest has all of it.

        With `keeps_kv` what it has in memory stays there while nobody needs the room.
        """
        request = worker_pb2.HandOverRequest(session_id=session_id, keeps_kv=keeps_kv)
        try:
            response = await self._connected().HandOver(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _rpc_error(error, self.worker_id) from None
        return response.is_stored

    async def take_on(self, tenant: TenantId, tenant_tag: bytes, session_id: SessionId) -> bool:
        """The worker acquires a session. Whether there is a manifest."""
        request = worker_pb2.TakeOnRequest(session_id=session_id, tenant=tenant, tenant_tag=tenant_tag)
        try:
            response = await self._connected().TakeOn(request, timeout=UNARY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _rpc_error(error, self.worker_id) from None
        return response.is_stored

    async def drain(self, grace_s: float) -> int:
        """Tells the worker to take no new calls and to end its running ones within the grace; gives their number."""
        request = worker_pb2.DrainRequest()
        request.grace.FromMilliseconds(round(grace_s * 1000))
        try:
            response = await self._connected().Drain(request, timeout=UNARY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _rpc_error(error, self.worker_id) from None
        return response.running_calls

    async def aclose(self) -> None:
        """Ends the stream; the worker cancels what this gateway had running."""
        self._outgoing.put_nowait(None)
        if self._reader is not None:
            await end_tasks([self._reader])
        if not self.closed:
            self._lose("the gateway closed the stream", logging.INFO)
        if self._channel is not None:
            await self._channel.close()

    async def _requests(self) -> AsyncIterator[worker_pb2.ConnectRequest]:
        while (request := await self._outgoing.get()) is not None:
            yield request

    async def _read(
        self,
        stream: grpc.aio.StreamStreamCall[worker_pb2.ConnectRequest, worker_pb2.ConnectResponse],
        welcomed: asyncio.Future[None],
    ) -> None:
        why = "it ended the stream"
        try:
            async for response in stream:
                self._take(response)
                if self._view is not None and not welcomed.done():
                    welcomed.set_result(None)
        except grpc.aio.AioRpcError as error:
            why = f"{error.code().name}: {error.details()}"
        finally:
            stream.cancel()
        self._lose(why)
        if not welcomed.done():
            welcomed.set_exception(
                Unavailable(f"worker {self.worker_id} at {self.record.address} can't be reached: {why}")
            )

    def _take(self, response: worker_pb2.ConnectResponse) -> None:
        kind = response.WhichOneof("event")
        if kind == "welcome":
            self._welcome(response.welcome)
        elif kind == "admission":
            answer = self._admissions.get(CallId(response.admission.call_id))
            if answer is not None and not answer.done():
                answer.set_result(response.admission)
        elif kind == "step":
            for event in response.step.events:
                self._route(event)
        elif kind == "released":
            released = self._releases.pop(response.released.session_id, None)
            if released is not None and not released.done():
                released.set_result(response.released)
        if response.HasField("held_prefixes"):
            self._prefixes = tuple(response.held_prefixes.names)
        if response.HasField("headroom"):
            self._update(convert.headroom_from_proto(response.headroom, self._prefixes))

    def _welcome(self, welcome: worker_pb2.Welcome) -> None:
        if (welcome.worker_id, welcome.epoch) != (self.record.worker_id, self.record.epoch):
            # An address may be another worker's by now; its lease will bring the right link.
            logger.warning("worker_is_another", extra={"lease": self.record.worker_id, "found": welcome.worker_id})
            self._outgoing.put_nowait(None)
            return
        model = convert.model_from_proto(welcome.model)
        self._view = WorkerView(self.worker_id, welcome.epoch, self.record.address, model, Headroom())

    def _route(self, event: worker_pb2.CallEvent) -> None:
        call_id = CallId(event.call_id)
        call = self._calls.get(call_id)
        if call is None:
            return
        kind = event.WhichOneof("event")
        if kind in ("done", "failure"):
            del self._calls[call_id]
        call.deliver(failure_error(event.failure) if kind == "failure" else event)

    def _update(self, headroom: Headroom) -> None:
        view = self._view
        if view is None:
            return
        self._view = replace(view, headroom=headroom)
        # Speeds change with every step; calls in line wait for room.
        if view.headroom != headroom:
            self._on_change()

    def _lose(self, why: str, level: int = logging.WARNING) -> None:
        self.closed = True
        logger.log(level, "worker_lost", extra={"worker_id": self.worker_id, "why": why, "calls": len(self._calls)})
        for admission in self._admissions.values():
            if not admission.done():
                admission.set_exception(_lost(self.worker_id))
        for released in self._releases.values():
            if not released.done():
                released.set_exception(_lost(self.worker_id))
                # Whoever waited for it may have given up.
                released.exception()
        self._admissions, self._releases = {}, {}
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.deliver(_lost(self.worker_id))
        self._on_change()

    def _connected(self) -> worker_pb2_grpc.WorkerServiceAsyncStub:
        if self._stub is None or self.closed:
            raise self._gone()
        return self._stub

    def _gone(self) -> Unavailable:
        return Unavailable(f"worker {self.worker_id} is not connected", retry_after_s=RETRY_AFTER_S)
