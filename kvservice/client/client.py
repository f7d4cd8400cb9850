"""The client of the public API. Async only; knows nothing of workers, stores or models."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self, TypedDict, TypeVar, Unpack

import grpc

from kvservice.client import convert
from kvservice.client.errors import error_from_rpc
from kvservice.client.results import (
    Alternative,
    Answer,
    AppendResult,
    Event,
    Finished,
    ServiceStats,
    SessionInfo,
    Started,
    StoredReport,
    TokenCount,
    TokenLogprobs,
    Tokens,
    UsageReport,
)
from kvservice.client.retry import Attempts, RetryPolicy
from kvservice.client.sampling import Sampling, sampling_to_proto
from kvservice.errors import DeadlineExceeded, InternalError
from kvservice.internal.convert import ON_MISS_CODES, PROMPT_FORMAT_CODES, chat_messages_to_proto, model_from_proto
from kvservice.internal.seen import SeenDigest
from kvservice.internal.tls import PemFiles, channel_credentials
from kvservice.telemetry.tracing import TRACEPARENT, current_traceparent
from kvservice.types import ChatMessage, ModelInfo, OnMiss, PromptFormat
from kvservice.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
)

T = TypeVar("T")

CHUNK_BYTES = 256 * 1024
CHUNK_TOKENS = 64 * 1024
"""Both well below the message limit of the service."""

_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    # Clients of one process share no connection: a service allows so many streams on each.
    ("grpc.use_local_subchannel_pool", 1),
    # A server that vanished without a word is noticed within 40 s, also in mid-stream.
    # A gateway that was away is found again soon; left alone, attempts come ever more rarely, up to two minutes apart.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


class _CallOptions(TypedDict):
    timeout: float
    metadata: tuple[tuple[str, str], ...]


Document = str | bytes | AsyncIterable[str | bytes]
Progress = Callable[[int, int], None]


class Client:
    """Talks to one address. Use as `async with Client("127.0.0.1:50051") as client:`.

    Every call that changes something carries a request id, made up where none is given, so it may be made again
    without being carried out twice. Failed calls are made again by status:

    | status | made again |
    |---|---|
    | UNAVAILABLE | yes; a stream that was cut goes on after its last event, or fails if its answer is another one now |
    | RESOURCE_EXHAUSTED | yes when the service says that it may pass (no room now), no for a limit |
    | ABORTED | reason `request_in_flight` yes; `session_busy` only after this very call was cut; others no |
    | all others | no |

    Waits grow from 0.1 s to 5 s with jitter, and are never shorter than the service asks for (RetryInfo, up to 5 s).
    `complete` can't be resumed: once its first event is here it isn't made again. When attempts are used up, the last
    error is raised: always a `KVServiceError`, of the class that the service raised.
    """

    def __init__(
        self,
        address: str,
        api_key: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        timeout_s: float = 60.0,
        tls: PemFiles | None = None,
    ) -> None:
        """With `tls` the connection is encrypted, and the certificate and key in it, if any, are shown to the service.

        `timeout_s` bounds calls that don't stream; those that do have a parameter of their own, by default none."""
        self._address = address
        self._own_metadata = (("authorization", f"Bearer {api_key}"),) if api_key is not None else ()
        self._retry = retry or RetryPolicy()
        self._timeout_s = timeout_s
        self._channel = (
            grpc.aio.insecure_channel(address, options=_OPTIONS)
            if tls is None
            else grpc.aio.secure_channel(address, channel_credentials(tls), options=_OPTIONS)
        )
        self._sessions: sessions_pb2_grpc.SessionServiceAsyncStub = sessions_pb2_grpc.SessionServiceStub(self._channel)
        self._inference: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(
            self._channel
        )
        self._admin: admin_pb2_grpc.AdminServiceAsyncStub = admin_pb2_grpc.AdminServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the connection and every call on it."""
        await self._channel.close()

    # Sessions

    async def create_session(
        self,
        *,
        model: str = "",
        recipe: str = "",
        prompt_format: PromptFormat = PromptFormat.RAW,
        on_miss: OnMiss = OnMiss.RECOMPUTE,
        ttl_s: float | None = None,
        document_id: str = "",
        request_id: str | None = None,
    ) -> SessionInfo:
        """A new session: empty, or with the document of the session `document_id`, whose prompt format it has then.

        Empty names and no `ttl_s` take the server's defaults; of one with a document, the document's.
        """
        request = sessions_pb2.CreateRequest(
            request_id=request_id or _new_id(),
            model=model,
            recipe=recipe,
            prompt_format=PROMPT_FORMAT_CODES[prompt_format],
            on_miss=ON_MISS_CODES[on_miss],
            document_id=document_id,
        )
        if ttl_s is not None:
            request.ttl.FromMilliseconds(round(ttl_s * 1000))
        response = await self._unary(lambda: self._sessions.Create(request, **self._call_options()))
        return convert.session(response.session)

    async def get(self, session_id: str) -> SessionInfo:
        """A session as it is now, with the progress of a running Append."""
        request = sessions_pb2.GetRequest(session_id=session_id)
        response = await self._unary(lambda: self._sessions.Get(request, **self._call_options()))
        return convert.session(response.session)

    async def list(self, *, page_size: int = 0) -> AsyncGenerator[SessionInfo]:
        """All sessions of the tenant, ordered by id, fetched page by page."""
        token = ""
        while True:
            request = sessions_pb2.ListRequest(page_size=page_size, page_token=token)
            response = await self._list_page(request)
            for message in response.sessions:
                yield convert.session(message)
            token = response.next_page_token
            if not token:
                return

    async def append(
        self,
        session_id: str,
        document: Document | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        on_progress: Progress | None = None,
        detach: bool = False,
        priority: int = 0,
        expected_num_tokens: int | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> AppendResult:
        """Has a document read into the session: text, its UTF-8 bytes, an iterator of either, or `token_ids`.

        An iterator is read to its end first, so that the upload can be made again. `on_progress` gets done and total
        tokens. With `detach` the reading goes on when this call is cancelled or cut; `get` shows it, and this call made
        again under the same `request_id` gives its result once it is there.
        """
        start = sessions_pb2.AppendStart(
            session_id=session_id,
            request_id=request_id or _new_id(),
            expected_num_tokens=expected_num_tokens,
            detach=detach,
            priority=priority,
        )
        data = b"" if document is None else await _all_bytes(document)
        parts = [sessions_pb2.AppendRequest(start=start), *_parts(data, token_ids or ())]
        attempts = Attempts(self._retry)
        deadline = _Deadline(timeout_s)
        while True:
            call = self._sessions.Append(_each(parts), timeout=deadline.left_s(), metadata=self._metadata)
            try:
                return await _append_result(call, on_progress)
            except grpc.aio.AioRpcError as error:
                failure = error_from_rpc(error, self._address)
            finally:
                call.cancel()
            await attempts.pause(failure)

    async def generate(
        self,
        session_id: str,
        prompt: str = "",
        *,
        prompt_token_ids: Sequence[int] = (),
        messages: Sequence[ChatMessage] = (),
        keep_partial: bool = False,
        recipe: str = "",
        priority: int = 0,
        expected_num_tokens: int | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncGenerator[Event]:
        """The answer, event by event: Started, Tokens…, Finished. A stream that is cut goes on where it was cut.

        `messages` instead of a prompt are the turns of a conversation, in a session of the prompt format CHAT.

        Leaving the loop early cancels the call; wrap it in `contextlib.aclosing` to have that happen at once.
        """
        request = sessions_pb2.SessionServiceGenerateRequest(
            session_id=session_id,
            request_id=request_id or _new_id(),
            expected_num_tokens=expected_num_tokens,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            messages=chat_messages_to_proto(messages),
            sampling=sampling_to_proto(sampling),
            keep_partial=keep_partial,
            recipe=recipe,
            priority=priority,
        )
        attempts = Attempts(self._retry)
        deadline = _Deadline(timeout_s)
        seen = SeenDigest()
        while True:
            call = self._sessions.Generate(request, timeout=deadline.left_s(), metadata=self._metadata)
            try:
                async for response in call:
                    # Whatever comes next, this one isn't wanted again.
                    request.last_sequence = response.event.sequence
                    seen.add(response.event.tokens.token_ids)
                    event = convert.event(response.event)
                    if event is not None:
                        yield event
                return
            except grpc.aio.AioRpcError as error:
                failure = error_from_rpc(error, self._address)
            finally:
                call.cancel()
            request.seen_digest = seen.value()
            await attempts.pause(failure)

    async def ask(
        self,
        session_id: str,
        prompt: str = "",
        *,
        messages: Sequence[ChatMessage] = (),
        recipe: str = "",
        priority: int = 0,
        request_id: str | None = None,
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Answer:
        """The whole answer at once."""
        events = self.generate(
            session_id,
            prompt,
            messages=messages,
            recipe=recipe,
            priority=priority,
            request_id=request_id,
            timeout_s=timeout_s,
            **sampling,
        )
        return await collect_answer(events)

    async def close_session(
        self, session_id: str, *, purge: bool = False, request_id: str | None = None
    ) -> tuple[int, int]:
        """Ends a session; gives the device and host bytes that were freed. `purge` deletes its stored bytes now."""
        request = sessions_pb2.CloseRequest(session_id=session_id, request_id=request_id or _new_id(), purge=purge)
        response = await self._unary(lambda: self._sessions.Close(request, **self._call_options()))
        return response.freed_device_bytes, response.freed_host_bytes

    async def truncate_session(
        self,
        session_id: str,
        to_tokens: int,
        *,
        expected_num_tokens: int | None = None,
        request_id: str | None = None,
    ) -> SessionInfo:
        """Takes a session back to its first `to_tokens` tokens."""
        request = sessions_pb2.TruncateRequest(
            session_id=session_id,
            request_id=request_id or _new_id(),
            expected_num_tokens=expected_num_tokens,
            to_tokens=to_tokens,
        )
        response = await self._unary(lambda: self._sessions.Truncate(request, **self._call_options()))
        return convert.session(response.session)

    async def fork_session(
        self, session_id: str, *, expected_num_tokens: int | None = None, request_id: str | None = None
    ) -> SessionInfo:
        """Begins a session with all tokens of another; gives the new one. They share what is stored of them."""
        request = sessions_pb2.ForkRequest(
            session_id=session_id, request_id=request_id or _new_id(), expected_num_tokens=expected_num_tokens
        )
        response = await self._unary(lambda: self._sessions.Fork(request, **self._call_options()))
        return convert.session(response.session)

    async def move_session(self, session_id: str, worker_id: str = "", *, request_id: str | None = None) -> SessionInfo:
        """Hands a session to another worker, to one that the service chooses if none is named. Role operator."""
        request = sessions_pb2.MoveRequest(
            session_id=session_id, request_id=request_id or _new_id(), worker_id=worker_id
        )
        response = await self._unary(lambda: self._sessions.Move(request, **self._call_options()))
        return convert.session(response.session)

    # Without a session

    async def complete(
        self,
        prompt: str = "",
        *,
        document: str = "",
        prompt_token_ids: Sequence[int] = (),
        document_token_ids: Sequence[int] = (),
        messages: Sequence[ChatMessage] = (),
        model: str = "",
        recipe: str = "",
        prompt_format: PromptFormat = PromptFormat.RAW,
        priority: int = 0,
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncGenerator[Event]:
        """One answer of which nothing is kept, event by event."""
        request = inference_pb2.InferenceServiceGenerateRequest(
            model=model,
            recipe=recipe,
            prompt_format=PROMPT_FORMAT_CODES[prompt_format],
            document=document,
            prompt=prompt,
            sampling=sampling_to_proto(sampling),
            document_token_ids=document_token_ids,
            prompt_token_ids=prompt_token_ids,
            messages=chat_messages_to_proto(messages),
            priority=priority,
        )
        attempts = Attempts(self._retry)
        deadline = _Deadline(timeout_s)
        while True:
            begun = False
            call = self._inference.Generate(request, timeout=deadline.left_s(), metadata=self._metadata)
            try:
                async for response in call:
                    begun = True
                    event = convert.event(response.event)
                    if event is not None:
                        yield event
                return
            except grpc.aio.AioRpcError as error:
                failure = error_from_rpc(error, self._address)
            finally:
                call.cancel()
            if begun:
                raise failure
            await attempts.pause(failure)

    async def list_models(self) -> tuple[ModelInfo, ...]:
        """The models there are, with the recipes each is served with."""
        request = inference_pb2.ListModelsRequest()
        response = await self._unary(lambda: self._inference.ListModels(request, **self._call_options()))
        return tuple(model_from_proto(message) for message in response.models)

    async def count_tokens(
        self, text: str, *, model: str = "", prompt_format: PromptFormat = PromptFormat.RAW
    ) -> TokenCount:
        """Tokens of `text` as the document of a new session."""
        request = inference_pb2.CountTokensRequest(
            model=model, prompt_format=PROMPT_FORMAT_CODES[prompt_format], text=text
        )
        response = await self._unary(lambda: self._inference.CountTokens(request, **self._call_options()))
        return TokenCount(response.num_tokens, response.max_positions)

    # For operators

    async def stats(self, tenant: str = "") -> ServiceStats:
        """The service's counters, and each worker's; of the tenants only `tenant`, with its stored bytes, if given."""
        request = admin_pb2.GetStatsRequest(tenant=tenant)
        return convert.service_stats(await self._unary(lambda: self._admin.GetStats(request, **self._call_options())))

    async def usage(self, after: str = "") -> tuple[tuple[UsageReport, ...], str]:
        """A page of what calls have used, oldest first, and the cursor for the next one; empty at the end of all."""
        request = admin_pb2.ListUsageRequest(after=after)
        response = await self._unary(lambda: self._admin.ListUsage(request, **self._call_options()))
        return tuple(convert.usage_report(record) for record in response.records), response.cursor

    async def set_quota(
        self,
        tenant: str,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        concurrent_calls: int | None = None,
        document_tokens: int | None = None,
        sessions: int | None = None,
        device_bytes: int | None = None,
        host_bytes: int | None = None,
        redis_bytes: int | None = None,
        weight: float | None = None,
    ) -> None:
        """Sets limits of a tenant, and its weight among others; None leaves one as it is, 0 goes back to the service's
        default. Device and host bytes are on each worker."""
        request = admin_pb2.SetQuotaRequest(
            tenant=tenant,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrent_calls=concurrent_calls,
            document_tokens=document_tokens,
            sessions=sessions,
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            redis_bytes=redis_bytes,
            weight=weight,
        )
        await self._unary(lambda: self._admin.SetQuota(request, **self._call_options()))

    async def verify(self, tenant: str, session_id: str = "") -> StoredReport:
        """What is stored of a tenant, or of one of its sessions, once all that has ended is published. Reads it all."""
        request = admin_pb2.VerifyRequest(tenant=tenant, session_id=session_id)
        return convert.stored_report(await self._unary(lambda: self._admin.Verify(request, **self._call_options())))

    async def drain(self, worker_id: str = "", *, grace_s: float | None = None) -> int:
        """Has a worker, or the whole service, take no new work; gives the number of running calls."""
        request = admin_pb2.DrainRequest(worker_id=worker_id)
        if grace_s is not None:
            request.grace.FromMilliseconds(round(grace_s * 1000))
        response = await self._unary(lambda: self._admin.Drain(request, **self._call_options()))
        return response.running_calls

    async def _list_page(self, request: sessions_pb2.ListRequest) -> sessions_pb2.ListResponse:
        return await self._unary(lambda: self._sessions.List(request, **self._call_options()))

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        """Of a call. A program that traces finds its calls' spans below its own."""
        parent = current_traceparent()
        return (*self._own_metadata, (TRACEPARENT, parent)) if parent else self._own_metadata

    def _call_options(self) -> _CallOptions:
        return {"timeout": self._timeout_s, "metadata": self._metadata}

    async def _unary(self, call: Callable[[], Awaitable[T]]) -> T:
        attempts = Attempts(self._retry)
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                failure = error_from_rpc(error, self._address)
            await attempts.pause(failure)


async def collect_answer(events: AsyncGenerator[Event]) -> Answer:
    """A whole answer from its events."""
    started: Started | None = None
    finished: Finished | None = None
    parts: dict[int, list[Tokens]] = {}
    async with aclosing(events):
        async for event in events:
            match event:
                case Started():
                    started = event
                case Tokens():
                    parts.setdefault(event.index, []).append(event)
                case Finished():
                    finished = event
    if started is None or finished is None:
        raise InternalError("the service ended an answer without its first or its last event")
    text, token_ids, logprobs = _joined(parts.get(0, ()))
    alternatives = []
    for index, reason in enumerate(finished.finish_reasons[1:], start=1):
        other_text, other_ids, other_logprobs = _joined(parts.get(index, ()))
        alternatives.append(Alternative(other_text, other_ids, reason, other_logprobs))
    return Answer(text, token_ids, started, finished, logprobs, tuple(alternatives))


def _joined(parts: Sequence[Tokens]) -> tuple[str, tuple[int, ...], tuple[TokenLogprobs, ...]]:
    return (
        "".join(part.text for part in parts),
        tuple(token_id for part in parts for token_id in part.token_ids),
        tuple(logprobs for part in parts for logprobs in part.logprobs),
    )


class _Deadline:
    """The time that all attempts of a call have together."""

    def __init__(self, timeout_s: float | None) -> None:
        self._until = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s

    def left_s(self) -> float | None:
        """Raises DeadlineExceeded once it has passed: the library takes a call without time for a fault of its own."""
        if self._until is None:
            return None
        left_s = self._until - asyncio.get_running_loop().time()
        if left_s <= 0.0:
            raise DeadlineExceeded("the deadline passed before the call could be made again")
        return left_s


def _new_id() -> str:
    return uuid.uuid4().hex


async def _all_bytes(document: Document) -> bytes:
    if isinstance(document, str):
        return document.encode()
    if isinstance(document, bytes):
        return document
    chunks = [chunk.encode() if isinstance(chunk, str) else chunk async for chunk in document]
    return b"".join(chunks)


def _parts(data: bytes, token_ids: Sequence[int]) -> list[sessions_pb2.AppendRequest]:
    parts = [
        sessions_pb2.AppendRequest(data=data[start : start + CHUNK_BYTES]) for start in range(0, len(data), CHUNK_BYTES)
    ]
    for start in range(0, len(token_ids), CHUNK_TOKENS):
        ids = common_pb2.TokenIds(token_ids=token_ids[start : start + CHUNK_TOKENS])
        parts.append(sessions_pb2.AppendRequest(token_ids=ids))
    return parts


async def _each(parts: Sequence[T]) -> AsyncIterator[T]:
    for part in parts:
        yield part


async def _append_result(
    responses: AsyncIterable[sessions_pb2.AppendResponse], on_progress: Progress | None
) -> AppendResult:
    async for response in responses:
        if response.HasField("finished"):
            return convert.append_result(response.finished)
        # The first message only says that the upload has arrived.
        if on_progress is not None and response.progress.total_tokens:
            on_progress(response.progress.done_tokens, response.progress.total_tokens)
    raise InternalError("the service ended an Append without saying how it went")
