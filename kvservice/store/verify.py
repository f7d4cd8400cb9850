"""What exists of a tenant or a session, and whether what its manifests name is there. Reads only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvservice.store.base import StateStore
from kvservice.store.blobs import Blobs, all_blobs, key_of
from kvservice.store.ledger import Lease, TenantBytes, split_bytes
from kvservice.types import SessionId, TenantId

RECORDS_A_PAGE = 100


@dataclass(frozen=True, slots=True)
class SessionFindings:
    """What there is of one session or document.

    Attributes:
        has_record: the gateway knows it. A document of its own has none.
        has_lease: bytes are charged for it, or a worker owns it.
        version: of its manifest; 0 if it has none.
        num_tokens: that the manifest was published for.
        charged_bytes: its part of what the tenant is charged with.
        named_frames: that its manifest names.
        missing_frames: of these, gone.
        wrong_size_frames: of these, of another size than the manifest says.
        corrupt_frames: of these, failing their checks.
        own_frames: that lie under its id, named or not.
    """

    session_id: SessionId
    has_record: bool = False
    has_lease: bool = False
    version: int = 0
    num_tokens: int = 0
    charged_bytes: int = 0
    named_frames: int = 0
    missing_frames: int = 0
    wrong_size_frames: int = 0
    corrupt_frames: int = 0
    own_frames: int = 0


@dataclass(frozen=True, slots=True)
class TenantFindings:
    """What there is of a tenant; of one session if only that was asked for."""

    sessions: tuple[SessionFindings, ...]
    tenant_bytes: TenantBytes


async def verify(
    store: StateStore, blobs: Blobs, tenant: TenantId, tenant_tag: bytes, session_id: str = ""
) -> TenantFindings:
    """Looks for records, leases, manifests and frames, and reads every frame that a manifest names.

    Args:
        store: has records and the ledger.
        blobs: has the frames.
        tenant: whose they are.
        tenant_tag: stands for the tenant in the frames' keys.
        session_id: the only session to look for; empty: all of the tenant.
    """
    leases = await store.ledger.list_leases(tenant)
    records = await _records(store, tenant, session_id)
    stored: dict[SessionId, dict[bytes, int]] = {}
    async for blob in all_blobs(blobs, tenant_tag, session_id):
        stored.setdefault(blob.home.session_id, {})[blob.key] = blob.stored_bytes
    names = {SessionId(session_id)} if session_id else {*records, *stored, *(each.session_id for each in leases)}
    shares, by_id = split_bytes(leases), {lease.session_id: lease for lease in leases}
    findings = [
        await _verify_session(
            store,
            blobs,
            tenant,
            SessionFindings(
                name,
                has_record=name in records,
                has_lease=name in by_id,
                charged_bytes=shares.get(name, 0),
                own_frames=len(stored.get(name, {})),
            ),
            by_id.get(name),
        )
        for name in sorted(names)
    ]
    return TenantFindings(tuple(findings), await store.ledger.tenant_bytes(tenant))


async def _verify_session(
    store: StateStore, blobs: Blobs, tenant: TenantId, found: SessionFindings, lease: Lease | None
) -> SessionFindings:
    manifest = await store.ledger.get_manifest(tenant, found.session_id) if lease is not None else None
    if manifest is None:
        return found
    named = {key_of(manifest, home, frame): frame.stored_bytes for home, frame in manifest.named()}
    sizes = dict(zip(named, await blobs.sizes(list(named)), strict=True))
    there = [key for key, size in sizes.items() if size]
    return SessionFindings(
        session_id=found.session_id,
        has_record=found.has_record,
        has_lease=True,
        version=manifest.version,
        num_tokens=manifest.num_tokens,
        charged_bytes=found.charged_bytes,
        named_frames=len(named),
        missing_frames=len(named) - len(there),
        wrong_size_frames=sum(sizes[key] != named[key] for key in there),
        corrupt_frames=len(await blobs.corrupt(there)),
        own_frames=found.own_frames,
    )


async def _records(store: StateStore, tenant: TenantId, session_id: str) -> Sequence[SessionId]:
    if session_id:
        record = await store.get_session(SessionId(session_id))
        return [record.session_id] if record is not None and record.tenant == tenant else []
    found: list[SessionId] = []
    while page := await store.list_sessions(tenant, after=found[-1] if found else "", limit=RECORDS_A_PAGE):
        found += [record.session_id for record in page]
    return found
