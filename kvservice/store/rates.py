"""What a tenant may use in a minute and at a time, counted over all gateways. Knows nothing of gRPC or of API keys.

    kvs:{rate:<tenant>}:limits     hash: the tenant's own limits
    kvs:{rate:<tenant>}:requests, :tokens   hash: a token bucket                       PX
    kvs:{rate:<tenant>}:calls      sorted set of running calls by the time they lapse  PX
    kvs:{rates}:tenants            set: tenants with limits of their own

A bucket holds at most what a minute allows and fills evenly. Requests are paid before they are carried out; tokens
after, when their number is known, so a bucket may owe: then nothing begins until it has filled again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from typing import Protocol
from urllib.parse import quote

from kvservice.store.round_trips import TIMEOUT_S, Command, RoundTrips
from kvservice.types import TenantId

MAX_CONNECTIONS = 8
MINUTE_S = 60.0
KEPT_S = 60.0
"""A full bucket is the same as none; it is dropped so long after it has filled."""

TENANTS = "kvs:{rates}:tenants"

# Numbers come as text: Redis cuts a Lua number to an integer.
DRAW = """
local rate, most = tonumber(ARGV[1]) / 60, math.max(tonumber(ARGV[1]), 1)
local now, needed, drawn = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local level = tonumber(redis.call('HGET', KEYS[1], 'level') or most)
local at = tonumber(redis.call('HGET', KEYS[1], 'at') or now)
if now > at then level, at = math.min(most, level + (now - at) * rate), now end
level = math.min(most, level)
if level < needed then return string.format('%.6f', (needed - level) / rate) end
level = level - drawn
redis.call('HSET', KEYS[1], 'level', string.format('%.6f', level), 'at', string.format('%.6f', at))
redis.call('PEXPIRE', KEYS[1], math.ceil(((most - level) / rate + tonumber(ARGV[5])) * 1000))
return '0'
"""
BEGIN_CALL = """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[2])
local held = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not held and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[4]) then return 0 end
redis.call('ZADD', KEYS[1], ARGV[3], ARGV[1])
redis.call('PEXPIREAT', KEYS[1], math.ceil(tonumber(ARGV[3]) * 1000))
return 1
"""


class Meter(Enum):
    """What is counted by the minute."""

    REQUESTS = "requests"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class Quota:
    """A tenant's limits, and its weight. None: no limit of its own."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    concurrent_calls: int | None = None
    document_tokens: int | None = None
    sessions: int | None = None
    device_bytes: int | None = None
    """On each worker."""
    host_bytes: int | None = None
    """On each worker."""
    weight: float | None = None
    """Share of the workers' time, against that of other tenants."""

    def per_minute(self, meter: Meter) -> float | None:
        """Of what `meter` counts."""
        return self.requests_per_minute if meter is Meter.REQUESTS else self.tokens_per_minute

    def over(self, defaults: Quota) -> Quota:
        """These limits, and `defaults` where there is none."""
        pairs = {field.name: getattr(self, field.name) for field in fields(self)}
        return Quota(**{name: getattr(defaults, name) if own is None else own for name, own in pairs.items()})


class RateStore(Protocol):
    """Limits and what has been used of them. Every method raises Unavailable when the store can't be reached."""

    async def quota(self, tenant: TenantId) -> Quota:
        """The tenant's own limits."""
        ...

    async def set_quota(self, tenant: TenantId, quota: Quota) -> None:
        """Replaces them."""
        ...

    async def tenants(self) -> list[TenantId]:
        """Tenants with limits of their own, in order."""
        ...

    async def draw(self, tenant: TenantId, meter: Meter, per_minute: float, *, needed: float, drawn: float) -> float:
        """Takes `drawn` from a bucket if it holds `needed`, and gives 0; else gives the seconds until it will."""
        ...

    async def charge(self, tenant: TenantId, meter: Meter, per_minute: float, drawn: float) -> None:
        """Takes `drawn` from a bucket, whatever it holds."""
        ...

    async def begin_call(self, tenant: TenantId, call_id: str, most: int, ttl_s: float) -> bool:
        """Counts a call as running for `ttl_s`, or for so long again; False if `most` others run."""
        ...

    async def end_call(self, tenant: TenantId, call_id: str) -> None:
        """It runs no more."""
        ...

    async def aclose(self) -> None:
        """Closes connections. Nothing may be called after it."""
        ...


async def open_rate_store(url: str | None, clock: Callable[[], float]) -> RateStore:
    """The store at a Redis URL; the one in memory if `url` is None. It connects when it is first used.

    `clock` gives unix seconds, the same in all gateways.

    Raises:
        ConfigError: the URL is malformed.
    """
    return MemoryRateStore(clock) if url is None else RedisRateStore(url, clock=clock)


class MemoryRateStore:
    """`RateStore` in dictionaries, for one gateway. No method suspends, so each is atomic. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._quotas: dict[TenantId, Quota] = {}
        self._buckets: dict[tuple[TenantId, Meter], tuple[float, float]] = {}
        self._calls: dict[TenantId, dict[str, float]] = {}

    async def quota(self, tenant: TenantId) -> Quota:
        """See `RateStore.quota`."""
        return self._quotas.get(tenant, Quota())

    async def set_quota(self, tenant: TenantId, quota: Quota) -> None:
        """See `RateStore.set_quota`."""
        self._quotas[tenant] = quota
        if quota == Quota():
            del self._quotas[tenant]

    async def tenants(self) -> list[TenantId]:
        """See `RateStore.tenants`."""
        return sorted(self._quotas)

    async def draw(self, tenant: TenantId, meter: Meter, per_minute: float, *, needed: float, drawn: float) -> float:
        """See `RateStore.draw`."""
        now, rate, most = self._clock(), per_minute / MINUTE_S, max(per_minute, 1.0)
        level, at = self._buckets.get((tenant, meter), (most, now))
        level = min(most, level + max(0.0, now - at) * rate)
        if level < needed:
            return (needed - level) / rate
        self._buckets[tenant, meter] = level - drawn, max(at, now)
        return 0.0

    async def charge(self, tenant: TenantId, meter: Meter, per_minute: float, drawn: float) -> None:
        """See `RateStore.charge`."""
        await self.draw(tenant, meter, per_minute, needed=float("-inf"), drawn=drawn)

    async def begin_call(self, tenant: TenantId, call_id: str, most: int, ttl_s: float) -> bool:
        """See `RateStore.begin_call`."""
        now = self._clock()
        calls = {name: lapses_at for name, lapses_at in self._calls.get(tenant, {}).items() if lapses_at > now}
        self._calls[tenant] = calls
        if call_id not in calls and len(calls) >= most:
            return False
        calls[call_id] = now + ttl_s
        return True

    async def end_call(self, tenant: TenantId, call_id: str) -> None:
        """See `RateStore.end_call`."""
        self._calls.get(tenant, {}).pop(call_id, None)

    async def aclose(self) -> None:
        """See `RateStore.aclose`."""


class RedisRateStore:
    """`RateStore` in the state Redis. One round trip a method, each with a time limit; nothing is retried.

    Args:
        url: redis, rediss or unix URL.
        clock: unix seconds; a gateway whose clock is behind sees buckets fill later by as much.
        timeout_s: limit of one round trip, connecting included.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time, timeout_s: float = TIMEOUT_S) -> None:
        self._redis = RoundTrips(url, max_connections=MAX_CONNECTIONS, timeout_s=timeout_s)
        self._clock = clock

    async def quota(self, tenant: TenantId) -> Quota:
        """See `RateStore.quota`."""
        (found,) = await self._redis.run(("HGETALL", _key(tenant, "limits")))
        return _unpacked(found)

    async def set_quota(self, tenant: TenantId, quota: Quota) -> None:
        """See `RateStore.set_quota`."""
        key, limits = _key(tenant, "limits"), _packed(quota)
        commands: list[Command] = [("DEL", key)]
        if limits:
            commands += [("HSET", key, *limits), ("SADD", TENANTS, tenant)]
        else:
            commands.append(("SREM", TENANTS, tenant))
        await self._redis.run(*commands)

    async def tenants(self) -> list[TenantId]:
        """See `RateStore.tenants`."""
        (names,) = await self._redis.run(("SMEMBERS", TENANTS))
        return sorted(TenantId(name.decode()) for name in names)

    async def draw(self, tenant: TenantId, meter: Meter, per_minute: float, *, needed: float, drawn: float) -> float:
        """See `RateStore.draw`."""
        arguments = (per_minute, self._clock(), needed, drawn, KEPT_S)
        (wait_s,) = await self._redis.run(("EVAL", DRAW, 1, _key(tenant, meter.value), *map(repr, arguments)))
        return float(wait_s)

    async def charge(self, tenant: TenantId, meter: Meter, per_minute: float, drawn: float) -> None:
        """See `RateStore.charge`."""
        # Less than any bucket can owe; Lua knows no infinity in text.
        await self.draw(tenant, meter, per_minute, needed=-1e15, drawn=drawn)

    async def begin_call(self, tenant: TenantId, call_id: str, most: int, ttl_s: float) -> bool:
        """See `RateStore.begin_call`."""
        now = self._clock()
        arguments = (call_id, repr(now), repr(now + ttl_s), most)
        (begun,) = await self._redis.run(("EVAL", BEGIN_CALL, 1, _key(tenant, "calls"), *arguments))
        return bool(begun)

    async def end_call(self, tenant: TenantId, call_id: str) -> None:
        """See `RateStore.end_call`."""
        await self._redis.run(("ZREM", _key(tenant, "calls"), call_id))

    async def aclose(self) -> None:
        """See `RateStore.aclose`."""
        await self._redis.aclose()


def _key(tenant: TenantId, what: str) -> str:
    # Quoted, so that no tenant's name makes another's key.
    return f"kvs:{{rate:{quote(tenant, safe='')}}}:{what}"


def _packed(quota: Quota) -> list[str]:
    values = {field.name: getattr(quota, field.name) for field in fields(quota)}
    return [text for name, value in values.items() if value is not None for text in (name, repr(value))]


def _unpacked(found: dict[bytes, bytes]) -> Quota:
    def number(name: str) -> float | None:
        text = found.get(name.encode())
        return None if text is None else float(text)

    def count(name: str) -> int | None:
        text = found.get(name.encode())
        return None if text is None else int(text)

    return Quota(
        requests_per_minute=number("requests_per_minute"),
        tokens_per_minute=number("tokens_per_minute"),
        concurrent_calls=count("concurrent_calls"),
        document_tokens=count("document_tokens"),
        sessions=count("sessions"),
        device_bytes=count("device_bytes"),
        host_bytes=count("host_bytes"),
        weight=number("weight"),
    )
