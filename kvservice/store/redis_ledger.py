"""The ledger of stored KV in Redis. Knows how it lies there; nothing of connections.

    kvs:{tenant:<tenant>}:quota          bytes; only if it isn't the default
    kvs:{tenant:<tenant>}:sum            bytes of reservations and homes
    kvs:{tenant:<tenant>}:leases         sorted set by unix milliseconds: r:<reservation>, s:<session>
    kvs:{tenant:<tenant>}:reserved       hash: reservation to bytes
    kvs:{tenant:<tenant>}:owners         hash: session to epoch:version:worker
    kvs:{tenant:<tenant>}:manifests      hash: session to manifest
    kvs:{tenant:<tenant>}:held           hash: session to JSON, home to bytes
    kvs:{tenant:<tenant>}:home:<home>    sorted set of sessions by bytes: the greatest is what the home is charged with
    kvs:{ledger}:tenants                 hash: tag to tenant; a hint

A tenant's keys have one hash tag, so that one script changes them together on a cluster too. Every script first takes
what has expired out of the sum. All keys but the quota are dropped a day after the last lease has expired.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from kvservice.errors import InternalError
from kvservice.store.ledger import (
    DEFAULT_QUOTA_BYTES,
    Held,
    Lease,
    Position,
    Settled,
    TenantBytes,
    home_gone,
    over_quota,
    publication_refused,
)
from kvservice.store.manifests import Manifest, pack_manifest, unpack_manifest
from kvservice.types import SessionId, TenantId, WorkerId

KEPT_AFTER_EXPIRY_MS = 86_400_000
SESSIONS_A_SCRIPT = 500
TENANTS = "kvs:{ledger}:tenants"
NAMES = ("quota", "sum", "leases", "reserved", "owners", "manifests", "held")

# Every script begins with this. Numbers stay whole: a double holds 2^53.
COMMON = """
local QUOTA, SUM, LEASES, RESERVED, OWNERS, MANIFESTS, HELD = unpack(KEYS)
local HOMES, now = ARGV[1], ARGV[2]
local function whole(n) return string.format('%.0f', n) end
local function add(n)
  if n ~= 0 and redis.call('INCRBY', SUM, whole(n)) == 0 then redis.call('DEL', SUM) end
end
local function charge(home)
  return tonumber(redis.call('ZREVRANGE', HOMES .. home, 0, 0, 'WITHSCORES')[2] or 0)
end
local function held(s) return cjson.decode(redis.call('HGET', HELD, s) or '{}') end
local function position(s)
  local owner = redis.call('HGET', OWNERS, s)
  if not owner then return 0, 0, '' end
  local epoch, version, worker = owner:match('^(%d+):(%d+):(.*)$')
  return tonumber(epoch), tonumber(version), worker
end
local function drop_reservation(r)
  add(-tonumber(redis.call('HGET', RESERVED, r) or 0))
  redis.call('HDEL', RESERVED, r)
  redis.call('ZREM', LEASES, 'r:' .. r)
end
local function drop_session(s)
  local freed = {}
  for home in pairs(held(s)) do
    local before = charge(home)
    redis.call('ZREM', HOMES .. home, s)
    add(charge(home) - before)
    if redis.call('EXISTS', HOMES .. home) == 0 then freed[#freed + 1] = home end
  end
  redis.call('HDEL', HELD, s)
  redis.call('HDEL', OWNERS, s)
  redis.call('HDEL', MANIFESTS, s)
  redis.call('ZREM', LEASES, 's:' .. s)
  return freed
end
local function drop_expired()
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', now)) do
    local name = member:sub(3)
    if member:sub(1, 2) == 'r:' then drop_reservation(name) else drop_session(name) end
  end
end
local function extend(member, till)
  local lasts = redis.call('ZSCORE', LEASES, member)
  if not lasts or tonumber(lasts) < tonumber(till) then redis.call('ZADD', LEASES, till, member) end
end
local function keep()
  local last = redis.call('ZREVRANGE', LEASES, 0, 0, 'WITHSCORES')[2]
  if not last then return end
  local till = whole(tonumber(last) + KEPT_MS)
  for i = 2, #KEYS do redis.call('PEXPIREAT', KEYS[i], till) end
  return till
end
local function keep_homes(s, till)
  for home in pairs(held(s)) do redis.call('PEXPIREAT', HOMES .. home, till) end
end
local function sum() return tonumber(redis.call('GET', SUM) or 0) end
local function quota(default) return tonumber(redis.call('GET', QUOTA) or default) end
drop_expired()
""".replace("KEPT_MS", str(KEPT_AFTER_EXPIRY_MS))
# id, bytes, until, default quota
RESERVE = """
local before = tonumber(redis.call('HGET', RESERVED, ARGV[3]) or 0)
local wanted, most = sum() + ARGV[4] - before, quota(ARGV[6])
if tonumber(ARGV[4]) > before and wanted > most then return {whole(wanted), whole(most)} end
drop_reservation(ARGV[3])
if tonumber(ARGV[4]) > 0 then
  add(tonumber(ARGV[4]))
  redis.call('HSET', RESERVED, ARGV[3], ARGV[4])
  redis.call('ZADD', LEASES, ARGV[5], 'r:' .. ARGV[3])
end
keep()
return {}
"""
# session, worker, candidate epoch, until
ACQUIRE = """
local epoch, version = position(ARGV[3])
epoch = math.max(epoch + 1, tonumber(ARGV[5]))
redis.call('HSET', OWNERS, ARGV[3], whole(epoch) .. ':' .. whole(version) .. ':' .. ARGV[4])
extend('s:' .. ARGV[3], ARGV[6])
keep_homes(ARGV[3], keep())
return {whole(epoch), whole(version)}
"""
# session, epoch, expected epoch, expected version, manifest, held, reservation, until, default quota
PUBLISH = """
local s, mine = ARGV[3], tonumber(ARGV[4])
local epoch, version, worker = position(s)
if mine < epoch or epoch ~= tonumber(ARGV[5]) or version ~= tonumber(ARGV[6]) then
  return {'refused', whole(epoch), whole(version)}
end
local new, old = cjson.decode(ARGV[8]), held(s)
for home in pairs(new) do
  if home ~= s and redis.call('EXISTS', HOMES .. home) == 0 then
    return {'home_gone', whole(epoch), whole(version), home}
  end
end
local homes, growth = {}, 0
for home in pairs(new) do homes[home] = true end
for home in pairs(old) do homes[home] = true end
for home in pairs(homes) do
  local top = redis.call('ZREVRANGE', HOMES .. home, 0, 1, 'WITHSCORES')
  local others = tonumber((top[1] == s and top[4] or top[1] ~= s and top[2]) or 0)
  growth = growth + math.max(others, new[home] or 0) - math.max(others, old[home] or 0)
end
local reserved = tonumber(redis.call('HGET', RESERVED, ARGV[9]) or 0)
local wanted, most = sum() - reserved + growth, quota(ARGV[11])
if growth > reserved and wanted > most then return {'quota', whole(wanted), whole(most)} end
drop_reservation(ARGV[9])
add(growth)
for home in pairs(old) do
  -- A closed session's home, left by the last that named it, stays with that one at no charge, and goes with it.
  if not new[home] and home ~= s and not redis.call('HGET', OWNERS, home) then
    if redis.call('ZCARD', HOMES .. home) == 1 then new[home] = 0 end
  end
  if not new[home] then redis.call('ZREM', HOMES .. home, s) end
end
for home, bytes in pairs(new) do redis.call('ZADD', HOMES .. home, whole(bytes), s) end
redis.call('HSET', HELD, s, cjson.encode(new))
redis.call('HSET', MANIFESTS, s, ARGV[7])
redis.call('HSET', OWNERS, s, ARGV[4] .. ':' .. whole(version + 1) .. ':' .. worker)
extend('s:' .. s, ARGV[10])
keep_homes(s, keep())
return {'published'}
"""
# session
MANIFEST = """
return redis.call('HGET', MANIFESTS, ARGV[3])
"""
# worker, until, then pairs of session and epoch
RENEW = """
local lost, renewed = {}, {}
for i = 5, #ARGV, 2 do
  local epoch, _, worker = position(ARGV[i])
  if worker ~= ARGV[3] or epoch ~= tonumber(ARGV[i + 1]) then
    lost[#lost + 1] = ARGV[i]
  else
    extend('s:' .. ARGV[i], ARGV[4])
    renewed[#renewed + 1] = ARGV[i]
  end
end
local till = keep()
for _, s in ipairs(renewed) do keep_homes(s, till) end
return lost
"""
# session
DELETE = """
local freed = drop_session(ARGV[3])
local is_there = false
for _, home in ipairs(freed) do is_there = is_there or home == ARGV[3] end
if not is_there and redis.call('EXISTS', HOMES .. ARGV[3]) == 0 then freed[#freed + 1] = ARGV[3] end
return {freed, redis.call('EXISTS', LEASES)}
"""
# default quota
TENANT_BYTES = """
local reserved = 0
for _, bytes in ipairs(redis.call('HVALS', RESERVED)) do reserved = reserved + bytes end
return {whole(sum()), whole(reserved), whole(quota(ARGV[3]))}
"""
LIST = """
local leases = {}
for _, each in ipairs(redis.call('HKEYS', OWNERS)) do
  leases[#leases + 1] = {each, redis.call('HGET', OWNERS, each), redis.call('ZSCORE', LEASES, 's:' .. each) or '0',
    redis.call('HGET', HELD, each) or '{}'}
end
return leases
"""
SETTLE = """
local kept, actual, seen = sum(), 0, {}
for _, bytes in ipairs(redis.call('HVALS', RESERVED)) do actual = actual + bytes end
for _, s in ipairs(redis.call('HKEYS', HELD)) do
  for home in pairs(held(s)) do
    if not seen[home] then actual = actual + charge(home) end
    seen[home] = true
  end
end
add(actual - kept)
keep()
return {whole(kept), whole(actual)}
"""

Run = Callable[..., Awaitable[list[Any]]]


class RedisLedger:
    """`KvLedger` in one Redis.

    Args:
        run: sends commands in one round trip and gives their answers; raises the service's own errors.
        next_epoch: a number greater than any it gave before.
        clock: unix seconds; the processes' clocks must agree to well within a lease.
        default_quota_bytes: of a tenant without a quota of its own.
    """

    def __init__(
        self,
        run: Run,
        next_epoch: Callable[[], Awaitable[int]],
        clock: Callable[[], float],
        default_quota_bytes: int = DEFAULT_QUOTA_BYTES,
    ) -> None:
        self._run = run
        self._next_epoch = next_epoch
        self._clock = clock
        self._default_quota_bytes = default_quota_bytes

    async def reserve_bytes(self, tenant: TenantId, reservation_id: str, num_bytes: int, ttl_s: float) -> None:
        """See `KvLedger.reserve_bytes`."""
        (refused,) = await self._run(
            self._script(RESERVE, tenant, reservation_id, num_bytes, self._until(ttl_s), self._default_quota_bytes)
        )
        if refused:
            raise over_quota(tenant, int(refused[0]), int(refused[1]))

    async def acquire_session(
        self, tenant: TenantId, session_id: SessionId, worker_id: WorkerId, ttl_s: float
    ) -> Position:
        """See `KvLedger.acquire_session`."""
        epoch = await self._next_epoch()
        (found,) = await self._run(
            self._script(ACQUIRE, tenant, session_id, worker_id, epoch, self._until(ttl_s)),
        )
        return Position(int(found[0]), int(found[1]))

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
        kept = replace(manifest, version=expected.version + 1)
        script = self._script(
            PUBLISH,
            manifest.tenant,
            manifest.session_id,
            manifest.epoch,
            expected.epoch,
            expected.version,
            pack_manifest(kept),
            json.dumps(bytes_by_home),
            reservation_id,
            self._until(ttl_s),
            self._default_quota_bytes,
        )
        # The hint first: a tenant that isn't in it is never scrubbed.
        _, (word, *facts) = await self._run(("HSET", TENANTS, manifest.tenant_tag, manifest.tenant), script)
        if word == b"published":
            return kept
        first, second = int(facts[0]), int(facts[1])
        if word == b"quota":
            raise over_quota(manifest.tenant, first, second)
        if word == b"home_gone":
            raise home_gone(manifest, facts[2].decode(), Position(first, second))
        raise publication_refused(manifest, expected, Position(first, second))

    async def get_manifest(self, tenant: TenantId, session_id: SessionId) -> Manifest | None:
        """See `KvLedger.get_manifest`."""
        (packed,) = await self._run(self._script(MANIFEST, tenant, session_id))
        return None if packed is None else unpack_manifest(packed)

    async def renew_leases(self, worker_id: WorkerId, held: Sequence[Held], ttl_s: float) -> list[Held]:
        """See `KvLedger.renew_leases`."""
        by_tenant: dict[TenantId, list[Held]] = {}
        for each in held:
            by_tenant.setdefault(each.tenant, []).append(each)
        parts = [
            part[start : start + SESSIONS_A_SCRIPT]
            for part in by_tenant.values()
            for start in range(0, len(part), SESSIONS_A_SCRIPT)
        ]
        if not parts:
            return []
        until = self._until(ttl_s)
        scripts = (
            self._script(
                RENEW, part[0].tenant, worker_id, until, *(field for h in part for field in (h.session_id, h.epoch))
            )
            for part in parts
        )
        lost: list[Held] = []
        for part, names in zip(parts, await self._run(*scripts), strict=True):
            gone = {name.decode() for name in names}
            lost += [each for each in part if each.session_id in gone]
        return lost

    async def delete_manifest(self, tenant: TenantId, session_id: SessionId) -> list[SessionId]:
        """See `KvLedger.delete_manifest`."""
        ((freed, has_leases),) = await self._run(self._script(DELETE, tenant, session_id))
        if not has_leases:
            # A publication between the two takes the hint with it, and the next one brings it back.
            tags = [tag for tag, name in (await self.list_tenants()).items() if name == tenant]
            if tags:
                await self._run(("HDEL", TENANTS, *tags))
        return sorted(SessionId(home.decode()) for home in freed)

    async def tenant_bytes(self, tenant: TenantId) -> TenantBytes:
        """See `KvLedger.tenant_bytes`."""
        ((total, reserved, most),) = await self._run(self._script(TENANT_BYTES, tenant, self._default_quota_bytes))
        return TenantBytes(int(total) - int(reserved), int(reserved), int(most))

    async def set_quota(self, tenant: TenantId, num_bytes: int | None) -> None:
        """See `KvLedger.set_quota`."""
        key = _keys(tenant)[0]
        await self._run(("DEL", key) if num_bytes is None else ("SET", key, num_bytes))

    async def list_leases(self, tenant: TenantId) -> list[Lease]:
        """See `KvLedger.list_leases`."""
        (found,) = await self._run(self._script(LIST, tenant))
        return sorted((_lease(fields) for fields in found), key=lambda lease: lease.session_id)

    async def list_tenants(self) -> dict[bytes, TenantId]:
        """See `KvLedger.list_tenants`."""
        (found,) = await self._run(("HGETALL", TENANTS))
        return {tag: TenantId(name.decode()) for tag, name in found.items()}

    async def settle(self, tenant: TenantId) -> Settled:
        """See `KvLedger.settle`."""
        ((kept, actual),) = await self._run(self._script(SETTLE, tenant))
        return Settled(int(kept), int(actual))

    def _until(self, ttl_s: float) -> int:
        return round((self._clock() + ttl_s) * 1000)

    def _script(self, text: str, tenant: TenantId, *arguments: str | bytes | int) -> tuple[Any, ...]:
        keys = _keys(tenant)
        return ("EVAL", COMMON + text, len(keys), *keys, f"{_prefix(tenant)}home:", self._until(0.0), *arguments)


def _prefix(tenant: TenantId) -> str:
    return f"kvs:{{tenant:{quote(tenant, safe='')}}}:"


def _keys(tenant: TenantId) -> list[str]:
    return [_prefix(tenant) + name for name in NAMES]


def _lease(fields: Sequence[bytes]) -> Lease:
    session_id, owner, until_ms, held = fields
    epoch, version, worker_id = owner.decode().split(":", 2)
    bytes_by_home = json.loads(held)
    if not isinstance(bytes_by_home, dict):
        raise InternalError(f"lease of session {session_id.decode()!r} is illegible", reason="illegible_lease")
    return Lease(
        SessionId(session_id.decode()),
        WorkerId(worker_id),
        Position(int(epoch), int(version)),
        float(until_ms) / 1000,
        {SessionId(home): int(num_bytes) for home, num_bytes in bytes_by_home.items()},
    )
