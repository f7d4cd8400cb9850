"""Sessions' records: who may see them, how they begin, change and end. Knows nothing of how an answer is made."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from kvservice.config.gateway import GatewayConfig
from kvservice.errors import Conflict, InvalidRequest, KVServiceError, LimitExceeded, NotFound, Unavailable
from kvservice.gateway import convert
from kvservice.gateway.auth import Caller, tenant_tag
from kvservice.gateway.catalogue import choose_model, choose_recipe
from kvservice.gateway.dispatch import Outcome
from kvservice.gateway.fleet import Fleet, Freed
from kvservice.gateway.locks import hold_session
from kvservice.gateway.quotas import Quotas
from kvservice.gateway.repeats import Repeats, digest
from kvservice.gateway.runs import Run, Runs
from kvservice.internal.convert import ON_MISS_CODES, reached_from_proto, reached_to_proto
from kvservice.internal.v1 import worker_pb2
from kvservice.store.base import SessionRecord, StateStore
from kvservice.types import SessionId, TenantId
from kvservice.v1 import sessions_pb2

logger = logging.getLogger(__name__)

T = TypeVar("T")

SWEEP_BATCH = 100
RENEWED_BELOW = 0.9
"""Get moves the expiry when less than this share of the time to live is left: most calls then write nothing."""
SOON_BELOW = 0.1
"""Of the time to live: when less is left, the session is shown to expire soon."""


@dataclass(slots=True)
class Activity:
    """The call that is changing a session, as this gateway runs it."""

    state: sessions_pb2.SessionState.ValueType
    done_tokens: int = 0
    total_tokens: int = 0


def unknown_session(session_id: str) -> NotFound:
    """The same for a session that never was, one that is gone and one of another tenant."""
    return NotFound(
        f"unknown session {session_id!r}: it was never created, was closed, or has expired; create a new one",
        reason="unknown_session",
    )


class Sessions:
    """Creates, shows, lists, changes, closes and expires sessions. `clock` gives unix seconds."""

    def __init__(
        self,
        config: GatewayConfig,
        store: StateStore,
        fleet: Fleet,
        runs: Runs,
        repeats: Repeats,
        clock: Callable[[], float],
        *,
        quotas: Quotas,
    ) -> None:
        self._quotas = quotas
        self._config = config
        self._limits = config.limits
        self._secret = config.secret.get_secret_value()
        self._store = store
        self._fleet = fleet
        self._runs = runs
        self._repeats = repeats
        self._clock = clock
        self._activities: dict[SessionId, Activity] = {}

    # Create, Get, List, Close

    def create(self, caller: Caller, request: sessions_pb2.CreateRequest) -> Run[sessions_pb2.CreateResponse]:
        """Begins a session of `caller`'s tenant."""
        request_id = convert.request_id(request.request_id, self._limits)
        ttl_s = convert.ttl_s(request, self._limits)
        prompt_format, on_miss = convert.prompt_format(request.prompt_format), convert.on_miss(request.on_miss)

        async def body(run: Run[sessions_pb2.CreateResponse]) -> None:
            request_digest = digest("create", request)
            async with self._repeats.claim(caller.tenant, request_id, request_digest) as claim:
                if claim.kept is not None:
                    run.emit(sessions_pb2.CreateResponse.FromString(claim.kept[0]))
                    return
                model = choose_model(self._fleet, request.model, self._config.default_model)
                recipe = choose_recipe(model, request.recipe, self._config.default_recipe)
                now = self._clock()
                record = SessionRecord(
                    session_id=SessionId(secrets.token_hex(16)),
                    tenant=caller.tenant,
                    model=model.name,
                    recipe=recipe.name,
                    prompt_format=prompt_format,
                    on_miss=on_miss,
                    ttl_s=ttl_s,
                    created_at=now,
                    expires_at=now + ttl_s,
                )
                record = await self.add(record)
                response = sessions_pb2.CreateResponse(session=self._show(record))
                claim.keep([response])
            run.emit(response)

        return self._runs.start(body)

    async def get(self, caller: Caller, session_id: str) -> sessions_pb2.Session:
        """One session, with the progress of the call that is changing it. Moves its expiry, like any call on it."""
        record = await self.find(caller, session_id)
        now = self._clock()
        if record.expires_at - now < record.ttl_s * RENEWED_BELOW:
            try:
                record = await self._store.renew_session(record, now + record.ttl_s)
            except Unavailable as error:
                logger.warning("session_not_renewed", extra={"session_id": session_id, "why": error.message})
        return self._show(record)

    async def list(self, caller: Caller, request: sessions_pb2.ListRequest) -> sessions_pb2.ListResponse:
        """A page of the tenant's sessions, ordered by id."""
        limit = request.page_size or self._limits.default_page_size
        if limit > self._limits.page_size:
            raise InvalidRequest(f"page_size={limit}: it must be 0 to {self._limits.page_size}", field="page_size")
        after = self._after(caller.tenant, request.page_token) if request.page_token else ""
        records = await self._store.list_sessions(caller.tenant, after=after, limit=limit + 1)
        response = sessions_pb2.ListResponse(sessions=[self._show(record) for record in records[:limit]])
        if len(records) > limit:
            response.next_page_token = self._page_token(caller.tenant, records[limit - 1].session_id)
        return response

    def close(self, caller: Caller, request: sessions_pb2.CloseRequest) -> Run[sessions_pb2.CloseResponse]:
        """Ends a session: its KV is released, its record deleted; `purge` deletes its stored bytes too."""
        request_id = convert.request_id(request.request_id, self._limits)

        async def body(run: Run[sessions_pb2.CloseResponse]) -> None:
            request_digest = digest("close", request)
            async with self._repeats.claim(caller.tenant, request_id, request_digest) as claim:
                if claim.kept is not None:
                    run.emit(sessions_pb2.CloseResponse.FromString(claim.kept[0]))
                    return
                record = await self.find(caller, request.session_id)
                async with hold_session(self._store, record.session_id, secrets.token_hex(8), self._config.lock_ttl_s):
                    # The record last: should something fail, the session is still there to be closed again.
                    freed = await self._let_go(record, purge=request.purge)
                    await self._store.delete_session(record.session_id)
                response = sessions_pb2.CloseResponse(
                    freed_device_bytes=freed.device_bytes, freed_host_bytes=freed.host_bytes
                )
                claim.keep([response])
            run.emit(response)

        return self._runs.start(body)

    # For the calls that change a session

    def tag(self, tenant: TenantId) -> bytes:
        """Stands for the tenant in stored keys."""
        return tenant_tag(self._secret, tenant)

    def submission(self, record: SessionRecord, recipe: str) -> worker_pb2.Submit:
        """A call on the session, for a worker; the work itself is the caller's to fill in."""
        return worker_pb2.Submit(
            call_id=secrets.token_hex(16),
            session_id=record.session_id,
            tenant_tag=self.tag(record.tenant),
            tenant=record.tenant,
            recipe=recipe,
            base_token_ids=record.token_ids,
            retain=True,
            on_miss=ON_MISS_CODES[record.on_miss],
            reached=reached_to_proto(record.reached) if record.reached.num_computed else None,
        )

    async def find(self, caller: Caller, session_id: str) -> SessionRecord:
        """The record of a session of `caller`'s tenant.

        Raises:
            NotFound: there is none; that of another tenant is none.
        """
        record = await self._store.get_session(SessionId(session_id)) if session_id else None
        if record is None or record.tenant != caller.tenant:
            raise unknown_session(session_id)
        return record

    @asynccontextmanager
    async def changing(
        self, run: Run[T], caller: Caller, session_id: str, activity: Activity, expected_num_tokens: int | None
    ) -> AsyncIterator[SessionRecord]:
        """Holds a session for a call that changes it, and shows the call in Get meanwhile.

        Raises:
            NotFound: no such session.
            Conflict: another call is changing it, or it doesn't hold the expected number of tokens.
        """
        found = await self.find(caller, session_id)
        async with hold_session(self._store, found.session_id, secrets.token_hex(8), self._config.lock_ttl_s):
            record = await self.find(caller, session_id)
            _check_expected(record, expected_num_tokens)
            self._activities[record.session_id] = activity
            try:
                yield record
            except asyncio.CancelledError:
                await self._note_failure(record, run, run.cause)
                raise
            except KVServiceError as error:
                await self._note_failure(record, run, error)
                raise
            finally:
                del self._activities[record.session_id]

    async def commit(
        self, record: SessionRecord, outcome: Outcome, request_id: str, *, is_document: bool = False
    ) -> SessionRecord:
        """Writes what the session gained by a call that ended well, a document or a question and its answer, and
        which call that was."""
        token_ids = record.token_ids + tuple(outcome.done.appended_token_ids)
        only_documents = is_document and record.document_tokens == len(record.token_ids)
        wanted = replace(
            record,
            token_ids=token_ids,
            document_tokens=len(token_ids) if only_documents else record.document_tokens,
            worker_id=outcome.worker.worker_id,
            worker_epoch=outcome.worker.epoch,
            expires_at=self._clock() + record.ttl_s,
            last_error="",
            last_request=request_id,
            reached=reached_from_proto(outcome.done.reached),
        )
        return await self.write(record, wanted)

    async def write(self, record: SessionRecord, wanted: SessionRecord) -> SessionRecord:
        """Puts `wanted` in the place of `record`, whose lock the caller holds."""
        try:
            return await self._store.update_session(wanted)
        except Unavailable:
            # The write may have been made, and only its answer lost.
            current = await self._store.get_session(record.session_id)
            if current is None or current.version != record.version + 1 or _content(current) != _content(wanted):
                raise
            return current

    def choose(self, model: str, recipe: str) -> str:
        """The recipe of a new session of a model: the one asked for, or the default one.

        Raises:
            InvalidRequest: there is no such recipe.
            Unavailable: no worker has the model.
        """
        return choose_recipe(choose_model(self._fleet, model, model), recipe, self._config.default_recipe).name

    async def add(self, record: SessionRecord) -> SessionRecord:
        """Keeps a new session. Raises LimitExceeded if its tenant has too many."""
        quota = await self._quotas.most_sessions(record.tenant)
        most = min(quota or self._limits.sessions_per_tenant, self._limits.sessions_per_tenant)
        try:
            return await self._store.create_session(record, most)
        except LimitExceeded:
            # Some of them may have expired since they were last swept.
            if len(await self._store.list_sessions(record.tenant, after="", limit=most)) >= most:
                raise self._quotas.refuse_session(record.tenant, most) from None
        await self.sweep()
        try:
            return await self._store.create_session(record, most)
        except LimitExceeded:
            raise self._quotas.refuse_session(record.tenant, most) from None

    def now(self) -> float:
        """Unix seconds."""
        return self._clock()

    def show(self, record: SessionRecord) -> sessions_pb2.Session:
        """The session as callers see it."""
        return self._show(record)

    # For the sweeper

    async def sweep(self) -> int:
        """Deletes expired sessions and releases what workers hold of them; gives their number."""
        swept = 0
        while records := await self._store.expired_sessions(self._clock(), SWEEP_BATCH):
            deleted = 0
            for record in records:
                if await self._store.delete_session(record.session_id, version=record.version):
                    deleted += 1
                    await self._let_go(record, purge=False)
                    logger.info("session_expired", extra={"session_id": record.session_id})
            swept += deleted
            if not deleted:
                break
        return swept

    async def _let_go(self, record: SessionRecord, *, purge: bool) -> Freed:
        """Has workers drop a session, forgets its manifest, and deletes its blobs; gives what was freed.

        In this order: a worker that has dropped it publishes no more, and a reader that finds no manifest looks for no
        blobs. Those that a fork still reads stay; without `purge` all stay until their time is up.
        """
        tags = {self.tag(record.tenant)}
        freed = await self._fleet.release(record.session_id, self.tag(record.tenant), purge=False)
        ledger = self._store.ledger
        if purge and (manifest := await ledger.get_manifest(record.tenant, record.session_id)) is not None:
            # What it names may be of a secret that the service had before.
            tags.add(manifest.tenant_tag)
        for home in await ledger.delete_manifest(record.tenant, record.session_id):
            for tag in tags if purge else ():
                await self._fleet.release(home, tag, purge=True)
        await self._quotas.metering.end_session(record, freed)
        return freed

    def _show(self, record: SessionRecord) -> sessions_pb2.Session:
        session = convert.session_to_proto(record)
        session.expires_soon = record.expires_at - self._clock() < record.ttl_s * SOON_BELOW
        activity = self._activities.get(record.session_id)
        if activity is not None:
            session.state = activity.state
            session.prefill_done_tokens = activity.done_tokens
            session.prefill_total_tokens = activity.total_tokens
        return session

    async def _note_failure(self, record: SessionRecord, run: Run[T], error: KVServiceError | None) -> None:
        """Even a failed call moves the expiry; why a detached one failed can only be told here."""
        last_error = error.message if run.detached and error is not None else ""
        noted = replace(record, expires_at=self._clock() + record.ttl_s, last_error=last_error)
        try:
            await self._store.update_session(noted)
        except KVServiceError as lost:
            logger.warning("failure_not_noted", extra={"session_id": record.session_id, "why": lost.message})

    def _page_token(self, tenant: TenantId, last: str) -> str:
        return base64.urlsafe_b64encode(self._page_mac(tenant, last) + last.encode()).decode()

    def _after(self, tenant: TenantId, page_token: str) -> str:
        try:
            raw = base64.urlsafe_b64decode(page_token.encode())
            mac, last = raw[:16], raw[16:].decode()
        except (binascii.Error, UnicodeError):
            mac, last = b"", ""
        if not hmac.compare_digest(mac, self._page_mac(tenant, last)):
            raise InvalidRequest("page_token is not one that List gave to this tenant", field="page_token")
        return last

    def _page_mac(self, tenant: TenantId, last: str) -> bytes:
        # NUL can't be in a session id, so tenant and id can't be shifted into one another.
        return hashlib.blake2b(f"page\0{last}\0{tenant}".encode(), digest_size=16, key=self._secret).digest()


def _content(record: SessionRecord) -> tuple[object, ...]:
    """What a write is told by."""
    return record.token_ids, record.worker_id, record.worker_epoch, record.last_request


def was_carried_out(record: SessionRecord, request_id: str) -> bool:
    """Whether a request is the last that changed a session: then only its answer was lost, with its gateway."""
    return bool(request_id) and record.last_request == request_id


def refuse_lost_answer(record: SessionRecord, request_id: str) -> None:
    """Refuses to carry out again what was carried out, and whose answer can't be given again.

    Raises:
        Conflict: it was carried out.
    """
    if was_carried_out(record, request_id):
        held = len(record.token_ids)
        raise Conflict(
            f"request {request_id!r} was carried out, and its answer lost with the gateway that gave it: session "
            f"{record.session_id} holds {held} tokens now. Go on from there, or take it back with Truncate",
            reason="answer_lost",
            metadata={"num_tokens": str(held)},
        )


def _check_expected(record: SessionRecord, expected: int | None) -> None:
    held = len(record.token_ids)
    if expected is not None and expected != held:
        raise Conflict(
            f"expected_num_tokens={expected}, but session {record.session_id} holds {held} tokens; look at it and "
            "make the call again",
            reason="num_tokens_mismatch",
            metadata={"num_tokens": str(held)},
        )
