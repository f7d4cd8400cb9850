"""What happens around every RPC: the reception lets its caller in, and errors become statuses.

Knows no RPC by its meaning.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Protocol

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

from kvservice.errors import QUOTA_KEY, DeadlineExceeded, InvalidRequest, KVServiceError
from kvservice.gateway.auth import OPEN_METHODS
from kvservice.gateway.reception import Reception, Visit

DOMAIN = "kvservice"
MAX_MESSAGE_BYTES = 1500
"""Of an error's message, which goes out twice or three times, in trailers of at most 8 KB."""
RETRYABLE = "retryable"
"""Key in ErrorInfo.metadata: `true` or `false`."""

# Handlers are of any message type; grpc's own stubs say Any as well.
Context = grpc.aio.ServicerContext[Any, Any]


class _Handler(Protocol):
    """The attributes of `grpc.RpcMethodHandler` that its type stub leaves out."""

    request_streaming: bool
    response_streaming: bool
    request_deserializer: Callable[[bytes], Message]
    response_serializer: Callable[[Message], bytes]
    unary_unary: Callable[[Any, Context], Awaitable[Message]]
    stream_unary: Callable[[Any, Context], Awaitable[Message]]
    unary_stream: Callable[[Any, Context], AsyncGenerator[Message]]
    stream_stream: Callable[[Any, Context], AsyncGenerator[Message]]


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


def _clipped(message: str) -> str:
    """A message may quote what the caller sent; the trailers have room for so much."""
    data = message.encode()
    return message if len(data) <= MAX_MESSAGE_BYTES else data[:MAX_MESSAGE_BYTES].decode(errors="ignore") + "…"


def error_status(error: KVServiceError) -> grpc.Status:
    """The status of `error`, with google.rpc details in its trailers."""
    message = _clipped(error.message)
    metadata = {**error.metadata, RETRYABLE: "true" if error.retryable else "false"}
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)]
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if quota := error.metadata.get(QUOTA_KEY):
        violations = [error_details_pb2.QuotaFailure.Violation(subject=quota, description=message)]
        details.append(error_details_pb2.QuotaFailure(violations=violations))
    code = grpc.StatusCode[error.status]
    status = status_pb2.Status(code=code.value[0], message=message, details=[_packed(each) for each in details])
    result: grpc.Status = rpc_status.to_status(status)
    return result


def _visit(method: str, context: Context) -> Visit:
    return Visit(method, tuple(context.invocation_metadata() or ()), context.peer(), None)


class ServiceInterceptor(grpc.aio.ServerInterceptor):
    """Has the reception let each RPC in, and turns each error into a status.

    Args:
        reception: lets callers in.
        message_s: within which the one message of an RPC must come. A servicer that takes a stream sees to that itself.
    """

    def __init__(self, reception: Reception, *, message_s: float) -> None:
        self._reception = reception
        self._message_s = message_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the handler of each RPC but those that are open to all; an unknown RPC stays UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(OPEN_METHODS):
            return handler
        return self._wrap(handler, method)  # type: ignore[arg-type] # see _Handler

    def _wrap(self, handler: _Handler, method: str) -> grpc.RpcMethodHandler[Any, Any]:
        is_streamed = handler.request_streaming
        behaviour: Any

        # All are taken as streams: of one message grpc would wait for ever.
        async def unary(requests: AsyncIterator[Any], context: Context) -> Message:
            with self._reception.watched(_visit(method, context)) as visit:
                try:
                    visit.request = requests if is_streamed else await self._only(requests)
                    await self._reception.admit(visit)
                    response: Message = await behaviour(visit.request, context)
                except Exception as error:  # noqa: BLE001 - logged, or the caller's to know
                    await context.abort_with_status(error_status(visit.failed(error)))
            return response

        async def stream(requests: AsyncIterator[Any], context: Context) -> None:
            with self._reception.watched(_visit(method, context)) as visit:
                # Errors of `write` are the transport's: grpc itself deals with them.
                responses = self._responses(behaviour, visit, context, requests, is_streamed=is_streamed)
                async with aclosing(responses):
                    async for response in responses:
                        if isinstance(response, KVServiceError):
                            await context.abort_with_status(error_status(response))
                        await context.write(response)

        serializers = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            behaviour = handler.stream_stream if is_streamed else handler.unary_stream
            return grpc.stream_stream_rpc_method_handler(stream, **serializers)  # type: ignore[arg-type] # an asyncio behaviour
        behaviour = handler.stream_unary if is_streamed else handler.unary_unary
        return grpc.stream_unary_rpc_method_handler(unary, **serializers)  # type: ignore[arg-type] # an asyncio behaviour

    async def _responses(
        self,
        behaviour: Callable[[Any, Context], AsyncGenerator[Message]],
        visit: Visit,
        context: Context,
        requests: AsyncIterator[Any],
        *,
        is_streamed: bool,
    ) -> AsyncGenerator[Message | KVServiceError]:
        """The responses of a streaming RPC; an error comes as the last one."""
        try:
            visit.request = requests if is_streamed else await self._only(requests)
            await self._reception.admit(visit)
            async with aclosing(behaviour(visit.request, context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:  # noqa: BLE001 - logged, or the caller's to know
            yield visit.failed(error)

    async def _only(self, requests: AsyncIterator[Any]) -> Any:  # noqa: ANN401
        """The one message of an RPC."""
        try:
            async with asyncio.timeout(self._message_s):
                return await anext(requests)
        except StopAsyncIteration:
            raise InvalidRequest("the call ended before its message") from None
        except TimeoutError:
            raise DeadlineExceeded(
                f"the call's message didn't come within {self._message_s:g} s: send it with the call"
            ) from None
