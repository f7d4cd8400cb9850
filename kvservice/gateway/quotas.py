"""What tenants may use, and what they have used. Knows nothing of how a call is carried out.

Limits are read from the store at most once a second for each tenant, so a change takes so long to hold everywhere; a
tenant without limits costs no round trip.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields, replace

from kvservice.config.gateway import QuotaConfig
from kvservice.errors import QUOTA_KEY, InvalidRequest, KVServiceError, LimitExceeded, QuotaExceeded
from kvservice.gateway.dispatch import Outcome
from kvservice.gateway.metering import Metering
from kvservice.internal.fair import DEFAULT_WEIGHT
from kvservice.internal.v1 import worker_pb2
from kvservice.store.rates import Meter, Quota, RateStore
from kvservice.store.tasks import end_tasks
from kvservice.store.usage import UsageKind, UsageRecord
from kvservice.telemetry.metrics import GatewayMetrics
from kvservice.types import TenantId, Usage
from kvservice.v1 import admin_pb2, common_pb2

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0
SLOT_TTL_S = 60.0
"""A gateway that was lost gives its tenants' calls free after so long."""
BUSY_RETRY_AFTER_S = 1.0
"""When a running call may have ended: a guess."""
MOST_TENANTS = 10_000
"""Tenants whose counts are kept; of more, those that called last."""


@dataclass(slots=True)
class Tally:
    """One tenant's use of this gateway since it started."""

    requests: int = 0
    refused: int = 0
    tokens: int = 0
    running_calls: int = 0
    quota: Quota = field(default_factory=Quota)
    looked_at: float = float("-inf")


class Account:
    """What one call has used."""

    def __init__(self, tenant: TenantId, quota: Quota, metrics: GatewayMetrics) -> None:
        self._tenant = tenant
        self._quota = quota
        self._metrics = metrics
        self.read_tokens = 0
        self.answered_tokens = 0
        """What has been computed until now: it is charged when the call ends, however it ends."""
        self._usage: Usage | None = None
        self._outcome: Outcome | None = None

    @property
    def num_tokens(self) -> int:
        """Computed until now."""
        return self.read_tokens + self.answered_tokens

    def carried_out(self, outcome: Outcome) -> None:
        """A worker has ended the call."""
        self._outcome = outcome

    def record(self, request_id: str, session_id: str, now: float) -> UsageRecord | None:
        """What is written down of the call; None if nothing was done for it."""
        done = self._outcome.done if self._outcome is not None else worker_pb2.Done()
        ended_well = self._usage is not None
        if not ended_well and not self.num_tokens:
            return None
        return UsageRecord(
            UsageKind.CALL if ended_well else UsageKind.CUT_SHORT,
            self._tenant,
            # A request that failed may be made again, and ends well once.
            request_id if ended_well and request_id else secrets.token_hex(16),
            now,
            session_id=session_id,
            model=self._outcome.worker.model.name if self._outcome is not None else "",
            usage=self._usage or Usage(prompt_tokens=self.read_tokens, completion_tokens=self.answered_tokens),
            device_byte_s=done.device_byte_s,
            host_byte_s=done.host_byte_s,
        )

    def check_document(self, num_tokens: int) -> None:
        """Refuses a document that is longer than the tenant's may be.

        Raises:
            LimitExceeded: it is.
        """
        most = self._quota.document_tokens
        if most is not None and num_tokens > most:
            self._metrics.note_quota_refusal(self._tenant, "document_tokens")
            raise LimitExceeded(
                f"the document has {num_tokens} tokens: this tenant's may have {most}, split it into several",
                reason="document_quota",
                metadata={QUOTA_KEY: "document_tokens"},
            )

    def put_terms(self, submit: worker_pb2.Submit) -> None:
        """Tells the worker what the tenant gets of it."""
        submit.weight = self._quota.weight or DEFAULT_WEIGHT
        if self._quota.device_bytes is not None:
            submit.tenant_device_bytes = self._quota.device_bytes
        if self._quota.host_bytes is not None:
            submit.tenant_host_bytes = self._quota.host_bytes

    def finished(self, usage: common_pb2.Usage, timings: common_pb2.Timings) -> None:
        """The call ended well: its usage is what is charged."""
        self.read_tokens, self.answered_tokens = usage.prompt_tokens, usage.completion_tokens
        self._usage = counted = Usage(
            cached_tokens=usage.cached_tokens,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            recomputed_tokens=usage.recomputed_tokens,
            reused_tokens=usage.reused_tokens,
        )
        self._metrics.note_call(self._tenant, counted, timings.queue_ms, timings.ttft_ms)


class Quotas:
    """Counts calls and tokens of each tenant, and refuses what is too much."""

    def __init__(
        self,
        rates: RateStore,
        defaults: QuotaConfig,
        metrics: GatewayMetrics,
        metering: Metering,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metering = metering
        self._rates = rates
        self._defaults = Quota(**defaults.model_dump())
        self._metrics = metrics
        self._clock = clock
        self._tallies: OrderedDict[TenantId, Tally] = OrderedDict()
        self.failed_charges = 0

    async def count_request(self, tenant: TenantId) -> None:
        """Takes a call of any kind off the tenant's minute.

        Raises:
            QuotaExceeded: it has made as many as it may.
        """
        self._tally(tenant).requests += 1
        quota = await self._quota(tenant)
        if quota.requests_per_minute is not None:
            await self._draw(tenant, Meter.REQUESTS, quota.requests_per_minute, drawn=1.0)

    @asynccontextmanager
    async def call(self, tenant: TenantId, request_id: str = "", session_id: str = "") -> AsyncIterator[Account]:
        """The time of an Append or a Generate; what it has used is charged, and written down, at its end.

        Raises:
            QuotaExceeded: as many of the tenant's calls run as may, or it has no tokens left.
        """
        quota = await self._quota(tenant)
        if quota.tokens_per_minute is not None:
            # Paid at the end: now there must only be something left.
            await self._draw(tenant, Meter.TOKENS, quota.tokens_per_minute, drawn=0.0)
        account = Account(tenant, quota, self._metrics)
        tally = self._tally(tenant)
        async with self._slot(tenant, quota.concurrent_calls):
            tally.running_calls += 1
            try:
                yield account
            except QuotaExceeded as error:
                # A worker's refusal: the tenant's sessions hold as many bytes there as they may.
                tally.refused += 1
                self._metrics.note_quota_refusal(tenant, error.metadata.get(QUOTA_KEY, ""))
                raise
            finally:
                tally.running_calls -= 1
                tally.tokens += account.num_tokens
                if quota.tokens_per_minute is not None and account.num_tokens:
                    await self._charge(tenant, quota.tokens_per_minute, account.num_tokens)
                if (record := account.record(request_id, session_id, self.metering.now())) is not None:
                    await self.metering.write(record)

    async def most_sessions(self, tenant: TenantId) -> int | None:
        """The most open sessions of a tenant; None: as many as the service allows."""
        return (await self._quota(tenant)).sessions

    def refuse_session(self, tenant: TenantId, most: int) -> LimitExceeded:
        """The error of one session too many, counted."""
        self._tally(tenant).refused += 1
        self._metrics.note_quota_refusal(tenant, "sessions")
        return LimitExceeded(
            f"tenant {tenant!r} has {most} open sessions, as many as are allowed: close some",
            reason="too_many_sessions",
            metadata={QUOTA_KEY: "sessions"},
        )

    async def change(self, request: admin_pb2.SetQuotaRequest) -> None:
        """Sets the limits that the request names.

        Raises:
            InvalidRequest: no tenant, or a limit below 0.
        """
        if not request.tenant:
            raise InvalidRequest("tenant is empty: name one", field="tenant")
        tenant = TenantId(request.tenant)
        quota = await self._rates.quota(tenant)
        names = {each.name for each in fields(Quota)}
        for name, value in ((each.name, value) for each, value in request.ListFields()):
            if name in names:
                if not 0 <= value < float("inf"):
                    raise InvalidRequest(f"{name}={value}: it must be a number of at least 0", field=name)
                quota = replace(quota, **{name: value or None})
        await self._rates.set_quota(tenant, quota)
        self._tally(tenant).looked_at = float("-inf")

    async def report(self, tenant: str = "") -> list[admin_pb2.TenantStats]:
        """Tenants with limits of their own, and those that have called, in the order of their names; or one alone."""
        tenants = [TenantId(tenant)] if tenant else sorted({*await self._rates.tenants(), *self._tallies})
        stats = []
        for name in tenants:
            quota = await self._quota(name)
            tally = self._tally(name)
            stats.append(
                admin_pb2.TenantStats(
                    tenant=name,
                    requests=tally.requests,
                    refused=tally.refused,
                    tokens=tally.tokens,
                    running_calls=tally.running_calls,
                    requests_per_minute=quota.requests_per_minute,
                    tokens_per_minute=quota.tokens_per_minute,
                    concurrent_calls=quota.concurrent_calls,
                    document_tokens=quota.document_tokens,
                    sessions=quota.sessions,
                    device_bytes=quota.device_bytes,
                    host_bytes=quota.host_bytes,
                    weight=quota.weight or DEFAULT_WEIGHT,
                )
            )
        return stats

    def _tally(self, tenant: TenantId) -> Tally:
        tally = self._tallies.setdefault(tenant, Tally())
        self._tallies.move_to_end(tenant)
        while len(self._tallies) > MOST_TENANTS:
            self._tallies.popitem(last=False)
        return tally

    async def _quota(self, tenant: TenantId) -> Quota:
        tally = self._tally(tenant)
        now = self._clock()
        if now - tally.looked_at >= LOOK_INTERVAL_S:
            tally.quota = (await self._rates.quota(tenant)).over(self._defaults)
            tally.looked_at = now
        return tally.quota

    async def _draw(self, tenant: TenantId, meter: Meter, per_minute: float, *, drawn: float) -> None:
        wait_s = await self._rates.draw(tenant, meter, per_minute, needed=1.0, drawn=drawn)
        if wait_s > 0:
            raise self._refusal(
                tenant,
                f"{meter.value}_per_minute",
                f"this tenant may use {per_minute:g} {meter.value} a minute, and has: try again in {wait_s:.3g} s",
                wait_s,
            )

    async def _charge(self, tenant: TenantId, per_minute: float, num_tokens: int) -> None:
        try:
            await self._rates.charge(tenant, Meter.TOKENS, per_minute, num_tokens)
        except KVServiceError as error:
            # The answer is there; it isn't taken back because its price couldn't be noted.
            self.failed_charges += 1
            logger.error("tokens_not_charged", extra={"why": error.message, "failed_charges": self.failed_charges})

    @asynccontextmanager
    async def _slot(self, tenant: TenantId, most: int | None) -> AsyncIterator[None]:
        """Holds one of the tenant's running calls."""
        if most is None:
            yield
            return
        call_id = secrets.token_hex(8)
        if not await self._rates.begin_call(tenant, call_id, most, SLOT_TTL_S):
            raise self._refusal(
                tenant,
                "concurrent_calls",
                f"{most} calls of this tenant are running, as many as may: try again when one has ended",
                BUSY_RETRY_AFTER_S,
            )
        renewal = asyncio.create_task(self._renew(tenant, call_id, most))
        try:
            yield
        finally:
            await end_tasks([renewal])
            try:
                await self._rates.end_call(tenant, call_id)
            except KVServiceError as error:
                logger.warning("call_not_ended", extra={"why": error.message, "lapses_in_s": SLOT_TTL_S})

    async def _renew(self, tenant: TenantId, call_id: str, most: int) -> None:
        while True:
            await asyncio.sleep(SLOT_TTL_S / 3)
            try:
                await self._rates.begin_call(tenant, call_id, most, SLOT_TTL_S)
            except KVServiceError as error:
                logger.warning("call_not_renewed", extra={"why": error.message})

    def _refusal(self, tenant: TenantId, quota: str, message: str, retry_after_s: float) -> QuotaExceeded:
        self._tally(tenant).refused += 1
        self._metrics.note_quota_refusal(tenant, quota)
        return QuotaExceeded(message, retry_after_s=retry_after_s, metadata={QUOTA_KEY: quota})
