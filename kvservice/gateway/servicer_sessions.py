"""SessionService: each RPC calls one named step. Knows gRPC and nothing of how a step works."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TypeVar

from kvservice.config.limits import Limits
from kvservice.gateway.answers import Answers
from kvservice.gateway.appends import Appends, collect
from kvservice.gateway.auth import CALLER
from kvservice.gateway.dispatch import Stopwatch
from kvservice.gateway.interceptors import Context
from kvservice.gateway.operations import Operations
from kvservice.gateway.runs import Run
from kvservice.gateway.sessions import Sessions
from kvservice.telemetry.logging import bind_log_fields
from kvservice.v1 import sessions_pb2
from kvservice.v1.sessions_pb2_grpc import SessionServiceServicer

T = TypeVar("T")


async def only_message(run: Run[T]) -> T:
    """The one message of a run that has one."""
    async with aclosing(run.messages()) as messages:
        found = [message async for message in messages]
    return found[0]


class SessionServicer(SessionServiceServicer):
    """All calls on sessions."""

    def __init__(
        self, sessions: Sessions, operations: Operations, appends: Appends, answers: Answers, limits: Limits
    ) -> None:
        self._sessions = sessions
        self._operations = operations
        self._appends = appends
        self._answers = answers
        self._limits = limits

    async def Create(self, request: sessions_pb2.CreateRequest, context: Context) -> sessions_pb2.CreateResponse:  # noqa: ARG002, D102
        begin = self._operations.attach if request.document_id else self._sessions.create
        return await only_message(begin(CALLER.get(), request))

    async def Get(self, request: sessions_pb2.GetRequest, context: Context) -> sessions_pb2.GetResponse:  # noqa: ARG002, D102
        return sessions_pb2.GetResponse(session=await self._sessions.get(CALLER.get(), request.session_id))

    async def List(self, request: sessions_pb2.ListRequest, context: Context) -> sessions_pb2.ListResponse:  # noqa: ARG002, D102
        return await self._sessions.list(CALLER.get(), request)

    async def Append(  # noqa: D102
        self,
        request_iterator: AsyncIterator[sessions_pb2.AppendRequest],
        context: Context,
    ) -> AsyncIterator[sessions_pb2.AppendResponse]:
        watch = Stopwatch(context.time_remaining())
        upload = await collect(request_iterator, self._limits)
        bind_log_fields(session_id=upload.start.session_id)
        # A connection that broke looks like the end of the document. Writing to it fails, and so half a document isn't
        # taken for a whole one.
        yield sessions_pb2.AppendResponse(progress=sessions_pb2.AppendProgress())
        run = self._appends.append(CALLER.get(), upload, watch)
        async with aclosing(run.messages()) as messages:
            async for message in messages:
                yield message

    async def Generate(  # noqa: D102
        self,
        request: sessions_pb2.SessionServiceGenerateRequest,
        context: Context,
    ) -> AsyncIterator[sessions_pb2.SessionServiceGenerateResponse]:
        run = self._answers.ask(CALLER.get(), request, Stopwatch(context.time_remaining()))
        async with aclosing(run.messages()) as events:
            async for event in events:
                yield sessions_pb2.SessionServiceGenerateResponse(event=event)

    async def Truncate(self, request: sessions_pb2.TruncateRequest, context: Context) -> sessions_pb2.TruncateResponse:  # noqa: ARG002, D102
        return await only_message(self._operations.truncate(CALLER.get(), request))

    async def Fork(self, request: sessions_pb2.ForkRequest, context: Context) -> sessions_pb2.ForkResponse:  # noqa: ARG002, D102
        return await only_message(self._operations.fork(CALLER.get(), request))

    async def Move(self, request: sessions_pb2.MoveRequest, context: Context) -> sessions_pb2.MoveResponse:  # noqa: ARG002, D102
        return await only_message(self._operations.move(CALLER.get(), request))

    async def Close(self, request: sessions_pb2.CloseRequest, context: Context) -> sessions_pb2.CloseResponse:  # noqa: ARG002, D102
        return await only_message(self._sessions.close(CALLER.get(), request))
