"""Writes down what calls, sessions and tenants have used. Knows nothing of how a call is carried out.

A record that can't be written waits here for the next one that can; as many as wait are lost with the process.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from kvservice.errors import KVServiceError
from kvservice.gateway.fleet import Freed
from kvservice.internal.convert import usage_to_proto
from kvservice.store.base import SessionRecord
from kvservice.store.ledger import KvLedger
from kvservice.store.usage import UsageKind, UsageLog, UsageRecord
from kvservice.v1 import admin_pb2

logger = logging.getLogger(__name__)

MOST_WAITING = 10_000
"""Records that wait for the store; of more the oldest are dropped, and the log says which."""

PAGE = 1000

_KINDS = {
    UsageKind.CALL: admin_pb2.USAGE_KIND_CALL,
    UsageKind.CUT_SHORT: admin_pb2.USAGE_KIND_CUT_SHORT,
    UsageKind.SESSION_END: admin_pb2.USAGE_KIND_SESSION_END,
    UsageKind.STORED: admin_pb2.USAGE_KIND_STORED,
}


class Metering:
    """Of one gateway. `clock` gives unix seconds."""

    def __init__(self, log: UsageLog, clock: Callable[[], float]) -> None:
        self._log = log
        self._waiting: deque[UsageRecord] = deque()
        self.now = clock
        self.lost_records = 0

    async def write(self, record: UsageRecord) -> None:
        """Writes a record down, after those that wait. What fails is tried again with the next one."""
        self._waiting.append(record)
        while len(self._waiting) > MOST_WAITING:
            lost = self._waiting.popleft()
            self.lost_records += 1
            logger.error(
                "usage_lost",
                extra={"tenant": lost.tenant, "record_id": lost.record_id, "tokens": _num_tokens(lost)},
            )
        while self._waiting:
            first = self._waiting.popleft()
            try:
                # To its end, even if the call that it is of is cancelled meanwhile.
                await asyncio.shield(self._log.append(first))
            except KVServiceError as error:
                self._waiting.appendleft(first)
                logger.warning("usage_not_written", extra={"why": error.message, "waiting": len(self._waiting)})
                return

    async def end_session(self, record: SessionRecord, freed: Freed) -> None:
        """A session's KV was let go for good: what it took since its last call is nobody's call's."""
        if freed.device_byte_s or freed.host_byte_s:
            await self.write(
                UsageRecord(
                    UsageKind.SESSION_END,
                    record.tenant,
                    record.session_id,
                    self.now(),
                    session_id=record.session_id,
                    model=record.model,
                    device_byte_s=freed.device_byte_s,
                    host_byte_s=freed.host_byte_s,
                )
            )

    async def sample_stored(self, ledger: KvLedger, period_s: float) -> None:
        """Writes down what every tenant has in the kv Redis, for a whole period.

        All gateways do so, and the first one's record of a period stands.
        """
        period = int(self.now() // period_s)
        for tenant in sorted(set((await ledger.list_tenants()).values())):
            stored = (await ledger.tenant_bytes(tenant)).stored_bytes
            if stored:
                name = f"{period}/{period_s:g}"
                await self.write(
                    UsageRecord(UsageKind.STORED, tenant, name, self.now(), redis_byte_s=stored * period_s)
                )

    async def page(self, request: admin_pb2.ListUsageRequest) -> admin_pb2.ListUsageResponse:
        """Records after a cursor."""
        limit = min(request.page_size or PAGE, PAGE)
        records, cursor = await self._log.read(request.after, limit)
        return admin_pb2.ListUsageResponse(records=[_record_to_proto(record) for record in records], cursor=cursor)


def _num_tokens(record: UsageRecord) -> int:
    return record.usage.prompt_tokens + record.usage.completion_tokens


def _record_to_proto(record: UsageRecord) -> admin_pb2.UsageRecord:
    return admin_pb2.UsageRecord(
        kind=_KINDS[record.kind],
        tenant=record.tenant,
        record_id=record.record_id,
        session_id=record.session_id,
        model=record.model,
        ended_at=record.ended_at,
        usage=usage_to_proto(record.usage),
        device_byte_s=record.device_byte_s,
        host_byte_s=record.host_byte_s,
        redis_byte_s=record.redis_byte_s,
    )
