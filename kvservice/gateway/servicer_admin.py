"""AdminService: each RPC calls one named step. Only operators get here; the interceptor sees to that."""

from __future__ import annotations

import re
from collections.abc import Callable

from kvservice import __version__
from kvservice.errors import InvalidRequest
from kvservice.gateway import convert
from kvservice.gateway.admission import Admission
from kvservice.gateway.fleet import Fleet
from kvservice.gateway.interceptors import Context
from kvservice.gateway.quotas import Quotas
from kvservice.gateway.runs import Runs
from kvservice.store.ledger import KvLedger
from kvservice.types import TenantId, WorkerId
from kvservice.v1 import admin_pb2
from kvservice.v1.admin_pb2_grpc import AdminServiceServicer

SESSION_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class AdminServicer(AdminServiceServicer):
    """Drains, shows, limits and verifies. `begin_drain` returns at once; `tag` stands for a tenant in stored keys."""

    def __init__(
        self,
        fleet: Fleet,
        ledger: KvLedger,
        *,
        admission: Admission,
        runs: Runs,
        quotas: Quotas,
        tag: Callable[[TenantId], bytes],
        begin_drain: Callable[[float], None],
        grace_s: float,
    ) -> None:
        self._ledger = ledger
        self._tag = tag
        self._fleet = fleet
        self._admission = admission
        self._runs = runs
        self._quotas = quotas
        self._begin_drain = begin_drain
        self._grace_s = grace_s

    async def Drain(self, request: admin_pb2.DrainRequest, context: Context) -> admin_pb2.DrainResponse:  # noqa: ARG002, D102
        grace_s = self._grace_s
        if request.HasField("grace"):
            grace_s = convert.grace_s(request.grace)
        if request.worker_id:
            running = await self._fleet.drain(WorkerId(request.worker_id), grace_s)
        else:
            running = len(self._runs)
            self._begin_drain(grace_s)
        return admin_pb2.DrainResponse(running_calls=running)

    async def GetStats(self, request: admin_pb2.GetStatsRequest, context: Context) -> admin_pb2.GetStatsResponse:  # noqa: ARG002, D102
        return await self.report(request.tenant)

    async def report(self, tenant: str = "") -> admin_pb2.GetStatsResponse:
        """The service as this gateway sees it; of the tenants only one, with its stored bytes, if it is named."""
        workers = await self._fleet.stats()
        tenants = await self._quotas.report(tenant)
        if tenant:
            stored = await self._ledger.tenant_bytes(TenantId(tenant))
            tenants[0].stored_bytes = stored.stored_bytes + stored.reserved_bytes
            tenants[0].redis_bytes = stored.quota_bytes
        return admin_pb2.GetStatsResponse(
            workers=workers,
            sessions=sum(worker.resident_sessions for worker in workers),
            waiting_calls=self._admission.waiting,
            running_calls=len(self._runs),
            draining=self._runs.draining,
            version=__version__,
            tenants=tenants,
        )

    async def SetQuota(self, request: admin_pb2.SetQuotaRequest, context: Context) -> admin_pb2.SetQuotaResponse:  # noqa: ARG002, D102
        _check_tenant(request.tenant)
        await self._quotas.change(request)
        if request.HasField("redis_bytes"):
            await self._ledger.set_quota(TenantId(request.tenant), request.redis_bytes or None)
        return admin_pb2.SetQuotaResponse()

    async def ListUsage(self, request: admin_pb2.ListUsageRequest, context: Context) -> admin_pb2.ListUsageResponse:  # noqa: ARG002, D102
        return await self._quotas.metering.page(request)

    async def Verify(self, request: admin_pb2.VerifyRequest, context: Context) -> admin_pb2.VerifyResponse:  # noqa: ARG002, D102
        _check_tenant(request.tenant)
        if request.session_id and not SESSION_ID.fullmatch(request.session_id):
            raise InvalidRequest(
                f"session_id={request.session_id!r}: it must be 1 to 64 letters, digits, '_' or '-'", field="session_id"
            )
        tenant = TenantId(request.tenant)
        return await self._fleet.verify(tenant, self._tag(tenant), request.session_id)


def _check_tenant(tenant: str) -> None:
    if not tenant:
        raise InvalidRequest("tenant is empty: name the tenant", field="tenant")
