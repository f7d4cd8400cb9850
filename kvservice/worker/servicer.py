"""The RPCs of the internal service, in the words of the engine loop. Knows nothing of ports, leases or models."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn, Protocol

import grpc

from kvservice.errors import FailedPrecondition, InvalidRequest, KVServiceError, Unavailable
from kvservice.internal.convert import PROMPT_FORMATS, TEXT_ROLES, chat_messages_from_proto, stats_to_proto
from kvservice.internal.v1 import worker_pb2
from kvservice.internal.v1.worker_pb2_grpc import WorkerServiceServicer
from kvservice.store.manifests import Manifest
from kvservice.telemetry.tracing import TRACING
from kvservice.types import (
    CallId,
    ChatMessage,
    EngineCall,
    ModelInfo,
    OnMiss,
    PromptFormat,
    SessionId,
    TenantId,
    TextRole,
    WorkerId,
)
from kvservice.v1 import admin_pb2
from kvservice.worker import convert
from kvservice.worker.answer import TokenStream
from kvservice.worker.grammars import GrammarDesk
from kvservice.worker.loop import EngineLoop
from kvservice.worker.stored import StoredKv
from kvservice.worker.stream import GatewayStream

logger = logging.getLogger(__name__)

TokenizeContext = grpc.aio.ServicerContext[worker_pb2.TokenizeRequest, worker_pb2.TokenizeResponse]
StatsContext = grpc.aio.ServicerContext[worker_pb2.GetStatsRequest, worker_pb2.GetStatsResponse]
VerifyContext = grpc.aio.ServicerContext[worker_pb2.VerifyRequest, worker_pb2.VerifyResponse]
ForkContext = grpc.aio.ServicerContext[worker_pb2.ForkRequest, worker_pb2.ForkResponse]
HandOverContext = grpc.aio.ServicerContext[worker_pb2.HandOverRequest, worker_pb2.HandOverResponse]
TakeOnContext = grpc.aio.ServicerContext[worker_pb2.TakeOnRequest, worker_pb2.TakeOnResponse]
DrainContext = grpc.aio.ServicerContext[worker_pb2.DrainRequest, worker_pb2.DrainResponse]
ConnectContext = grpc.aio.ServicerContext[worker_pb2.ConnectRequest, worker_pb2.ConnectResponse]

REASON_KEY = "kvservice-reason"
"""Trailing metadata of a failed RPC: the error's `reason`."""


class TokenizerLike(Protocol):
    """What the worker needs of a tokenizer. `encode` is called from several threads."""

    def encode(self, text: str, role: TextRole, prompt_format: PromptFormat, *, first: bool) -> Sequence[int]:
        """Token ids of a text in its role; `first`: it begins its session."""

    def encode_chat(self, messages: Sequence[ChatMessage], *, first: bool) -> tuple[Sequence[int], Sequence[int]]:
        """Token ids of all messages but the last, and of the last one."""

    def stream(self) -> TokenStream:
        """A fresh stream that turns an answer's tokens to text."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a worker says it is."""

    worker_id: WorkerId
    address: str
    epoch: int
    device: str
    model: ModelInfo


@dataclass(slots=True)
class _Probe:
    """A call that may have to wait for its session's KV. `span` is its own, if it is traced."""

    stream: GatewayStream
    call: EngineCall
    span: str
    is_cancelled: bool = False
    task: asyncio.Task[None] | None = None


class Servicer(WorkerServiceServicer):
    """Carries commands to the engine loop and its outputs back."""

    def __init__(
        self,
        *,
        engine: EngineLoop,
        tokenizer: TokenizerLike,
        tokenizer_threads: Executor,
        identity: Callable[[], Identity],
        begin_drain: Callable[[float | None], Awaitable[int]],
        grammar_desk: GrammarDesk,
        stream_queue_messages: int,
        stored: StoredKv | None = None,
    ) -> None:
        """`begin_drain` takes the grace in seconds (None: the default) and gives the number of running calls."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._tokenizer_threads = tokenizer_threads
        self._identity = identity
        self._begin_drain = begin_drain
        self._grammar_desk = grammar_desk
        self._stream_queue_messages = stream_queue_messages
        self._stored = stored
        self._streams: set[GatewayStream] = set()
        self._probes: dict[CallId, _Probe] = {}
        self._stream_keys = itertools.count()

    def end_streams(self) -> None:
        """Ends every stream once what waits in it has been sent."""
        for stream in self._streams:
            stream.end()

    async def Connect(  # type: ignore[override]  # The base class knows the generator form only; see _write.
        self, request_iterator: AsyncIterator[worker_pb2.ConnectRequest], context: ConnectContext
    ) -> None:
        """See worker.proto."""
        try:
            await self._serve(request_iterator, context)
        except KVServiceError as error:
            await _abort(context, error)

    async def Tokenize(
        self, request: worker_pb2.TokenizeRequest, context: TokenizeContext
    ) -> worker_pb2.TokenizeResponse:
        """See worker.proto."""
        try:
            if request.messages:
                return await self._encode_chat(request)
            return worker_pb2.TokenizeResponse(token_ids=await self._encode(request))
        except KVServiceError as error:
            await _abort(context, error)

    async def GetStats(self, request: worker_pb2.GetStatsRequest, context: StatsContext) -> worker_pb2.GetStatsResponse:
        """See worker.proto."""
        del request
        try:
            return worker_pb2.GetStatsResponse(stats=await self.report())
        except KVServiceError as error:
            await _abort(context, error)

    async def report(self) -> admin_pb2.WorkerStats:
        """The worker's counters.

        Raises:
            Unavailable: it has stopped.
        """
        stats = stats_to_proto(await asyncio.wrap_future(self._engine.stats()))
        identity = self._identity()
        stats.worker_id = identity.worker_id
        stats.address = identity.address
        stats.epoch = identity.epoch
        stats.model = identity.model.name
        stats.device = identity.device
        if self._stored is not None:
            stats.ledger.CopyFrom(convert.ledger_stats(self._stored))
        return stats

    async def Verify(self, request: worker_pb2.VerifyRequest, context: VerifyContext) -> worker_pb2.VerifyResponse:
        """See worker.proto."""
        try:
            if self._stored is None:
                raise FailedPrecondition(
                    "this worker stores nothing: it was given no kv Redis (--redis-url)", reason="no_tier"
                )
            found = await self._stored.verify(TenantId(request.tenant), request.tenant_tag, request.session_id)
        except KVServiceError as error:
            await _abort(context, error)
        return worker_pb2.VerifyResponse(findings=convert.findings(found))

    async def Fork(self, request: worker_pb2.ForkRequest, context: ForkContext) -> worker_pb2.ForkResponse:
        """See worker.proto."""
        session_id, fork_id = SessionId(request.session_id), SessionId(request.fork_id)
        try:
            cut_at = request.num_tokens if request.is_document else None
            is_held = not request.stored_only and await asyncio.wrap_future(
                self._engine.fork(session_id, fork_id, cut_at)
            )
            is_stored = False
            if self._stored is not None:
                is_stored = await self._stored.fork(
                    TenantId(request.tenant),
                    request.tenant_tag,
                    session_id,
                    fork_id,
                    request.num_tokens,
                    is_document=request.is_document,
                )
        except KVServiceError as error:
            await _abort(context, error)
        return worker_pb2.ForkResponse(is_held=is_held, is_stored=is_stored)

    async def HandOver(
        self, request: worker_pb2.HandOverRequest, context: HandOverContext
    ) -> worker_pb2.HandOverResponse:
        """See worker.proto."""
        session_id = SessionId(request.session_id)
        try:
            keeps = request.keeps_kv
            is_stored = self._stored is not None and await self._stored.hand_over(session_id, keeps_kv=keeps)
            if not keeps:
                await asyncio.wrap_future(self._engine.drop(session_id))
        except KVServiceError as error:
            await _abort(context, error)
        return worker_pb2.HandOverResponse(is_stored=is_stored)

    async def TakeOn(self, request: worker_pb2.TakeOnRequest, context: TakeOnContext) -> worker_pb2.TakeOnResponse:
        """See worker.proto."""
        session_id = SessionId(request.session_id)
        try:
            is_stored = False
            if self._stored is not None:
                is_stored = await self._stored.publisher.acquire(
                    TenantId(request.tenant), request.tenant_tag, session_id
                )
        except KVServiceError as error:
            await _abort(context, error)
        return worker_pb2.TakeOnResponse(is_stored=is_stored)

    async def Drain(self, request: worker_pb2.DrainRequest, context: DrainContext) -> worker_pb2.DrainResponse:
        """See worker.proto. Answers when the drain has begun, not when it is over."""
        grace_s = request.grace.ToTimedelta().total_seconds() if request.HasField("grace") else None
        try:
            return worker_pb2.DrainResponse(running_calls=await self._begin_drain(grace_s))
        except KVServiceError as error:
            await _abort(context, error)

    async def _encode(self, request: worker_pb2.TokenizeRequest) -> Sequence[int]:
        if request.role not in TEXT_ROLES:
            raise InvalidRequest(f"role={request.role}: must be DOCUMENT or QUESTION", field="role")
        encode = partial(
            self._tokenizer.encode,
            request.text,
            TEXT_ROLES[request.role],
            PROMPT_FORMATS[request.prompt_format],
            first=request.first,
        )
        # A long document takes a while; the streams must go on.
        return await asyncio.get_running_loop().run_in_executor(self._tokenizer_threads, encode)

    async def _encode_chat(self, request: worker_pb2.TokenizeRequest) -> worker_pb2.TokenizeResponse:
        encode = partial(self._tokenizer.encode_chat, chat_messages_from_proto(request.messages), first=request.first)
        before, last = await asyncio.get_running_loop().run_in_executor(self._tokenizer_threads, encode)
        return worker_pb2.TokenizeResponse(token_ids=[*before, *last], num_document_tokens=len(before))

    async def _serve(self, requests: AsyncIterator[worker_pb2.ConnectRequest], context: ConnectContext) -> None:
        """One stream from Hello to its end; whatever ends it, its calls are cancelled."""
        hello = await anext(aiter(requests), None)
        if hello is None or hello.WhichOneof("command") != "hello":
            raise InvalidRequest("the first message of a stream must be Hello", field="command")
        identity = self._identity()
        stream = GatewayStream(
            key=next(self._stream_keys),
            gateway_id=hello.hello.gateway_id,
            worker_id=identity.worker_id,
            epoch=identity.epoch,
            model=identity.model,
            max_messages=self._stream_queue_messages,
        )
        logger.info("gateway_connected", extra={"gateway_id": stream.gateway_id})
        self._streams.add(stream)
        self._engine.connect(stream)
        tasks = [
            asyncio.create_task(self._read(requests, stream)),
            asyncio.create_task(_write(stream, context)),
            asyncio.create_task(stream.fail_on_overflow()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._engine.disconnect(stream)
            for call_id, probe in list(self._probes.items()):
                if probe.stream is stream:
                    self._cancel(call_id)
            self._streams.discard(stream)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            logger.info("gateway_disconnected", extra={"gateway_id": stream.gateway_id})

    async def _read(self, requests: AsyncIterator[worker_pb2.ConnectRequest], stream: GatewayStream) -> None:
        """Carries commands to the engine until the gateway ends the stream."""
        async for request in requests:
            match request.WhichOneof("command"):
                case "submit":
                    await self._submit(request.submit, stream)
                case "cancel":
                    self._cancel(stream.internal_id(request.cancel.call_id))
                case "release":
                    release = request.release
                    if self._stored is not None:
                        await self._stored.publisher.release(SessionId(release.session_id))
                    self._engine.release(stream, SessionId(release.session_id), release.tenant_tag, purge=release.purge)
                case "hello":
                    raise InvalidRequest("Hello comes once, as the first message of a stream", field="command")
                case None:
                    raise InvalidRequest("a message holds no command", field="command")

    async def _submit(self, submit: worker_pb2.Submit, stream: GatewayStream) -> None:
        """Later commands of the stream wait meanwhile: a call's cancel mustn't overtake it."""
        call_id = stream.internal_id(submit.call_id)
        try:
            call = convert.engine_call(submit, call_id, self._identity().model, time.monotonic())
            await self._grammar_desk.check(call)
            manifest: Manifest | None = None
            if self._stored is not None:
                manifest = await self._stored.publisher.begin(
                    call, TenantId(submit.tenant), was_elsewhere=submit.was_elsewhere
                )
        except KVServiceError as error:
            self._engine.refuse(stream, call_id, error)
            return
        span = stream.trace(call_id, submit.traceparent, submit.session_id)
        if self._stored is None or self._stored.resumer is None or not call.base_tokens:
            self._engine.submit(stream, call)
            return
        if manifest is None and not self._stored.publisher.is_behind(call.session_id):
            self._engine.submit(stream, call)
            return
        self._probes[call_id] = _Probe(stream, call, span)
        loop = asyncio.get_running_loop()

        def on_probed(num_missing: int) -> None:
            loop.call_soon_threadsafe(self._probed, call_id, num_missing)

        # Most sessions are held: only when KV is missing is it worth a look at what is stored.
        self._engine.submit(stream, replace(call, on_miss=OnMiss.FAIL), on_probed)

    def _probed(self, call_id: CallId, num_missing: int) -> None:
        probe = self._probes[call_id]
        if not num_missing:
            del self._probes[call_id]
        elif probe.is_cancelled:
            self._give_up(call_id)
        else:
            probe.task = asyncio.create_task(self._resume(call_id, probe, num_missing), name=f"resume {call_id}")
            probe.task.add_done_callback(lambda task: self._give_up(call_id) if task.cancelled() else None)

    async def _resume(self, call_id: CallId, probe: _Probe, num_missing: int) -> None:
        """Submits a call whose session isn't held, with what is stored of it."""
        assert self._stored is not None
        resumer = self._stored.resumer
        assert resumer is not None
        restored = probe.call.restored
        try:
            # A call that must not compute anything again is refused or taken on, so all must have come by then.
            bring = resumer.restore if probe.call.on_miss is OnMiss.FAIL else resumer.begin
            # As of now: the turn before may have been published only just, or not yet.
            manifest = await self._stored.publisher.known(probe.call.session_id)
            if manifest is not None:
                if restored is not None:
                    # The record is of these tokens; the manifest may be of a turn before, or of one taken back.
                    manifest = replace(manifest, reached=restored.reached)
                with TRACING.within(probe.span):
                    restored = await bring(probe.call, manifest, num_missing)
        except Exception:
            # Without what is stored the call is right all the same.
            logger.exception("resume_failed", extra={"session_id": probe.call.session_id})
        del self._probes[call_id]
        self._engine.submit(probe.stream, replace(probe.call, restored=restored))

    def _cancel(self, call_id: CallId) -> None:
        probe = self._probes.get(call_id)
        if probe is not None:
            probe.is_cancelled = True
            if probe.task is not None:
                probe.task.cancel()
                return
        self._engine.cancel(call_id)

    def _give_up(self, call_id: CallId) -> None:
        """A call was cancelled before the engine had it."""
        assert self._stored is not None
        probe = self._probes.pop(call_id)
        self._stored.ended(call_id, None)
        cancelled = Unavailable("the call was cancelled while its session was brought back", reason="cancelled")
        self._engine.refuse(probe.stream, call_id, cancelled)


async def _write(stream: GatewayStream, context: ConnectContext) -> None:
    """Sends what comes. Not the handler itself as a generator: that couldn't end a stream whose send is stuck."""
    async for message in stream.messages():
        await context.write(message)


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: KVServiceError) -> NoReturn:
    await context.abort(grpc.StatusCode[error.status], error.message, ((REASON_KEY, error.reason),))
