"""The ledger of stored KV in this process, for one gateway and its worker without a Redis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvservice.store.ledger import (
    DEFAULT_QUOTA_BYTES,
    Held,
    Lease,
    Position,
    Settled,
    TenantBytes,
    home_bytes,
    home_gone,
    over_quota,
    publication_refused,
)
from kvservice.store.manifests import Manifest
from kvservice.types import SessionId, TenantId, WorkerId


@dataclass(slots=True)
class _Books:
    """Of one tenant."""

    leases: dict[SessionId, Lease] = field(default_factory=dict)
    manifests: dict[SessionId, Manifest] = field(default_factory=dict)
    reservations: dict[str, tuple[int, float]] = field(default_factory=dict)
    quota_bytes: int | None = None
    tenant_tag: bytes = b""

    @property
    def is_empty(self) -> bool:
        return not self.leases and not self.reservations and self.quota_bytes is None


class MemoryLedger:
    """`KvLedger` in dictionaries. No method suspends, so each is atomic. It adds up anew whenever it is asked.

    Args:
        clock: unix seconds.
        default_quota_bytes: of a tenant without a quota of its own.
    """

    def __init__(self, clock: Callable[[], float], default_quota_bytes: int = DEFAULT_QUOTA_BYTES) -> None:
        self._clock = clock
        self._default_quota_bytes = default_quota_bytes
        self._tenants: dict[TenantId, _Books] = {}
        self._epoch = 0

    async def reserve_bytes(self, tenant: TenantId, reservation_id: str, num_bytes: int, ttl_s: float) -> None:
        """See `KvLedger.reserve_bytes`."""
        books = self._books(tenant)
        before = books.reservations.get(reservation_id, (0, 0.0))[0]
        wanted = _sum(books) + num_bytes - before
        if num_bytes > before and wanted > self._quota(books):
            raise over_quota(tenant, wanted, self._quota(books))
        if num_bytes:
            books.reservations[reservation_id] = (num_bytes, self._clock() + ttl_s)
        else:
            books.reservations.pop(reservation_id, None)

    async def acquire_session(
        self, tenant: TenantId, session_id: SessionId, worker_id: WorkerId, ttl_s: float
    ) -> Position:
        """See `KvLedger.acquire_session`."""
        books = self._books(tenant)
        self._epoch += 1
        until = self._clock() + ttl_s
        found = books.leases.get(session_id) or Lease(session_id, worker_id, Position(), until)
        position = Position(max(self._epoch, found.position.epoch + 1), found.position.version)
        books.leases[session_id] = replace(
            found, worker_id=worker_id, position=position, expires_at=max(until, found.expires_at)
        )
        return position

    async def publish_manifest(
        self,
        manifest: Manifest,
        expected: Position,
        *,
        bytes_by_home: Mapping[SessionId, int],
        ttl_s: float,
        reservation_id: str = "",
    ) -> Manifest:
        """See `KvLedger.publish_manifest`."""
        books, session_id = self._books(manifest.tenant), manifest.session_id
        until = self._clock() + ttl_s
        found = books.leases.get(session_id) or Lease(session_id, WorkerId(""), Position(), until)
        if manifest.epoch < found.position.epoch or expected != found.position:
            raise publication_refused(manifest, expected, found.position)
        kept_homes = home_bytes(list(books.leases.values()))
        for home in sorted(bytes_by_home):
            if home != session_id and home not in kept_homes:
                raise home_gone(manifest, home, found.position)
        position = Position(manifest.epoch, found.position.version + 1)
        rest = [each for each in books.leases.values() if each != found]
        others = home_bytes(rest)
        # Closed sessions' homes, left by the last that named them: they stay with it, and go when it is closed.
        left = {
            home: 0
            for home in found.bytes_by_home
            if home != session_id and home not in books.leases and home not in others and home not in bytes_by_home
        }
        lease = replace(
            found,
            position=position,
            expires_at=max(until, found.expires_at),
            bytes_by_home={**bytes_by_home, **left},
        )
        reserved = books.reservations.get(reservation_id, (0, 0.0))[0]
        before = sum(kept_homes.values())
        after = sum(home_bytes([*rest, lease]).values())
        wanted = _sum(books) - reserved + after - before
        if after - before > reserved and wanted > self._quota(books):
            raise over_quota(manifest.tenant, wanted, self._quota(books))
        books.reservations.pop(reservation_id, None)
        books.leases[session_id] = lease
        kept = replace(manifest, version=position.version)
        books.manifests[session_id] = kept
        books.tenant_tag = manifest.tenant_tag
        return kept

    async def get_manifest(self, tenant: TenantId, session_id: SessionId) -> Manifest | None:
        """See `KvLedger.get_manifest`."""
        return self._books(tenant).manifests.get(session_id)

    async def renew_leases(self, worker_id: WorkerId, held: Sequence[Held], ttl_s: float) -> list[Held]:
        """See `KvLedger.renew_leases`."""
        until = self._clock() + ttl_s
        lost = []
        for each in held:
            books = self._books(each.tenant)
            lease = books.leases.get(each.session_id)
            if lease is None or lease.position.epoch != each.epoch or lease.worker_id != worker_id:
                lost.append(each)
            else:
                books.leases[each.session_id] = replace(lease, expires_at=max(until, lease.expires_at))
        return lost

    async def delete_manifest(self, tenant: TenantId, session_id: SessionId) -> list[SessionId]:
        """See `KvLedger.delete_manifest`."""
        books = self._books(tenant)
        lease = books.leases.pop(session_id, None)
        books.manifests.pop(session_id, None)
        homes = {session_id, *(lease.bytes_by_home if lease is not None else ())}
        freed = sorted(homes - home_bytes(list(books.leases.values())).keys())
        self._books(tenant)
        return freed

    async def tenant_bytes(self, tenant: TenantId) -> TenantBytes:
        """See `KvLedger.tenant_bytes`."""
        books = self._books(tenant)
        return TenantBytes(_stored(books), _reserved(books), self._quota(books))

    async def set_quota(self, tenant: TenantId, num_bytes: int | None) -> None:
        """See `KvLedger.set_quota`."""
        self._books(tenant).quota_bytes = num_bytes

    async def list_leases(self, tenant: TenantId) -> list[Lease]:
        """See `KvLedger.list_leases`."""
        return sorted(self._books(tenant).leases.values(), key=lambda lease: lease.session_id)

    async def list_tenants(self) -> dict[bytes, TenantId]:
        """See `KvLedger.list_tenants`."""
        return {books.tenant_tag: tenant for tenant, books in self._tenants.items() if books.leases}

    async def settle(self, tenant: TenantId) -> Settled:
        """See `KvLedger.settle`. There is no sum that could be wrong."""
        true_bytes = _sum(self._books(tenant))
        return Settled(true_bytes, true_bytes)

    def _books(self, tenant: TenantId) -> _Books:
        """The tenant's books, less what has expired."""
        for empty in [name for name, books in self._tenants.items() if books.is_empty and name != tenant]:
            del self._tenants[empty]
        books = self._tenants.setdefault(tenant, _Books())
        now = self._clock()
        for session_id in [lease.session_id for lease in books.leases.values() if lease.expires_at <= now]:
            del books.leases[session_id]
            books.manifests.pop(session_id, None)
        for reservation_id in [name for name, (_, until) in books.reservations.items() if until <= now]:
            del books.reservations[reservation_id]
        return books

    def _quota(self, books: _Books) -> int:
        return self._default_quota_bytes if books.quota_bytes is None else books.quota_bytes


def _stored(books: _Books) -> int:
    return sum(home_bytes(list(books.leases.values())).values())


def _reserved(books: _Books) -> int:
    return sum(num_bytes for num_bytes, _ in books.reservations.values())


def _sum(books: _Books) -> int:
    return _stored(books) + _reserved(books)
