"""Reconciles the ledger with what the kv Redis holds, a bounded piece at a time. Knows nothing of timers or workers.

A pass has two parts. It goes through the tenants: adds their leases up again, and looks whether the frames that
manifests name are there. Then it goes through the kv Redis, and meets frames whose home has no lease: orphans, of a
worker that was lost between its blobs and its manifest, or of a session that was closed while no worker could delete
them. An orphan that is met in two passes `orphan_grace_s` apart is deleted; most have expired before.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from kvservice.store.blobs import Blob, Blobs, Home, key_of
from kvservice.store.ledger import KvLedger, Lease
from kvservice.store.sizes import allocated_bytes
from kvservice.types import SessionId, TenantId

logger = logging.getLogger(__name__)

ORPHAN_GRACE_S = 600.0
KEYS_A_ROUND = 5_000
MAX_ORPHAN_HOMES = 10_000
"""Homes remembered from pass to pass; what is beyond waits for a later one."""


@dataclass(frozen=True, slots=True)
class ScrubReport:
    """What a pass found, or has found so far.

    Attributes:
        leases: in force.
        ledger_bytes: charged by them.
        mended_bytes: by how much tenants' sums were off; they have been set right.
        named_frames: by manifests.
        missing_frames: of these, gone. They cost time only.
        wrong_size_frames: of these, of another size than the manifest says.
        met_frames: in the kv Redis.
        met_bytes: that they take.
        orphan_frames: of these, without a lease.
        orphan_bytes: that those take.
        removed_frames: orphans that were deleted.
    """

    leases: int = 0
    ledger_bytes: int = 0
    mended_bytes: int = 0
    named_frames: int = 0
    missing_frames: int = 0
    wrong_size_frames: int = 0
    met_frames: int = 0
    met_bytes: int = 0
    orphan_frames: int = 0
    orphan_bytes: int = 0
    removed_frames: int = 0

    @property
    def drift_bytes(self) -> int:
        """What lies in the kv Redis under a lease, less what is charged for it."""
        return self.met_bytes - self.orphan_bytes - self.ledger_bytes


@dataclass(slots=True)
class _Pass:
    """A pass that is under way."""

    tenants: deque[tuple[bytes, TenantId]]
    sessions: deque[tuple[TenantId, SessionId]] = field(default_factory=deque)
    homes: set[Home] = field(default_factory=set)
    cursor: int | None = None
    orphans: dict[Home, float] = field(default_factory=dict)
    report: ScrubReport = field(default_factory=ScrubReport)


class Scrubber:
    """Does one round after another. `clock` gives seconds.

    One of them at a time should work on one pair of servers; two do no harm, but double work.
    """

    def __init__(
        self,
        ledger: KvLedger,
        blobs: Blobs,
        clock: Callable[[], float],
        *,
        orphan_grace_s: float = ORPHAN_GRACE_S,
        keys_a_round: int = KEYS_A_ROUND,
    ) -> None:
        self._ledger = ledger
        self._blobs = blobs
        self._clock = clock
        self._orphan_grace_s = orphan_grace_s
        self._keys_a_round = keys_a_round
        self._pass: _Pass | None = None
        self._first_met: dict[Home, float] = {}
        self.last_pass: ScrubReport | None = None
        """Of the last pass that was finished."""

    async def round(self) -> bool:
        """Looks at some `keys_a_round` keys. Returns whether that ended a pass.

        Raises:
            Unavailable: one of the servers can't be reached; the pass begins anew with the next round.
        """
        current, self._pass = self._pass, None
        if current is None:
            current = _Pass(deque(sorted((await self._ledger.list_tenants()).items())))
        left = self._keys_a_round
        while left > 0:
            if current.sessions:
                left -= await self._check_manifest(current, *current.sessions.popleft())
            elif current.tenants:
                left -= await self._check_tenant(current, *current.tenants.popleft())
            elif current.cursor != 0:
                left -= await self._check_page(current)
            else:
                self._finish(current)
                return True
        self._pass = current
        return False

    async def _check_tenant(self, current: _Pass, tenant_tag: bytes, tenant: TenantId) -> int:
        settled = await self._ledger.settle(tenant)
        leases = await self._ledger.list_leases(tenant)
        found = await self._ledger.tenant_bytes(tenant)
        current.homes.update(_homes_of(tenant_tag, leases))
        current.sessions.extend((tenant, lease.session_id) for lease in leases if lease.position.version)
        report = current.report
        current.report = replace(
            report,
            leases=report.leases + len(leases),
            ledger_bytes=report.ledger_bytes + found.stored_bytes,
            mended_bytes=report.mended_bytes + abs(settled.drift_bytes),
        )
        return 1 + len(leases)

    async def _check_manifest(self, current: _Pass, tenant: TenantId, session_id: SessionId) -> int:
        manifest = await self._ledger.get_manifest(tenant, session_id)
        if manifest is None:
            return 1
        named = [(key_of(manifest, home, frame), frame.stored_bytes) for home, frame in manifest.named()]
        sizes = await self._blobs.sizes([key for key, _ in named])
        wrong = sum(bool(size) and size != told for size, (_, told) in zip(sizes, named, strict=True))
        report = current.report
        current.report = replace(
            report,
            named_frames=report.named_frames + len(named),
            missing_frames=report.missing_frames + sizes.count(0),
            wrong_size_frames=report.wrong_size_frames + wrong,
        )
        return 1 + len(named)

    async def _check_page(self, current: _Pass) -> int:
        page = await self._blobs.scan(current.cursor or 0)
        current.cursor = page.cursor
        orphans = [blob for blob in page.blobs if blob.home not in current.homes]
        due = await self._due(current, orphans)
        removed = await self._blobs.delete([blob.key for blob in due]) if due else 0
        report = current.report
        current.report = replace(
            report,
            met_frames=report.met_frames + len(page.blobs),
            met_bytes=report.met_bytes + self._taken(page.blobs),
            orphan_frames=report.orphan_frames + len(orphans),
            orphan_bytes=report.orphan_bytes + self._taken(orphans),
            removed_frames=report.removed_frames + removed,
        )
        return 1 + len(page.blobs)

    async def _due(self, current: _Pass, orphans: list[Blob]) -> list[Blob]:
        """The orphans that were met long enough ago, and have no lease now either."""
        now = self._clock()
        for home in {blob.home for blob in orphans}:
            if len(current.orphans) < MAX_ORPHAN_HOMES:
                current.orphans[home] = self._first_met.get(home, now)
        due = [blob for blob in orphans if current.orphans.get(blob.home, now) <= now - self._orphan_grace_s]
        if not due:
            return []
        tenants = await self._ledger.list_tenants()
        kept: set[Home] = set()
        for tenant_tag in {blob.home.tenant_tag for blob in due} & tenants.keys():
            kept |= _homes_of(tenant_tag, await self._ledger.list_leases(tenants[tenant_tag]))
        return [blob for blob in due if blob.home not in kept]

    def _taken(self, blobs: list[Blob] | tuple[Blob, ...]) -> int:
        return sum(allocated_bytes(blob.stored_bytes, len(blob.key), self._blobs.allocator) for blob in blobs)

    def _finish(self, current: _Pass) -> None:
        self._first_met = current.orphans
        self.last_pass = report = current.report
        stated = {name: getattr(report, name) for name in ScrubReport.__dataclass_fields__}
        level = logging.WARNING if report.mended_bytes or report.wrong_size_frames else logging.INFO
        logger.log(level, "kv_scrubbed", extra={**stated, "drift_bytes": report.drift_bytes})


def _homes_of(tenant_tag: bytes, leases: list[Lease]) -> set[Home]:
    """Where frames may lie: what manifests name, and the sessions themselves, whose first manifest may be to come."""
    ids = {home for lease in leases for home in (lease.session_id, *lease.bytes_by_home)}
    return {Home(tenant_tag, session_id) for session_id in ids}
