"""A state store in this process, for one gateway without a Redis. Nothing of it outlives the process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvservice.store.base import (
    Begun,
    InProgress,
    Replay,
    SessionRecord,
    WorkerRecord,
    request_id_reused,
    session_exists,
    session_gone,
    stale_epoch,
    too_many_sessions,
    version_moved,
)
from kvservice.store.ledger import DEFAULT_QUOTA_BYTES
from kvservice.store.memory_ledger import MemoryLedger
from kvservice.types import SessionId, TenantId, WorkerId


@dataclass(slots=True)
class _Request:
    digest: bytes
    lapses_at: float
    owner: str
    messages: tuple[bytes, ...] | None = None


class MemoryStateStore:
    """`StateStore` in dictionaries. No method suspends, so each is atomic.

    Args:
        clock: unix seconds.
        default_quota_bytes: stored bytes of a tenant without a quota of its own.
    """

    durable = False

    def __init__(self, clock: Callable[[], float] = time.time, default_quota_bytes: int = DEFAULT_QUOTA_BYTES) -> None:
        self.ledger = MemoryLedger(clock, default_quota_bytes)
        self.clock = clock
        self._sessions: dict[SessionId, SessionRecord] = {}
        self._locks: dict[SessionId, tuple[str, float]] = {}
        self._requests: dict[tuple[TenantId, str], _Request] = {}
        self._workers: dict[WorkerId, tuple[WorkerRecord, float]] = {}
        self._epoch = 0

    async def create_session(self, record: SessionRecord, at_most: int | None = None) -> SessionRecord:
        """See `StateStore.create_session`."""
        if record.session_id in self._sessions:
            raise session_exists(record.session_id)
        if at_most is not None and sum(one.tenant == record.tenant for one in self._sessions.values()) >= at_most:
            raise too_many_sessions(record.tenant, at_most)
        return self._keep(record, version=1)

    async def get_session(self, session_id: SessionId) -> SessionRecord | None:
        """See `StateStore.get_session`."""
        record = self._sessions.get(session_id)
        return record if record is not None and record.expires_at > self.clock() else None

    async def existing_sessions(self, session_ids: Sequence[SessionId]) -> set[SessionId]:
        """See `StateStore.existing_sessions`."""
        return self._sessions.keys() & set(session_ids)

    async def renew_session(self, record: SessionRecord, expires_at: float) -> SessionRecord:
        """See `StateStore.renew_session`."""
        kept = self._sessions.get(record.session_id)
        if kept is None or kept.version != record.version or self._is_locked(record.session_id):
            return kept or record
        return self._keep(replace(kept, expires_at=expires_at), version=kept.version + 1)

    async def update_session(self, record: SessionRecord) -> SessionRecord:
        """See `StateStore.update_session`."""
        kept = self._sessions.get(record.session_id)
        if kept is None:
            raise session_gone(record.session_id)
        if kept.version != record.version:
            raise version_moved(record.session_id, record.version, kept.version)
        return self._keep(record, version=record.version + 1)

    async def list_sessions(self, tenant: TenantId, *, after: str, limit: int) -> list[SessionRecord]:
        """See `StateStore.list_sessions`."""
        now = self.clock()
        seen = (r for r in self._sessions.values() if r.tenant == tenant and r.session_id > after)
        return sorted((r for r in seen if r.expires_at > now), key=lambda r: r.session_id)[:limit]

    async def delete_session(self, session_id: SessionId, *, version: int | None = None) -> bool:
        """See `StateStore.delete_session`."""
        kept = self._sessions.get(session_id)
        if kept is None:
            return False
        if version is not None and (kept.version != version or self._is_locked(session_id)):
            return False
        del self._sessions[session_id]
        return True

    async def expired_sessions(self, now: float, limit: int) -> list[SessionRecord]:
        """See `StateStore.expired_sessions`."""
        expired = (r for r in self._sessions.values() if r.expires_at <= now and not self._is_locked(r.session_id))
        return sorted(expired, key=lambda r: r.expires_at)[:limit]

    async def lock_session(self, session_id: SessionId, owner: str, ttl_s: float) -> bool:
        """See `StateStore.lock_session`."""
        if self._is_locked(session_id) and self._locks[session_id][0] != owner:
            return False
        self._locks[session_id] = (owner, self.clock() + ttl_s)
        return True

    async def unlock_session(self, session_id: SessionId, owner: str) -> None:
        """See `StateStore.unlock_session`."""
        if self._is_locked(session_id) and self._locks[session_id][0] == owner:
            del self._locks[session_id]

    async def begin_request(
        self, tenant: TenantId, request_id: str, digest: bytes, ttl_s: float, *, owner: str = ""
    ) -> Begun | InProgress | Replay:
        """See `StateStore.begin_request`."""
        request = self._request(tenant, request_id)
        if request is None:
            self._requests[tenant, request_id] = _Request(digest, self.clock() + ttl_s, owner)
            return Begun()
        if request.digest != digest:
            raise request_id_reused(request_id)
        return InProgress() if request.messages is None else Replay(request.messages)

    async def renew_request(self, tenant: TenantId, request_id: str, ttl_s: float, *, owner: str = "") -> bool:
        """See `StateStore.renew_request`."""
        request = self._request(tenant, request_id)
        if request is None or request.owner != owner or request.messages is not None:
            return False
        request.lapses_at = self.clock() + ttl_s
        return True

    async def finish_request(
        self, tenant: TenantId, request_id: str, messages: Sequence[bytes], ttl_s: float, *, owner: str = ""
    ) -> None:
        """See `StateStore.finish_request`."""
        request = self._request(tenant, request_id)
        if request is not None and request.owner == owner:
            request.messages = tuple(messages)
            request.lapses_at = self.clock() + ttl_s

    async def forget_request(self, tenant: TenantId, request_id: str, *, owner: str = "") -> None:
        """See `StateStore.forget_request`."""
        request = self._request(tenant, request_id)
        if request is not None and request.owner == owner:
            del self._requests[tenant, request_id]

    async def next_epoch(self) -> int:
        """See `StateStore.next_epoch`. Counts from 1 in each process."""
        self._epoch += 1
        return self._epoch

    async def register_worker(self, record: WorkerRecord, ttl_s: float) -> None:
        """See `StateStore.register_worker`."""
        kept = self._lease(record.worker_id)
        if kept is not None and kept.epoch > record.epoch:
            raise stale_epoch(record, kept.epoch)
        self._workers[record.worker_id] = (record, self.clock() + ttl_s)

    async def renew_worker(self, worker_id: WorkerId, epoch: int, ttl_s: float) -> bool:
        """See `StateStore.renew_worker`."""
        kept = self._lease(worker_id)
        if kept is None or kept.epoch != epoch:
            return False
        self._workers[worker_id] = (kept, self.clock() + ttl_s)
        return True

    async def list_workers(self) -> list[WorkerRecord]:
        """See `StateStore.list_workers`."""
        return [kept for worker_id in sorted(self._workers) if (kept := self._lease(worker_id)) is not None]

    async def unregister_worker(self, worker_id: WorkerId, epoch: int) -> None:
        """See `StateStore.unregister_worker`."""
        kept = self._lease(worker_id)
        if kept is not None and kept.epoch == epoch:
            del self._workers[worker_id]

    async def aclose(self) -> None:
        """See `StateStore.aclose`."""

    def _keep(self, record: SessionRecord, version: int) -> SessionRecord:
        kept = replace(record, version=version, durable_tokens=0)
        self._sessions[record.session_id] = kept
        return kept

    def _is_locked(self, session_id: SessionId) -> bool:
        lock = self._locks.get(session_id)
        if lock is not None and lock[1] <= self.clock():
            del self._locks[session_id]
            lock = None
        return lock is not None

    def _request(self, tenant: TenantId, request_id: str) -> _Request | None:
        # Lapsed requests go here, so that they don't pile up.
        now = self.clock()
        for key in [key for key, request in self._requests.items() if request.lapses_at <= now]:
            del self._requests[key]
        return self._requests.get((tenant, request_id))

    def _lease(self, worker_id: WorkerId) -> WorkerRecord | None:
        lease = self._workers.get(worker_id)
        return lease[0] if lease is not None and lease[1] > self.clock() else None
