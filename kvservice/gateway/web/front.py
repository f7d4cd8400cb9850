"""The OpenAI-compatible HTTP API of a gateway. Each route calls the same step as the RPC that it stands for.

    POST /v1/chat/completions, /v1/completions   InferenceService.Generate, or with a session SessionService.Generate
    GET  /v1/models, /v1/models/MODEL            InferenceService.ListModels
    DELETE /v1/sessions/SESSION                  SessionService.Close

A session goes by the header `Kvservice-Session`: `new` begins one, and its id comes back in the same header; with an id
the request holds only what is new. Knows nothing of how a step works.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress

from aiohttp import web

from kvservice.config.limits import Limits
from kvservice.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    KVServiceError,
    LimitExceeded,
    NotFound,
    NotImplementedYet,
    PermissionDenied,
)
from kvservice.gateway.answers import Answers
from kvservice.gateway.auth import CALLER, Caller
from kvservice.gateway.catalogue import choose_model, served_recipes
from kvservice.gateway.dispatch import Stopwatch
from kvservice.gateway.fleet import Fleet
from kvservice.gateway.reception import Reception, Visit
from kvservice.gateway.runs import Run
from kvservice.gateway.servicer_sessions import only_message
from kvservice.gateway.sessions import Sessions
from kvservice.gateway.web.answers import Heading, Json, StreamedAnswer, WholeAnswer
from kvservice.gateway.web.door import Door
from kvservice.gateway.web.errors import BODY_TOO_LARGE, NO_SUCH_METHOD, UPLOAD_TOO_SLOW, WRONG_CONTENT_TYPE
from kvservice.gateway.web.reply import Reply, error_response
from kvservice.gateway.web.requests import Body, BodyT, ChatBody, CompletionBody, parse
from kvservice.telemetry.logging import bind_log_fields
from kvservice.types import ModelInfo
from kvservice.v1 import common_pb2, inference_pb2, sessions_pb2

logger = logging.getLogger(__name__)

SESSION_HEADER = "Kvservice-Session"
NEW_SESSION = "new"
TIMEOUT_HEADER = "Kvservice-Timeout-S"
REQUEST_ID_HEADER = "Idempotency-Key"
KEEPALIVE_S = 75.0
STOP_GRACE_S = 5.0
"""Calls have been drained before: what is left when it stops are answers on their way."""

Serve = Callable[[web.Request, Reply, Stopwatch], Awaitable[None]]


class WebFront:
    """Serves the HTTP API.

    Args:
        reception: lets callers in; the same as for RPCs.
        answers: carries out Generate.
        sessions: creates, shows and closes sessions.
        fleet: knows the models.
        limits: of bodies and uploads.
        default_model: of a request that names none.
        is_open: whether no keys are in use. Then a page in a browser must not be able to call: what one sends has
            an Origin, and is refused.
    """

    def __init__(
        self,
        reception: Reception,
        answers: Answers,
        sessions: Sessions,
        fleet: Fleet,
        limits: Limits,
        *,
        default_model: str,
        is_open: bool,
    ) -> None:
        self._reception = reception
        self._answers = answers
        self._sessions = sessions
        self._fleet = fleet
        self._limits = limits
        self._default_model = default_model
        self._is_open = is_open
        self._runner: web.AppRunner | None = None
        self._door: Door | None = None
        self._listener: asyncio.Server | None = None

    async def start(self, host: str, port: int, context: ssl.SSLContext | None) -> str:
        """Listens; gives the address. `context` None: without TLS.

        Raises:
            ConfigError: the port is in use.
        """
        app = web.Application(
            client_max_size=self._limits.http_body_bytes, middlewares=[self._through_the_door, _in_our_words]
        )
        app.router.add_post("/v1/chat/completions", self._handler(self._chat))
        app.router.add_post("/v1/completions", self._handler(self._complete))
        app.router.add_get("/v1/models", self._handler(self._list_models))
        app.router.add_get("/v1/models/{model:.+}", self._handler(self._show_model))
        app.router.add_delete("/v1/sessions/{session}", self._handler(self._close_session))
        # A caller that goes away cancels its handler, and so its call.
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,
            keepalive_timeout=KEEPALIVE_S,
            shutdown_timeout=STOP_GRACE_S,
        )
        await self._runner.setup()
        assert self._runner.server is not None
        limits = self._limits
        self._door = Door(
            self._runner.server,
            header_s=limits.header_s,
            connections=limits.connections,
            connections_per_address=limits.connections_per_address,
        )
        try:
            self._listener = await asyncio.get_running_loop().create_server(
                self._door, host, port, ssl=context, ssl_handshake_timeout=limits.header_s if context else None
            )
        except OSError as error:
            raise ConfigError(
                f"http_port={port}: can't listen on {host}:{port}: {error.strerror}; choose another http_port, or 0",
                field="http_port",
            ) from None
        bracketed = f"[{host}]" if ":" in host else host
        return f"{bracketed}:{self._listener.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Closes the port and every connection. Does nothing if it wasn't started."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    # Around every request

    @web.middleware
    async def _through_the_door(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Tells the door which connections are being answered."""
        door, transport = self._door, request.transport
        assert door is not None
        door.begun(transport)
        try:
            return await handler(request)
        finally:
            door.ended(transport)

    def _handler(self, serve: Serve) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            reply = Reply(request, f"req_{secrets.token_hex(16)}")
            resource = request.match_info.route.resource
            # The route, not the path: what callers make up must not become labels of metrics.
            method = resource.canonical if resource is not None else ""
            visit = Visit(method, _metadata(request), request.remote or "", None)
            error: KVServiceError | None = None
            with self._reception.watched(visit):
                try:
                    await self._serve(serve, request, reply, visit)
                except ConnectionError:
                    visit.code = "CANCELLED"
                    raise
                except Exception as fault:  # noqa: BLE001 - logged, or the caller's to know
                    error = visit.failed(fault)
                return await reply.ended(error)

        return handle

    async def _serve(self, serve: Serve, request: web.Request, reply: Reply, visit: Visit) -> None:
        timeout_s = _timeout_s(request)
        watch = Stopwatch(timeout_s)
        if self._is_open and "Origin" in request.headers:
            raise PermissionDenied("a page in a browser can't call a service without API keys: give it keys")
        await self._reception.admit(visit)
        try:
            async with asyncio.timeout(timeout_s):
                await serve(request, reply, watch)
        except TimeoutError:
            raise DeadlineExceeded(f"{TIMEOUT_HEADER}: {timeout_s:g} s have passed") from None

    # Routes

    async def _chat(self, request: web.Request, reply: Reply, watch: Stopwatch) -> None:
        body = await self._body(ChatBody, request)
        await self._answer(request, reply, watch, body, common_pb2.PROMPT_FORMAT_CHAT)

    async def _complete(self, request: web.Request, reply: Reply, watch: Stopwatch) -> None:
        body = await self._body(CompletionBody, request)
        await self._answer(request, reply, watch, body, common_pb2.PROMPT_FORMAT_RAW)

    async def _list_models(self, request: web.Request, reply: Reply, watch: Stopwatch) -> None:
        del request, watch
        models = [_model(info) for info in self._fleet.models().values()]
        reply.whole({"object": "list", "data": models})

    async def _show_model(self, request: web.Request, reply: Reply, watch: Stopwatch) -> None:
        del watch
        reply.whole(_model(self._fleet.model(request.match_info["model"])))

    async def _close_session(self, request: web.Request, reply: Reply, watch: Stopwatch) -> None:
        del watch
        session_id = request.match_info["session"]
        await only_message(self._sessions.close(CALLER.get(), sessions_pb2.CloseRequest(session_id=session_id)))
        reply.whole({"id": session_id, "object": "session.deleted", "deleted": True})

    # Answers

    async def _answer(
        self,
        request: web.Request,
        reply: Reply,
        watch: Stopwatch,
        body: Body,
        prompt_format: common_pb2.PromptFormat.ValueType,
    ) -> None:
        caller = CALLER.get()
        wanted = request.headers.get(SESSION_HEADER)
        if wanted is None:
            model = choose_model(self._fleet, body.model, self._default_model).name
            run = self._without_session(caller, watch, body, prompt_format)
            await _tell(run, reply, _heading(body, model), body)
            return
        request_id = request.headers.get(REQUEST_ID_HEADER, "")
        session = await self._session(caller, wanted, body, prompt_format, request_id)
        bind_log_fields(session_id=session.session_id)
        reply.headers[SESSION_HEADER] = session.session_id
        try:
            run = self._with_session(caller, watch, body, session.session_id, request_id)
            await _tell(run, reply, _heading(body, session.model), body)
        except Exception:
            if wanted == NEW_SESSION and not request_id and not reply.has_begun:
                # Nobody knows of it, and whoever asks again begins another.
                self._forget(caller, reply.headers.pop(SESSION_HEADER))
            raise

    def _forget(self, caller: Caller, session_id: str) -> None:
        """Has a session closed, in the background; one that can't be is left to its time to live."""
        with suppress(KVServiceError):
            self._sessions.close(caller, sessions_pb2.CloseRequest(session_id=session_id))

    def _without_session(
        self, caller: Caller, watch: Stopwatch, body: Body, prompt_format: common_pb2.PromptFormat.ValueType
    ) -> Run[common_pb2.GenerateEvent]:
        generate = inference_pb2.InferenceServiceGenerateRequest(
            model=body.model, recipe=body.recipe, prompt_format=prompt_format, priority=body.priority
        )
        body.fill(generate)
        return self._answers.complete(caller, generate, watch)

    def _with_session(
        self, caller: Caller, watch: Stopwatch, body: Body, session_id: str, request_id: str
    ) -> Run[common_pb2.GenerateEvent]:
        generate = sessions_pb2.SessionServiceGenerateRequest(
            session_id=session_id, request_id=request_id, recipe=body.recipe, priority=body.priority
        )
        body.fill(generate)
        return self._answers.ask(caller, generate, watch)

    async def _session(
        self,
        caller: Caller,
        wanted: str,
        body: Body,
        prompt_format: common_pb2.PromptFormat.ValueType,
        request_id: str,
    ) -> sessions_pb2.Session:
        """The session that the header names, or a new one."""
        if wanted == NEW_SESSION:
            # What can't be answered begins no session.
            body.fill(sessions_pb2.SessionServiceGenerateRequest())
            create = sessions_pb2.CreateRequest(
                # A repeat of the request finds the session that the first one began.
                request_id=f"{request_id}#session" if request_id else "",
                model=body.model,
                recipe=body.recipe,
                prompt_format=prompt_format,
            )
            return (await only_message(self._sessions.create(caller, create))).session
        session = await self._sessions.get(caller, wanted)
        if body.model and body.model != session.model:
            raise InvalidRequest(
                f"model={body.model!r}: session {wanted} is of {session.model!r}; ask that model", field="model"
            )
        return session

    async def _body(self, kind: type[BodyT], request: web.Request) -> BodyT:
        """What was sent, within the limits.

        Raises:
            InvalidRequest: not JSON by its header or its content, or not what is served.
            LimitExceeded: too long.
            DeadlineExceeded: it came too slowly.
        """
        # A form in a browser can't send this type, so no foreign page can call in its reader's name.
        if request.content_type != "application/json":
            raise InvalidRequest(
                f"Content-Type {request.content_type!r}: send application/json", reason=WRONG_CONTENT_TYPE
            )
        try:
            async with asyncio.timeout(self._limits.upload_idle_s):
                data = await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise LimitExceeded(
                f"the body has more than {self._limits.http_body_bytes} bytes: send less, or load the document by "
                "SessionService.Append",
                reason=BODY_TOO_LARGE,
            ) from None
        except TimeoutError:
            raise DeadlineExceeded(
                f"the body didn't come within {self._limits.upload_idle_s:g} s", reason=UPLOAD_TOO_SLOW
            ) from None
        return parse(kind, data)


def _heading(body: Body, model: str) -> Heading:
    is_chat = isinstance(body, ChatBody)
    answer_id = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
    return Heading(answer_id, int(time.time()), model, is_chat)


async def _tell(run: Run[common_pb2.GenerateEvent], reply: Reply, heading: Heading, body: Body) -> None:
    """Passes an answer on as it is wanted."""
    num_answers = body.n or 1
    async with aclosing(run.messages()) as events:
        if body.stream:
            streamed = StreamedAnswer(heading, num_answers, includes_usage=body.includes_usage)
            async for event in events:
                for piece in streamed.take(event):
                    await reply.send(piece)
            return
        whole = WholeAnswer(heading, num_answers)
        async for event in events:
            content = whole.take(event)
            if content is not None:
                reply.whole(content)


@web.middleware
async def _in_our_words(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Paths and methods that aren't served get an error of the same form as others."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return error_response(NotFound(f"no such path: {request.path}", reason="unknown_path"))
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        return error_response(
            NotImplementedYet(f"{request.method} {request.path}: only {allowed}", reason=NO_SUCH_METHOD)
        )


def _metadata(request: web.Request) -> tuple[tuple[str, str | bytes], ...]:
    return tuple((name.lower(), value) for name, value in request.headers.items())


def _timeout_s(request: web.Request) -> float | None:
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequest(f"{TIMEOUT_HEADER}: {text!r}: it must be seconds above 0", field=TIMEOUT_HEADER)
    return seconds


def _model(info: ModelInfo) -> Json:
    return {
        "id": info.name,
        "object": "model",
        "created": 0,
        "owned_by": "kvservice",
        "max_model_len": info.shape.max_positions,
        "recipes": served_recipes(info),
        "default_recipe": info.default_recipe,
    }
