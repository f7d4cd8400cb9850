"""What calls have used, written down once each, in a stream that is read in order. Knows nothing of gRPC.

    kvs:{usage}:records            stream: one entry a record                      trimmed by age
    kvs:{usage}:seen:<id>          the record of this id was written               PX

A record is written with the answer's last word to the caller, or before: whoever got an answer finds its record. A
second one of the same id is dropped, so that a gateway which was lost between writing the record and keeping the
answer, and the repeat that follows, make one record together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol
from urllib.parse import quote

from kvservice.errors import InternalError, InvalidRequest
from kvservice.store.round_trips import TIMEOUT_S, RoundTrips
from kvservice.types import TenantId, Usage

MAX_CONNECTIONS = 4
SEEN_S = 86_400.0
"""A record's id is remembered for so long: many times longer than an answer is kept for a repeat."""
KEPT_S = 35 * 86_400.0
"""Records are kept for so long: a month, and some days to fetch them in."""
MOST_IN_MEMORY = 100_000
"""Records that a gateway without a state Redis keeps."""

RECORDS = "kvs:{usage}:records"
START = "0-0"

# keys: records, seen; then how long to remember, least id that is kept, field names and values
APPEND = """
if not redis.call('SET', KEYS[2], '1', 'NX', 'PX', ARGV[1]) then return 0 end
redis.call('XADD', KEYS[1], 'MINID', '~', ARGV[2], '*', unpack(ARGV, 3))
return 1
"""


class UsageKind(Enum):
    """What a record is of."""

    CALL = "call"
    """An Append or a Generate that ended well."""
    CUT_SHORT = "cut_short"
    """One that didn't: what had been computed until then."""
    SESSION_END = "session_end"
    """A session was closed or has expired: what its KV took since its last call."""
    STORED = "stored"
    """A period of what a tenant had in the kv Redis, by the ledger."""


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One record.

    Attributes:
        record_id: unlike that of any other record of the tenant and kind: the request's id, where there is one.
        session_id: empty for a call without a session, and for a record of the whole tenant.
        ended_at: unix seconds.
        device_byte_s: bytes times seconds that KV took on devices.
        host_byte_s: in host memory.
        redis_byte_s: in the kv Redis.
    """

    kind: UsageKind
    tenant: TenantId
    record_id: str
    ended_at: float
    session_id: str = ""
    model: str = ""
    usage: Usage = field(default_factory=Usage)
    device_byte_s: float = 0.0
    host_byte_s: float = 0.0
    redis_byte_s: float = 0.0


class UsageLog(Protocol):
    """All records. Every method raises Unavailable when the store can't be reached."""

    async def append(self, record: UsageRecord) -> bool:
        """Writes a record down; False if there is one of its id."""
        ...

    async def read(self, after: str, limit: int) -> tuple[list[UsageRecord], str]:
        """The records after a cursor, oldest first, and the cursor behind them; an empty one is before all.

        Raises:
            InvalidRequest: the cursor isn't one.
        """
        ...

    async def aclose(self) -> None:
        """Closes connections. Nothing may be called after it."""
        ...


async def open_usage_log(url: str | None, clock: Callable[[], float]) -> UsageLog:
    """The log at a Redis URL; the one in memory if `url` is None. It connects when it is first used.

    `clock` gives unix seconds, the same in all gateways.

    Raises:
        ConfigError: the URL is malformed.
    """
    return MemoryUsageLog() if url is None else RedisUsageLog(url, clock=clock)


class MemoryUsageLog:
    """`UsageLog` in a list, for one gateway: of more than 100,000 records the oldest are dropped."""

    def __init__(self) -> None:
        self._records: list[UsageRecord] = []
        self._first = 1
        self._seen: set[str] = set()

    async def append(self, record: UsageRecord) -> bool:
        """See `UsageLog.append`."""
        if _name(record) in self._seen:
            return False
        self._seen.add(_name(record))
        self._records.append(record)
        if len(self._records) > MOST_IN_MEMORY:
            self._seen.discard(_name(self._records.pop(0)))
            self._first += 1
        return True

    async def read(self, after: str, limit: int) -> tuple[list[UsageRecord], str]:
        """See `UsageLog.read`."""
        start = max(self._first, int(_checked(after).split("-")[0]) + 1) - self._first
        records = self._records[start : start + limit]
        return records, f"{self._first + start + len(records) - 1}-0" if records else after or START

    async def aclose(self) -> None:
        """See `UsageLog.aclose`."""


class RedisUsageLog:
    """`UsageLog` in the state Redis. One round trip a method, each with a time limit; nothing is retried.

    Args:
        url: redis, rediss or unix URL.
        clock: unix seconds, by which old records are dropped.
        timeout_s: limit of one round trip, connecting included.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time, timeout_s: float = TIMEOUT_S) -> None:
        self._redis = RoundTrips(url, max_connections=MAX_CONNECTIONS, timeout_s=timeout_s)
        self._clock = clock

    async def append(self, record: UsageRecord) -> bool:
        """See `UsageLog.append`."""
        seen = f"kvs:{{usage}}:seen:{_name(record)}"
        oldest = f"{max(0, round((self._clock() - KEPT_S) * 1000))}"
        arguments = (round(SEEN_S * 1000), oldest, *_packed(record))
        (written,) = await self._redis.run(("EVAL", APPEND, 2, RECORDS, seen, *arguments))
        return bool(written)

    async def read(self, after: str, limit: int) -> tuple[list[UsageRecord], str]:
        """See `UsageLog.read`."""
        (found,) = await self._redis.run(("XRANGE", RECORDS, f"({_checked(after)}", "+", "COUNT", limit))
        entries = [(name.decode(), _fields(values)) for name, values in found]
        return [_unpacked(values) for _, values in entries], entries[-1][0] if entries else after or START

    async def aclose(self) -> None:
        """See `UsageLog.aclose`."""
        await self._redis.aclose()


def _name(record: UsageRecord) -> str:
    # Quoted, so that no tenant's name or request id makes another's.
    return ":".join(quote(part, safe="") for part in (record.tenant, record.kind.value, record.record_id))


def _checked(cursor: str) -> str:
    parts = (cursor or START).split("-")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) <= 19 for part in parts):
        raise InvalidRequest(f"after={cursor!r}: it must be a cursor that this call gave, or empty", field="after")
    return cursor or START


def _fields(values: Sequence[bytes] | dict[bytes, bytes]) -> dict[str, str]:
    pairs = values.items() if isinstance(values, dict) else zip(values[::2], values[1::2], strict=True)
    return {name.decode(): value.decode() for name, value in pairs}


def _packed(record: UsageRecord) -> list[str]:
    usage = record.usage
    values = {
        "kind": record.kind.value,
        "tenant": record.tenant,
        "record_id": record.record_id,
        "session_id": record.session_id,
        "model": record.model,
        "ended_at": repr(record.ended_at),
        "cached_tokens": str(usage.cached_tokens),
        "prompt_tokens": str(usage.prompt_tokens),
        "completion_tokens": str(usage.completion_tokens),
        "recomputed_tokens": str(usage.recomputed_tokens),
        "reused_tokens": str(usage.reused_tokens),
        "device_byte_s": repr(record.device_byte_s),
        "host_byte_s": repr(record.host_byte_s),
        "redis_byte_s": repr(record.redis_byte_s),
    }
    return [text for pair in values.items() for text in pair]


def _unpacked(values: dict[str, str]) -> UsageRecord:
    try:
        return UsageRecord(
            kind=UsageKind(values["kind"]),
            tenant=TenantId(values["tenant"]),
            record_id=values["record_id"],
            session_id=values["session_id"],
            model=values["model"],
            ended_at=float(values["ended_at"]),
            usage=Usage(
                cached_tokens=int(values["cached_tokens"]),
                prompt_tokens=int(values["prompt_tokens"]),
                completion_tokens=int(values["completion_tokens"]),
                recomputed_tokens=int(values["recomputed_tokens"]),
                reused_tokens=int(values["reused_tokens"]),
            ),
            device_byte_s=float(values["device_byte_s"]),
            host_byte_s=float(values["host_byte_s"]),
            redis_byte_s=float(values["redis_byte_s"]),
        )
    except (KeyError, ValueError) as error:
        message = f"a usage record in the state Redis is illegible: {error}"
        raise InternalError(message, reason="illegible_usage") from None
