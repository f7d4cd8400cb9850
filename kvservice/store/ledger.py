"""Whose bytes lie in the kv Redis, until when, and who may say so. Knows nothing of Redis or of how bytes get there.

    reserve ──► blobs into kv ──► publish: the reservation becomes a lease ──► renew … ──► delete, or expire

A *lease* is a session's claim to bytes until a time; only its owner renews it. Bytes belong to *homes* (see
`manifests`): a home is charged to its tenant once, however many sessions' manifests name frames in it, with the most
that any of them names, and for as long as one of them lives. What has expired counts no more, whoever asks and
whenever: nobody needs to clean up first.

Each acquisition of a session has an *epoch*, greater than all before. A manifest is published by compare-and-set on
(epoch, version), and never with a lower epoch than the last acquisition's: who was cut off and comes back can't
publish.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from kvservice.errors import QUOTA_KEY, Conflict, LimitExceeded, NotFound
from kvservice.store.manifests import Manifest
from kvservice.types import SessionId, TenantId, WorkerId

DEFAULT_QUOTA_BYTES = 64 << 30
"""The most bytes of a tenant that has no quota of its own."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where the publications of a session stand: the owner's epoch and the manifest's version; 0 and 0 if nowhere."""

    epoch: int = 0
    version: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """A session that a worker owns, or believes it owns."""

    tenant: TenantId
    session_id: SessionId
    epoch: int


@dataclass(frozen=True, slots=True)
class Lease:
    """A session's claim.

    Attributes:
        worker_id: the owner; empty if nobody has acquired the session yet, as after a fork.
        position: of its publications.
        expires_at: unix seconds.
        bytes_by_home: what its manifest names in each home.
    """

    session_id: SessionId
    worker_id: WorkerId
    position: Position
    expires_at: float
    bytes_by_home: Mapping[SessionId, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TenantBytes:
    """A tenant's sum.

    Attributes:
        stored_bytes: charged by leases.
        reserved_bytes: reserved, and not published yet.
        quota_bytes: the most that both may be together.
    """

    stored_bytes: int
    reserved_bytes: int
    quota_bytes: int


@dataclass(frozen=True, slots=True)
class Settled:
    """What a check of a tenant's books found: the sum that was kept, and the one that its leases make."""

    kept_bytes: int
    true_bytes: int

    @property
    def drift_bytes(self) -> int:
        """By how much the sum was too high."""
        return self.kept_bytes - self.true_bytes


class KvLedger(Protocol):
    """Reservations, leases and manifests of all tenants. One event loop; not for several threads.

    Every method raises Unavailable as `StateStore`'s do. A write that ended so may have been made all the same.
    """

    async def reserve_bytes(self, tenant: TenantId, reservation_id: str, num_bytes: int, ttl_s: float) -> None:
        """Claims `num_bytes` for `ttl_s`, in place of what the same reservation claimed before. 0 gives it back.

        Raises:
            LimitExceeded: the tenant would have more than its quota; reason `stored_bytes_quota`.
        """
        ...

    async def acquire_session(
        self, tenant: TenantId, session_id: SessionId, worker_id: WorkerId, ttl_s: float
    ) -> Position:
        """Makes a worker the owner of a session, under an epoch of its own; whoever was it before can't publish now.

        Returns the new epoch and the version of the manifest that is there.
        """
        ...

    async def publish_manifest(
        self,
        manifest: Manifest,
        expected: Position,
        *,
        bytes_by_home: Mapping[SessionId, int],
        ttl_s: float,
        reservation_id: str = "",
    ) -> Manifest:
        """Puts a manifest in the place of the one at `expected`, and its lease in that of the reservation.

        Args:
            manifest: its version is set by the store.
            expected: where the publications of the session stand.
            bytes_by_home: what its frames take, by where they lie.
            ttl_s: of the lease.
            reservation_id: what is left of it is given back. If it has lapsed, the quota is checked again.

        Returns:
            The manifest as kept.

        Raises:
            Conflict: the session has an owner of a greater epoch, reason `fenced`; or another manifest was published,
                reason `manifest_moved`; or nobody keeps the frames of a home any more, reason `home_gone`. `metadata`
                has the true epoch and version.
            LimitExceeded: without a reservation, beyond the quota.
        """
        ...

    async def get_manifest(self, tenant: TenantId, session_id: SessionId) -> Manifest | None:
        """The manifest in force; None if there is none or its lease has expired."""
        ...

    async def renew_leases(self, worker_id: WorkerId, held: Sequence[Held], ttl_s: float) -> list[Held]:
        """Prolongs the leases of all sessions of a worker, in one round trip. Returns those that it owns no more."""
        ...

    async def delete_manifest(self, tenant: TenantId, session_id: SessionId) -> list[SessionId]:
        """Ends a session's lease and forgets its manifest and owner.

        Returns the homes whose frames nobody keeps any more, the session itself among them unless others do: their
        blobs may be deleted, now that no reader can find them. Homes of sessions that were closed before, which it was
        the last to name, are among them.
        """
        ...

    async def tenant_bytes(self, tenant: TenantId) -> TenantBytes:
        """What the tenant has, and may have."""
        ...

    async def set_quota(self, tenant: TenantId, num_bytes: int | None) -> None:
        """Sets the most bytes that a tenant may have stored; None: the service's default."""
        ...

    async def list_leases(self, tenant: TenantId) -> list[Lease]:
        """The leases in force, ordered by session id."""
        ...

    async def list_tenants(self) -> dict[bytes, TenantId]:
        """Tenants that may have leases, by their tags. A hint: one whose leases have all expired may be among them."""
        ...

    async def settle(self, tenant: TenantId) -> Settled:
        """Adds the tenant's leases up again, and takes the result for its sum."""
        ...


async def fork_manifest(
    ledger: KvLedger,
    tenant: TenantId,
    session_id: SessionId,
    fork_id: SessionId,
    num_tokens: int,
    ttl_s: float,
    *,
    is_document: bool = False,
) -> Manifest:
    """Publishes a manifest for a fork: it names the frames of `session_id` up to `num_tokens`, where they lie.

    Nothing is copied, and nothing more is charged. The fork has no owner until a worker acquires it. With `is_document`
    those tokens are a document that the two share.

    Raises:
        NotFound: the session has no manifest.
        Conflict: the fork has one already, or the session was closed in the meantime.
    """
    source = await ledger.get_manifest(tenant, session_id)
    if source is None:
        raise NotFound(
            f"session {session_id!r} has no manifest: nothing of it is in the tier, or that has expired",
            reason="no_manifest",
        )
    fork = replace(
        source,
        session_id=fork_id,
        epoch=0,
        version=0,
        num_tokens=min(num_tokens, source.num_tokens),
        window_start=min(source.window_start, num_tokens),
        frames=source.frames.until(num_tokens),
        window=source.window if source.window is not None and source.window.stop <= num_tokens else None,
        reached=source.reached.until(num_tokens),
        is_shared=False,
        parent=session_id,
        document_id=session_id if is_document else source.document_id,
    )
    # What a home is charged with isn't changed by who names less of it, so the parent's share does for the fork.
    leases = {lease.session_id: lease for lease in await ledger.list_leases(tenant)}
    parents = leases[session_id].bytes_by_home if session_id in leases else {}
    bytes_by_home = {home: parents.get(home, 0) for home in fork.homes}
    return await ledger.publish_manifest(fork, Position(), bytes_by_home=bytes_by_home, ttl_s=ttl_s)


def split_bytes(leases: Sequence[Lease]) -> dict[SessionId, int]:
    """What each session bears: its own homes, and of a shared one an equal part. The parts add up to the sum."""
    charges = home_bytes(leases)
    users: dict[SessionId, list[SessionId]] = {}
    for lease in sorted(leases, key=lambda lease: lease.session_id):
        for home in lease.bytes_by_home:
            users.setdefault(home, []).append(lease.session_id)
    shares = {lease.session_id: 0 for lease in leases}
    for home, sessions in users.items():
        part, rest = divmod(charges[home], len(sessions))
        for index, session_id in enumerate(sessions):
            shares[session_id] += part + (index < rest)
    return shares


def home_bytes(leases: Sequence[Lease]) -> dict[SessionId, int]:
    """What each home is charged with: the most that any lease names in it."""
    charges: dict[SessionId, int] = {}
    for home, num_bytes in _named(leases):
        charges[home] = max(charges.get(home, 0), num_bytes)
    return charges


def _named(leases: Sequence[Lease]) -> Iterator[tuple[SessionId, int]]:
    for lease in leases:
        yield from lease.bytes_by_home.items()


def over_quota(tenant: TenantId, wanted_bytes: int, quota_bytes: int) -> LimitExceeded:
    """More bytes than the tenant may have stored."""
    return LimitExceeded(
        f"tenant {tenant!r} would have {wanted_bytes} bytes stored, and may have {quota_bytes}: close sessions, "
        "or raise the quota",
        reason="stored_bytes_quota",
        metadata={QUOTA_KEY: "stored_bytes", "wanted_bytes": str(wanted_bytes), "quota_bytes": str(quota_bytes)},
    )


def publication_refused(manifest: Manifest, expected: Position, found: Position) -> Conflict:
    """A publication by who isn't the owner any more, or over a manifest that it doesn't know."""
    fenced = manifest.epoch < found.epoch
    return Conflict(
        f"manifest of session {manifest.session_id!r} with epoch {manifest.epoch}, in place of epoch {expected.epoch} "
        f"version {expected.version}: the session is at epoch {found.epoch} version {found.version}; "
        + ("another worker has acquired it" if fenced else "read the manifest again"),
        reason="fenced" if fenced else "manifest_moved",
        metadata={"epoch": str(found.epoch), "version": str(found.version)},
    )


def home_gone(manifest: Manifest, home: str, found: Position) -> Conflict:
    """A manifest that names frames which nobody keeps."""
    return Conflict(
        f"manifest of session {manifest.session_id!r} names frames of {home!r}, which was closed or has expired",
        reason="home_gone",
        metadata={"epoch": str(found.epoch), "version": str(found.version), "home": home},
    )
