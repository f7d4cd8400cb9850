"""Truncate, Fork, Move, and Create with a document: what computes nothing. Knows nothing of frames or manifests.

A session's record is what counts. What workers hold or have stored of it follows, and where it doesn't, KV is computed
again when it is next needed.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from google.protobuf.message import Message

from kvservice.config.limits import Limits
from kvservice.config.recipes import get_recipe
from kvservice.errors import FailedPrecondition, InvalidRequest, KVServiceError, NotFound, Unavailable
from kvservice.gateway import convert
from kvservice.gateway.auth import Caller
from kvservice.gateway.fleet import Fleet
from kvservice.gateway.leaving import hand_over
from kvservice.gateway.placement import PlacementRequest, WorkerView, place
from kvservice.gateway.repeats import Repeats, digest
from kvservice.gateway.runs import Run, Runs
from kvservice.gateway.sessions import Activity, Sessions, was_carried_out
from kvservice.gateway.worker_link import RETRY_AFTER_S, UNARY_TIMEOUT_S
from kvservice.internal.v1 import worker_pb2
from kvservice.store.base import SessionRecord
from kvservice.types import SessionId
from kvservice.v1 import sessions_pb2

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=Message)


class Operations:
    """Carries out Truncate, Fork and Move, each under the session's lock, and attaches documents.

    Each once for each request id.
    """

    def __init__(self, sessions: Sessions, fleet: Fleet, runs: Runs, repeats: Repeats, limits: Limits) -> None:
        self._sessions = sessions
        self._fleet = fleet
        self._runs = runs
        self._repeats = repeats
        self._limits = limits

    def truncate(self, caller: Caller, request: sessions_pb2.TruncateRequest) -> Run[sessions_pb2.TruncateResponse]:
        """Takes a session back to its first tokens. Its KV follows when it is next used."""

        async def work(run: Run[sessions_pb2.TruncateResponse]) -> sessions_pb2.TruncateResponse:
            expected = request.expected_num_tokens if request.HasField("expected_num_tokens") else None
            async with self._sessions.changing(run, caller, request.session_id, _idle(), expected) as record:
                held = len(record.token_ids)
                if request.to_tokens > held:
                    raise InvalidRequest(
                        f"to_tokens={request.to_tokens}: the session holds {held}; give 0 to {held}", field="to_tokens"
                    )
                wanted = replace(
                    record,
                    token_ids=record.token_ids[: request.to_tokens],
                    document_tokens=min(record.document_tokens, request.to_tokens),
                    reached=record.reached.until(request.to_tokens),
                    expires_at=self._end(record),
                    last_request=request.request_id,
                )
                record = await self._sessions.write(record, wanted)
            return sessions_pb2.TruncateResponse(session=self._sessions.show(record))

        return self._once("truncate", caller, request, sessions_pb2.TruncateResponse, work)

    def fork(self, caller: Caller, request: sessions_pb2.ForkRequest) -> Run[sessions_pb2.ForkResponse]:
        """Begins a session with all tokens of another. Nothing is copied: both go on from the same KV."""

        async def work(run: Run[sessions_pb2.ForkResponse]) -> sessions_pb2.ForkResponse:
            expected = request.expected_num_tokens if request.HasField("expected_num_tokens") else None
            async with self._sessions.changing(run, caller, request.session_id, _idle(), expected) as record:
                wanted = replace(record, session_id=SessionId(secrets.token_hex(16)))
                fork = await self._begin(wanted, record)
            return sessions_pb2.ForkResponse(session=self._sessions.show(fork))

        return self._once("fork", caller, request, sessions_pb2.ForkResponse, work)

    def attach(self, caller: Caller, request: sessions_pb2.CreateRequest) -> Run[sessions_pb2.CreateResponse]:
        """Begins a session with the document of another, as it was before the first question. Nothing is copied."""
        ttl_s, on_miss = convert.ttl_s(request, self._limits), convert.on_miss(request.on_miss)

        async def work(run: Run[sessions_pb2.CreateResponse]) -> sessions_pb2.CreateResponse:  # noqa: ARG001
            # Not held meanwhile: many may begin with it at a time, and its document doesn't change.
            document = await self._sessions.find(caller, request.document_id)
            num_tokens = document.document_tokens
            if not num_tokens:
                raise FailedPrecondition(
                    f"session {request.document_id!r} has no document: append one before its first question",
                    reason="no_document",
                )
            if request.model not in ("", document.model):
                raise InvalidRequest(
                    f"model={request.model!r}: the document is of model {document.model!r}", field="model"
                )
            wanted = replace(
                document,
                session_id=SessionId(secrets.token_hex(16)),
                recipe=self._sessions.choose(document.model, request.recipe or document.recipe),
                on_miss=on_miss,
                ttl_s=ttl_s,
                token_ids=document.token_ids[:num_tokens],
                document_id=document.session_id,
                reached=document.reached.until(num_tokens),
            )
            return sessions_pb2.CreateResponse(session=self._sessions.show(await self._begin(wanted, document)))

        return self._once("create", caller, request, sessions_pb2.CreateResponse, work)

    def move(self, caller: Caller, request: sessions_pb2.MoveRequest) -> Run[sessions_pb2.MoveResponse]:
        """Hands a session to another worker, which brings its KV from the tier when it is next used."""

        async def work(run: Run[sessions_pb2.MoveResponse]) -> sessions_pb2.MoveResponse:
            async with self._sessions.changing(run, caller, request.session_id, _idle(), None) as record:
                target = (
                    None if was_carried_out(record, request.request_id) else self._target(record, request.worker_id)
                )
                if target is not None and not _is_at(record, target):
                    await self._hand_over(record)
                    tag = self._sessions.tag(record.tenant)
                    await self._fleet.take_on(target.worker_id, record.tenant, tag, record.session_id)
                    wanted = replace(
                        record,
                        worker_id=target.worker_id,
                        worker_epoch=target.epoch,
                        expires_at=self._end(record),
                        last_request=request.request_id,
                    )
                    record = await self._sessions.write(record, wanted)
            return sessions_pb2.MoveResponse(session=self._sessions.show(record))

        return self._once("move", caller, request, sessions_pb2.MoveResponse, work)

    def _once(
        self,
        kind: str,
        caller: Caller,
        request: sessions_pb2.TruncateRequest
        | sessions_pb2.ForkRequest
        | sessions_pb2.MoveRequest
        | sessions_pb2.CreateRequest,
        response: type[T],
        work: Callable[[Run[T]], Coroutine[Any, Any, T]],
    ) -> Run[T]:
        request_id = convert.request_id(request.request_id, self._limits)

        async def body(run: Run[T]) -> None:
            async with self._repeats.claim(caller.tenant, request_id, digest(kind, request)) as claim:
                if claim.kept is not None:
                    final = response.FromString(claim.kept[0])
                else:
                    final = await work(run)
                    claim.keep([final])
            run.emit(final)

        return self._runs.start(body)

    async def _begin(self, wanted: SessionRecord, source: SessionRecord) -> SessionRecord:
        """Keeps a session that begins with tokens of another, and has KV shared with it."""
        holder = await self._fork_kv(wanted, source)
        now = self._sessions.now()
        fork = replace(
            wanted,
            created_at=now,
            expires_at=now + wanted.ttl_s,
            version=0,
            worker_id=holder.worker_id if holder is not None else "",
            worker_epoch=holder.epoch if holder is not None else 0,
            last_error="",
        )
        return await self._sessions.add(fork)

    async def _fork_kv(self, wanted: SessionRecord, source: SessionRecord) -> WorkerView | None:
        """Has KV shared with a fork, in memory where it is held, and in the tier. The worker that holds the fork's."""
        if not wanted.token_ids:
            return None
        views = [view for view in self._fleet.views() if view.model.name == source.model]
        fork = worker_pb2.ForkRequest(
            session_id=source.session_id,
            fork_id=wanted.session_id,
            num_tokens=len(wanted.token_ids),
            tenant=source.tenant,
            tenant_tag=self._sessions.tag(source.tenant),
            is_document=wanted.document_id == source.session_id,
            stored_only=wanted.recipe != source.recipe,
        )
        # Any worker can name what is stored; the one that holds the session shares its memory too.
        for view in sorted(views, key=lambda view: (not _is_at(source, view), view.worker_id)):
            try:
                forked = await self._fleet.fork(view.worker_id, fork)
            except KVServiceError as error:
                logger.warning("kv_not_forked", extra={"worker_id": view.worker_id, "why": error.message})
                continue
            return view if forked.is_held or forked.is_stored else None
        return None

    def _target(self, record: SessionRecord, worker_id: str) -> WorkerView:
        """The worker to move to: the named one, or the best of those that don't hold the session."""
        views = self._fleet.views()
        if worker_id:
            named = [view for view in views if view.worker_id == worker_id]
            if not named:
                connected = ", ".join(sorted(view.worker_id for view in views)) or "none"
                raise NotFound(f"unknown worker {worker_id!r}: connected are {connected}", reason="unknown_worker")
            if named[0].model.name != record.model or named[0].headroom.draining:
                raise FailedPrecondition(
                    f"worker {worker_id!r} serves model {named[0].model.name!r}"
                    f"{' and drains' if named[0].headroom.draining else ''}; the session needs {record.model!r}",
                    reason="worker_unfit",
                )
            return named[0]
        others = [view for view in views if not _is_at(record, view)]
        request = PlacementRequest(record.model, get_recipe(record.recipe), max(1, len(record.token_ids)), "", 0)
        ranked = place(request, others)
        if not ranked:
            raise Unavailable(
                "no other worker is connected that could take the session; try again",
                reason="no_worker",
                retry_after_s=RETRY_AFTER_S,
            )
        return next(view for view in others if view.worker_id == ranked[0])

    async def _hand_over(self, record: SessionRecord) -> None:
        """Has the worker that holds a session publish what is left, and let it go."""
        for view in self._fleet.views():
            if _is_at(record, view):
                await hand_over(self._fleet, view.worker_id, record.session_id, UNARY_TIMEOUT_S, keeps_kv=False)

    def _end(self, record: SessionRecord) -> float:
        return self._sessions.now() + record.ttl_s


def _is_at(record: SessionRecord, view: WorkerView) -> bool:
    return (view.worker_id, view.epoch) == (record.worker_id, record.worker_epoch)


def _idle() -> Activity:
    return Activity(sessions_pb2.SESSION_STATE_IDLE)
