"""What is kept of sessions, repeats and the fleet. Knows nothing of Redis, gRPC, tensors or keys of the API.

A session's record is enough to compute its KV again: everything else is a cache of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvservice.errors import Conflict, InvalidRequest, LimitExceeded, NotFound
from kvservice.store.ledger import KvLedger
from kvservice.types import NOTHING_REACHED, OnMiss, PromptFormat, Reached, SessionId, TenantId, WorkerId


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session as the state store keeps it.

    Attributes:
        created_at: unix seconds.
        expires_at: unix seconds. Readers don't see the session from then on; the sweeper deletes it.
        token_ids: all tokens of the session, each in [0, 2**32).
        version: grows by one with each write; the store sets it.
        worker_id: the worker that holds the KV, or held it last.
        worker_epoch: that worker's epoch.
        last_error: what the last call failed with; empty if it went well.
        durable_tokens: leading tokens that survive the loss of every process; the store sets it.
        document_tokens: leading tokens that are documents, before the first question.
        document_id: the session whose document it began with; empty: none.
        last_request: id of the request that changed the session last, if it had one. It is written with what the
            request changed, so it is never carried out twice, even if its answer was lost.
        reached: how the KV of its tokens was computed; that of no tokens: it isn't known.
    """

    session_id: SessionId
    tenant: TenantId
    model: str
    recipe: str
    prompt_format: PromptFormat
    on_miss: OnMiss
    ttl_s: float
    created_at: float
    expires_at: float
    token_ids: tuple[int, ...] = ()
    version: int = 0
    worker_id: str = ""
    worker_epoch: int = 0
    last_error: str = ""
    durable_tokens: int = 0
    document_tokens: int = 0
    document_id: str = ""
    last_request: str = ""
    reached: Reached = NOTHING_REACHED


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A worker that may be given work: where it is, and which of its lives this is."""

    worker_id: WorkerId
    address: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Begun:
    """The request is new, and now the caller's to carry out."""


@dataclass(frozen=True, slots=True)
class InProgress:
    """The same request is being carried out by another call."""


@dataclass(frozen=True, slots=True)
class Replay:
    """The request was carried out before; these are the messages it was answered with."""

    messages: tuple[bytes, ...]


class StateStore(Protocol):
    """Sessions, locks, repeats and workers, shared by all gateways. One event loop; not for several threads.

    Every method raises Unavailable when the store can't be reached, is full or is read-only, after a bounded time.
    A write that ended so may have been made all the same: read before trying it again.

    Attributes:
        durable: writes survive the loss of every process, as far as the store knows.
        clock: unix seconds, by which sessions expire; the same for all who share the store.
    """

    durable: bool
    clock: Callable[[], float]

    @property
    def ledger(self) -> KvLedger:
        """What of the sessions' KV is stored in the tier, and whose bytes they are."""
        ...

    async def create_session(self, record: SessionRecord, at_most: int | None = None) -> SessionRecord:
        """Keeps a new session, unless its tenant has `at_most` already. Returns it as kept, at version 1.

        Raises:
            Conflict: there is a session of this id.
            LimitExceeded: the tenant has so many. Expired ones count until they are deleted, or `list_sessions` misses
                them.
        """
        ...

    async def get_session(self, session_id: SessionId) -> SessionRecord | None:
        """The session, of whichever tenant; None if there is none or it has expired."""
        ...

    async def existing_sessions(self, session_ids: Sequence[SessionId]) -> set[SessionId]:
        """Those that have a record, which may have expired a moment ago. Reads no record."""
        ...

    async def renew_session(self, record: SessionRecord, expires_at: float) -> SessionRecord:
        """Moves a session's end, unless a call is changing it, which will do so itself, or it has moved on.

        Returns the record as it is then.
        """
        ...

    async def update_session(self, record: SessionRecord) -> SessionRecord:
        """Replaces the session if it still has `record.version`. Returns it as kept, one version on.

        A call that outlives its session's `expires_at` may still write it, until the sweeper has deleted it.

        Raises:
            Conflict: the session has moved on; reason `version_moved`.
            NotFound: there is no such session any more.
        """
        ...

    async def list_sessions(self, tenant: TenantId, *, after: str, limit: int) -> list[SessionRecord]:
        """At most `limit` sessions of a tenant, ordered by id, with ids greater than `after` ("" for all)."""
        ...

    async def delete_session(self, session_id: SessionId, *, version: int | None = None) -> bool:
        """Deletes a session; False if it wasn't there.

        With `version` it is deleted only if it still has that version and nobody holds its lock: so the sweeper
        never deletes a session that was renewed since it was listed.
        """
        ...

    async def expired_sessions(self, now: float, limit: int) -> list[SessionRecord]:
        """At most `limit` sessions with `expires_at <= now` whose lock nobody holds.

        For the sweeper, which then calls `delete_session` with the record's version.
        """
        ...

    async def lock_session(self, session_id: SessionId, owner: str, ttl_s: float) -> bool:
        """Takes, or renews, the right to change a session, for `ttl_s`. False if another owner has it."""
        ...

    async def unlock_session(self, session_id: SessionId, owner: str) -> None:
        """Gives the right back; does nothing if `owner` hasn't got it any more."""
        ...

    async def begin_request(
        self, tenant: TenantId, request_id: str, digest: bytes, ttl_s: float, *, owner: str = ""
    ) -> Begun | InProgress | Replay:
        """Claims a request for `owner` and `ttl_s`, unless it was claimed before. `digest` stands for all that it says.

        Raises:
            InvalidRequest: the id was used for another request; reason `request_id_reused`.
        """
        ...

    async def renew_request(self, tenant: TenantId, request_id: str, ttl_s: float, *, owner: str = "") -> bool:
        """Prolongs a claim. False if it has lapsed, was answered, or is another's by now."""
        ...

    async def finish_request(
        self, tenant: TenantId, request_id: str, messages: Sequence[bytes], ttl_s: float, *, owner: str = ""
    ) -> None:
        """Keeps the answer of a claimed request for `ttl_s`. Does nothing if the claim has lapsed, or is another's."""
        ...

    async def forget_request(self, tenant: TenantId, request_id: str, *, owner: str = "") -> None:
        """Drops a claim or an answer of `owner`'s: the request may be made again."""
        ...

    async def next_epoch(self) -> int:
        """A number greater than any it gave before."""
        ...

    async def register_worker(self, record: WorkerRecord, ttl_s: float) -> None:
        """Announces a worker for `ttl_s`; `renew_worker` prolongs it.

        Raises:
            Conflict: a worker of this id is registered with a greater epoch; reason `stale_epoch`.
        """
        ...

    async def renew_worker(self, worker_id: WorkerId, epoch: int, ttl_s: float) -> bool:
        """Prolongs the lease. False if it has lapsed or belongs to another epoch: register again with a new one."""
        ...

    async def list_workers(self) -> list[WorkerRecord]:
        """The workers whose lease holds, ordered by id."""
        ...

    async def unregister_worker(self, worker_id: WorkerId, epoch: int) -> None:
        """Ends the lease, if it is still this epoch's."""
        ...

    async def aclose(self) -> None:
        """Closes connections. Nothing may be called after it."""
        ...


def session_exists(session_id: SessionId) -> Conflict:
    """Create of an id that is taken."""
    return Conflict(f"session {session_id!r} exists already", reason="session_exists")


def too_many_sessions(tenant: TenantId, at_most: int) -> LimitExceeded:
    """Create of one session too many."""
    return LimitExceeded(f"tenant {tenant!r} has {at_most} sessions, as many as it may", reason="too_many_sessions")


def session_gone(session_id: SessionId) -> NotFound:
    """Update of a session that was deleted."""
    return NotFound(f"no session {session_id!r}: it was closed or has expired", reason="unknown_session")


def version_moved(session_id: SessionId, expected: int, found: int) -> Conflict:
    """Update of a session that somebody else has written."""
    return Conflict(
        f"session {session_id!r} is at version {found}, not {expected}: another call has changed it; read it again",
        reason="version_moved",
    )


def request_id_reused(request_id: str) -> InvalidRequest:
    """A request id that stood for something else."""
    return InvalidRequest(
        f"request_id {request_id!r} was used for another request: use a new one for each new request",
        reason="request_id_reused",
        field="request_id",
    )


def stale_epoch(record: WorkerRecord, found: int) -> Conflict:
    """A worker of an earlier life that registers over its successor."""
    return Conflict(
        f"worker {record.worker_id!r} is registered with epoch {found}, which is greater than {record.epoch}",
        reason="stale_epoch",
    )
