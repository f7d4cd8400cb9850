"""The state store in Redis. Knows how its records lie there; nothing of the API or of KV.

    kvs:{session:<id>}:record     hash: the record, token ids as little-endian u32   dropped a day after it expired
    kvs:{session:<id>}:lock       owner                                              PX
    kvs:{tenant:<tenant>}:sessions   sorted set of ids, all of score 0: in the order of ids
    kvs:{expiry}:sessions         sorted set of ids by unix seconds; a hint: the record decides
    kvs:{request:<tenant>:<id>}:claim, :messages   hash and list                     PX
    kvs:{fleet}:epoch, :workers, :worker:<id>      counter, set, hash                the last with PX

and what `redis_ledger` says.

What must change together has one hash tag, so it stays together on a cluster. A session's record is written before
the sets that name it and deleted before them: a name without a record is a leftover, and dropped by who finds it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import numpy as np
from redis.exceptions import AuthenticationError

from kvservice.errors import ConfigError, InternalError
from kvservice.store.base import (
    Begun,
    InProgress,
    Replay,
    SessionRecord,
    WorkerRecord,
    request_id_reused,
    session_exists,
    session_gone,
    stale_epoch,
    too_many_sessions,
    version_moved,
)
from kvservice.store.clock import ServerClock
from kvservice.store.ledger import DEFAULT_QUOTA_BYTES
from kvservice.store.redis_ledger import RedisLedger
from kvservice.store.servers import ServerFacts, problems_of_state
from kvservice.tier.redis import FAULTS, connect, redacted, unavailable
from kvservice.types import OnMiss, PromptFormat, Reached, SessionId, TenantId, WorkerId

logger = logging.getLogger(__name__)

TIMEOUT_S = 5.0
MAX_CONNECTIONS = 32
RECORD_FORMAT = b"1"
TOKEN_BYTES = 4
KEPT_AFTER_EXPIRY_S = 86_400.0
"""Bounds what stays when nobody sweeps."""
LOOK_AGAIN_S = 10.0
"""When the sweeper meets an expired session again that a call still holds."""
PAGE = 64
"""Records read in one round trip."""

EXPIRY = "kvs:{expiry}:sessions"
FENCE = "kvs:{fleet}:fence"
EPOCH = "kvs:{fleet}:epoch"
WORKERS = "kvs:{fleet}:workers"

CREATE_SESSION = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
if ARGV[3] ~= '' and redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[3]) then return -1 end
redis.call('HSET', KEYS[1], unpack(ARGV, 4))
redis.call('PEXPIREAT', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], 0, ARGV[2])
return 1
"""
UPDATE_SESSION = """
local version = redis.call('HGET', KEYS[1], 'version')
if not version then return -1 end
if version ~= ARGV[2] then return tonumber(version) end
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
redis.call('PEXPIREAT', KEYS[1], ARGV[1])
return 0
"""
RENEW_SESSION = """
if redis.call('EXISTS', KEYS[2]) == 1 or redis.call('HGET', KEYS[1], 'version') ~= ARGV[1] then return 0 end
redis.call('HINCRBY', KEYS[1], 'version', 1)
redis.call('HSET', KEYS[1], 'expires_at', ARGV[2])
return redis.call('PEXPIREAT', KEYS[1], ARGV[3])
"""
DELETE_SESSION = """
local tenant = redis.call('HGET', KEYS[1], 'tenant')
if not tenant then return false end
if ARGV[1] ~= '' then
  if redis.call('HGET', KEYS[1], 'version') ~= ARGV[1] then return false end
  if redis.call('EXISTS', KEYS[2]) == 1 then return false end
end
redis.call('DEL', KEYS[1])
return tenant
"""
LOCK = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 1 end
return 0
"""
UNLOCK = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
BEGIN_REQUEST = """
local digest = redis.call('HGET', KEYS[1], 'digest')
if not digest then
  redis.call('DEL', KEYS[2])
  redis.call('HSET', KEYS[1], 'digest', ARGV[1], 'owner', ARGV[3])
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return {'begun', {}}
end
if digest ~= ARGV[1] then return {'reused', {}} end
local count = redis.call('HGET', KEYS[1], 'messages')
if not count then return {'in_progress', {}} end
local messages = redis.call('LRANGE', KEYS[2], 0, -1)
if #messages ~= tonumber(count) then return {'in_progress', {}} end
return {'replay', messages}
"""
RENEW_REQUEST = """
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] then return 0 end
if redis.call('HEXISTS', KEYS[1], 'messages') == 1 then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
FINISH_REQUEST = """
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'messages', #ARGV - 2)
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[2])
for i = 3, #ARGV do redis.call('RPUSH', KEYS[2], ARGV[i]) end
redis.call('PEXPIRE', KEYS[2], ARGV[1])
return 1
"""
FORGET_REQUEST = """
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1], KEYS[2])
"""
REGISTER_WORKER = """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch and tonumber(epoch) > tonumber(ARGV[2]) then return tonumber(epoch) end
redis.call('HSET', KEYS[1], 'epoch', ARGV[2], 'address', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('SADD', KEYS[2], ARGV[1])
return -1
"""
RENEW_WORKER = """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
UNREGISTER_WORKER = """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch and epoch ~= ARGV[2] then return 0 end
redis.call('SREM', KEYS[2], ARGV[1])
return redis.call('DEL', KEYS[1])
"""
DROP_LAPSED_WORKER = """
if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('SREM', KEYS[2], ARGV[1]) end
return 0
"""

Command = tuple[Any, ...]
# Asked in the same round trip as a record, so the answer is of the server that has the record.
DURABILITY: Command = ("CONFIG GET", "*append*")
FACTS: tuple[Command, ...] = (("INFO", "server"), ("INFO", "memory"), ("CONFIG GET", "maxmemory*"))
MAY_BE_REFUSED = frozenset(("CONFIG GET", "INFO", "WAIT"))
"""Managed servers don't let everybody ask."""
WAIT_MS = 100
"""What replicas get to say that they have a write."""
REPLICAS_OPTION = "wait_replicas"
"""Of a state URL: ours, not the library's."""


class RedisStateStore:
    """`StateStore` in one Redis. Every round trip has a time limit; nothing is retried.

    A record is durable once it is fsynced, on a server that does so with each write; or, with `?wait_replicas=N` in
    the URL, once N replicas have it: all that may be promoted.

    Args:
        url: redis, rediss, unix or redis+sentinel URL.
        clock: unix seconds; unset: those of the server, so that no process depends on its machine's clock.
        timeout_s: limit of one round trip, connecting included.
        default_quota_bytes: stored bytes of a tenant without a quota of its own.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], float] | None = None,
        timeout_s: float = TIMEOUT_S,
        default_quota_bytes: int = DEFAULT_QUOTA_BYTES,
    ) -> None:
        self.durable = False
        self._server_clock = ServerClock()
        self.clock = clock or self._server_clock
        self.ledger = RedisLedger(self._run, self.next_epoch, self.clock, default_quota_bytes)
        url, self._replicas = split_replicas(url)
        # The answer says whether what was written before it, on the same connection, is durable.
        self._durability: Command = ("WAIT", self._replicas, WAIT_MS) if self._replicas else DURABILITY
        self._redis = connect(url, timeout_s=timeout_s, max_connections=MAX_CONNECTIONS)
        self._where = redacted(url)
        self._timeout_s = timeout_s

    async def check(self) -> None:
        """Sees that the server is there, lets us in and is fit for its role, and whether its writes are durable.

        Raises:
            ConfigError: it refuses the password, is too old, or evicts.
            Unavailable: it can't be reached or isn't ready.
        """
        try:
            _, settings, *facts = await self._answers([("PING",), self._durability, *FACTS])
        except FAULTS as error:
            fault = unavailable(error, self._where, prefix="state_")
            if isinstance(error, AuthenticationError):
                raise ConfigError(fault.message, reason=fault.reason) from error
            raise fault from error
        self._note_durability(settings)
        if not self.durable:
            logger.warning("state_store_not_durable", extra={"where": self._where})
        for problem in problems_of_state(ServerFacts.of(*facts), self._where):
            if problem.fatal:
                raise ConfigError(problem.message, reason="state_server")
            logger.warning("state_server_unfit", extra={"why": problem.message})

    async def create_session(self, record: SessionRecord, at_most: int | None = None) -> SessionRecord:
        """See `StateStore.create_session`."""
        kept = replace(record, version=1)
        created, settings = await self._run(
            _script(
                CREATE_SESSION,
                [_record_key(kept.session_id), _tenant_key(kept.tenant)],
                [_dropped_at_ms(kept), kept.session_id, "" if at_most is None else at_most, *_packed(kept)],
            ),
            self._durability,
        )
        if created == 0:
            raise session_exists(record.session_id)
        if at_most is not None and created < 0:
            raise too_many_sessions(record.tenant, at_most)
        self._note_durability(settings)
        await self._run(("ZADD", EXPIRY, kept.expires_at, kept.session_id))
        return self._with_durability(kept)

    async def get_session(self, session_id: SessionId) -> SessionRecord | None:
        """See `StateStore.get_session`."""
        # What was written before a write that replicas have, by whomever, they have too.
        fence: tuple[Command, ...] = (("SET", FENCE, 1),) if self._replicas else ()
        fields, *_, settings = await self._run(("HGETALL", _record_key(session_id)), *fence, self._durability)
        self._note_durability(settings)
        if not fields:
            return None
        record = _unpacked(session_id, fields)
        return self._with_durability(record) if record.expires_at > self.clock() else None

    async def existing_sessions(self, session_ids: Sequence[SessionId]) -> set[SessionId]:
        """See `StateStore.existing_sessions`."""
        if not session_ids:
            return set()
        found = await self._run(*(("EXISTS", _record_key(session_id)) for session_id in session_ids))
        return {session_id for session_id, there in zip(session_ids, found, strict=True) if there}

    async def renew_session(self, record: SessionRecord, expires_at: float) -> SessionRecord:
        """See `StateStore.renew_session`."""
        kept = replace(record, expires_at=expires_at, version=record.version + 1)
        (renewed,) = await self._run(
            _script(
                RENEW_SESSION,
                [_record_key(record.session_id), _lock_key(record.session_id)],
                [record.version, expires_at, _dropped_at_ms(kept)],
            )
        )
        return kept if renewed else record

    async def update_session(self, record: SessionRecord) -> SessionRecord:
        """See `StateStore.update_session`."""
        # The set of expiries isn't written: `expired_sessions` puts a renewed session in its place when it comes up.
        kept = replace(record, version=record.version + 1)
        found, settings = await self._run(
            _script(
                UPDATE_SESSION,
                [_record_key(kept.session_id)],
                [_dropped_at_ms(kept), record.version, *_packed(kept)],
            ),
            self._durability,
        )
        if found == -1:
            raise session_gone(record.session_id)
        if found != 0:
            raise version_moved(record.session_id, record.version, found)
        self._note_durability(settings)
        return self._with_durability(kept)

    async def list_sessions(self, tenant: TenantId, *, after: str, limit: int) -> list[SessionRecord]:
        """See `StateStore.list_sessions`."""
        now = self.clock()
        index = _tenant_key(tenant)
        listed: list[SessionRecord] = []
        while len(listed) < limit:
            lowest = f"({after}" if after else "-"
            page = min(PAGE, limit - len(listed))
            (names,) = await self._run(("ZRANGEBYLEX", index, lowest, "+", "LIMIT", 0, page))
            if not names:
                break
            ids = [SessionId(name.decode()) for name in names]
            answers = await self._run(*(("HGETALL", _record_key(session_id)) for session_id in ids))
            found = list(zip(ids, answers, strict=True))
            gone = [session_id for session_id, fields in found if not fields]
            if gone:
                await self._run(("ZREM", index, *gone))
            listed += [record for record in self._legible(found) if record.expires_at > now]
            after = ids[-1]
        return listed

    async def delete_session(self, session_id: SessionId, *, version: int | None = None) -> bool:
        """See `StateStore.delete_session`."""
        (tenant,) = await self._run(
            _script(
                DELETE_SESSION,
                [_record_key(session_id), _lock_key(session_id)],
                ["" if version is None else version],
            )
        )
        if tenant is None:
            return False
        await self._run(("ZREM", _tenant_key(TenantId(tenant.decode())), session_id), ("ZREM", EXPIRY, session_id))
        return True

    async def expired_sessions(self, now: float, limit: int) -> list[SessionRecord]:
        """See `StateStore.expired_sessions`."""
        (names,) = await self._run(("ZRANGEBYSCORE", EXPIRY, "-inf", now, "LIMIT", 0, limit))
        if not names:
            return []
        ids = [SessionId(name.decode()) for name in names]
        answers = await self._run(*(("HGETALL", _record_key(session_id)) for session_id in ids))
        locked = await self._run(*(("EXISTS", _lock_key(session_id)) for session_id in ids))
        found = list(zip(ids, answers, strict=True))
        legible = {record.session_id: record for record in self._legible(found)}
        expired: list[SessionRecord] = []
        mending: list[Command] = []
        for session_id, is_locked in zip(ids, locked, strict=True):
            record = legible.get(session_id)
            if record is None:
                # Deleted, or illegible: then Redis drops the record itself in the end.
                mending.append(("ZREM", EXPIRY, session_id))
            elif record.expires_at > now:
                mending.append(("ZADD", EXPIRY, "XX", record.expires_at, session_id))
            elif is_locked:
                mending.append(("ZADD", EXPIRY, "XX", now + LOOK_AGAIN_S, session_id))
            else:
                expired.append(record)
        if mending:
            await self._run(*mending)
        return expired

    async def lock_session(self, session_id: SessionId, owner: str, ttl_s: float) -> bool:
        """See `StateStore.lock_session`."""
        (taken,) = await self._run(_script(LOCK, [_lock_key(session_id)], [owner, _ms(ttl_s)]))
        return bool(taken)

    async def unlock_session(self, session_id: SessionId, owner: str) -> None:
        """See `StateStore.unlock_session`."""
        await self._run(_script(UNLOCK, [_lock_key(session_id)], [owner]))

    async def begin_request(
        self, tenant: TenantId, request_id: str, digest: bytes, ttl_s: float, *, owner: str = ""
    ) -> Begun | InProgress | Replay:
        """See `StateStore.begin_request`."""
        ((state, messages),) = await self._run(
            _script(BEGIN_REQUEST, _request_keys(tenant, request_id), [digest, _ms(ttl_s), owner])
        )
        if state == b"reused":
            raise request_id_reused(request_id)
        if state == b"replay":
            return Replay(tuple(messages))
        return Begun() if state == b"begun" else InProgress()

    async def renew_request(self, tenant: TenantId, request_id: str, ttl_s: float, *, owner: str = "") -> bool:
        """See `StateStore.renew_request`."""
        (held,) = await self._run(_script(RENEW_REQUEST, _request_keys(tenant, request_id)[:1], [owner, _ms(ttl_s)]))
        return bool(held)

    async def finish_request(
        self, tenant: TenantId, request_id: str, messages: Sequence[bytes], ttl_s: float, *, owner: str = ""
    ) -> None:
        """See `StateStore.finish_request`."""
        await self._run(_script(FINISH_REQUEST, _request_keys(tenant, request_id), [_ms(ttl_s), owner, *messages]))

    async def forget_request(self, tenant: TenantId, request_id: str, *, owner: str = "") -> None:
        """See `StateStore.forget_request`."""
        await self._run(_script(FORGET_REQUEST, _request_keys(tenant, request_id), [owner]))

    async def next_epoch(self) -> int:
        """See `StateStore.next_epoch`."""
        (epoch,) = await self._run(("INCR", EPOCH))
        return int(epoch)

    async def register_worker(self, record: WorkerRecord, ttl_s: float) -> None:
        """See `StateStore.register_worker`."""
        (greater,) = await self._run(
            _script(
                REGISTER_WORKER,
                [_worker_key(record.worker_id), WORKERS],
                [record.worker_id, record.epoch, record.address, _ms(ttl_s)],
            )
        )
        if greater != -1:
            raise stale_epoch(record, greater)

    async def renew_worker(self, worker_id: WorkerId, epoch: int, ttl_s: float) -> bool:
        """See `StateStore.renew_worker`."""
        (renewed,) = await self._run(_script(RENEW_WORKER, [_worker_key(worker_id)], [epoch, _ms(ttl_s)]))
        return bool(renewed)

    async def list_workers(self) -> list[WorkerRecord]:
        """See `StateStore.list_workers`."""
        (names,) = await self._run(("SMEMBERS", WORKERS))
        ids = sorted(WorkerId(name.decode()) for name in names)
        if not ids:
            return []
        answers = await self._run(*(("HGETALL", _worker_key(worker_id)) for worker_id in ids))
        workers: list[WorkerRecord] = []
        lapsed: list[WorkerId] = []
        for worker_id, fields in zip(ids, answers, strict=True):
            if fields:
                workers.append(WorkerRecord(worker_id, fields[b"address"].decode(), int(fields[b"epoch"])))
            else:
                lapsed.append(worker_id)
        if lapsed:
            # By a script that looks again: the worker may have registered in the meantime.
            await self._run(*(_script(DROP_LAPSED_WORKER, [_worker_key(name), WORKERS], [name]) for name in lapsed))
        return workers

    async def unregister_worker(self, worker_id: WorkerId, epoch: int) -> None:
        """See `StateStore.unregister_worker`."""
        await self._run(_script(UNREGISTER_WORKER, [_worker_key(worker_id), WORKERS], [worker_id, epoch]))

    async def aclose(self) -> None:
        """See `StateStore.aclose`."""
        await self._redis.aclose()

    def _note_durability(self, settings: object) -> None:
        """Takes `durable` from the answer that tells it; a server that won't counts as not durable."""
        if self._replicas:
            self.durable = isinstance(settings, int) and settings >= self._replicas
            return
        wanted = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no"}
        self.durable = isinstance(settings, Mapping) and wanted.items() <= settings.items()

    def _with_durability(self, record: SessionRecord) -> SessionRecord:
        return replace(record, durable_tokens=len(record.token_ids) if self.durable else 0)

    def _legible(self, found: Sequence[tuple[SessionId, Mapping[bytes, bytes]]]) -> list[SessionRecord]:
        """The records among what was found; one that is damaged must not hide the others."""
        records = []
        for session_id, fields in found:
            if not fields:
                continue
            try:
                records.append(self._with_durability(_unpacked(session_id, fields)))
            except InternalError:
                logger.error("session_record_illegible", extra={"session_id": session_id})
        return records

    async def _run(self, *commands: Command) -> list[Any]:
        """The answers to `commands`, sent in one round trip; raises for the first that is an error."""
        try:
            return await self._answers(commands)
        except FAULTS as error:
            raise unavailable(error, self._where, prefix="state_") from error

    async def _answers(self, commands: Sequence[Command]) -> list[Any]:
        clock = self._server_clock
        asks_time, sent_at = clock.is_due, clock.steady()
        async with asyncio.timeout(self._timeout_s), self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            if asks_time:
                pipeline.execute_command("TIME")
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
        if asks_time:
            told = answers.pop()
            if isinstance(told, tuple):
                clock.note(told[0] + told[1] / 1e6, sent_at)
        for command, answer in zip(commands, answers, strict=True):
            if isinstance(answer, Exception) and command[0] not in MAY_BE_REFUSED:
                raise answer
        return answers


def split_replicas(url: str) -> tuple[str, int]:
    """A state URL without the number of replicas to wait for, and that number.

    Raises:
        ConfigError: it isn't a number.
    """
    address, mark, query = url.partition("?")
    options = query.split("&") if mark else []
    asked = [option.partition("=")[2] for option in options if option.partition("=")[0] == REPLICAS_OPTION]
    if not asked:
        return url, 0
    if len(asked) > 1 or not asked[0].isdigit():
        raise ConfigError(f"{REPLICAS_OPTION}={asked[-1]!r} in a state URL: give a number, once", reason="redis_url")
    rest = [option for option in options if option.partition("=")[0] != REPLICAS_OPTION]
    return address + (f"?{'&'.join(rest)}" if rest else ""), int(asked[0])


def _script(text: str, keys: Sequence[str], arguments: Sequence[str | bytes | int | float]) -> Command:
    """A command that runs a script; the server compiles it once. Its keys share a hash tag."""
    return ("EVAL", text, len(keys), *keys, *arguments)


def _record_key(session_id: str) -> str:
    return f"kvs:{{session:{_name(session_id)}}}:record"


def _lock_key(session_id: str) -> str:
    return f"kvs:{{session:{_name(session_id)}}}:lock"


def _tenant_key(tenant: str) -> str:
    return f"kvs:{{tenant:{_name(tenant)}}}:sessions"


def _request_keys(tenant: str, request_id: str) -> list[str]:
    tag = f"kvs:{{request:{_name(tenant)}:{_name(request_id)}}}"
    return [f"{tag}:claim", f"{tag}:messages"]


def _worker_key(worker_id: str) -> str:
    return f"kvs:{{fleet}}:worker:{_name(worker_id)}"


def _name(text: str) -> str:
    """`text` without any character that means something in a key: no caller can name another's key."""
    return quote(text, safe="")


def _ms(ttl_s: float) -> int:
    return max(1, round(ttl_s * 1000))


def _dropped_at_ms(record: SessionRecord) -> int:
    return round((record.expires_at + KEPT_AFTER_EXPIRY_S) * 1000)


def _packed(record: SessionRecord) -> list[str | bytes | int | float]:
    """Field names and values of a record's hash."""
    return [
        *("format", RECORD_FORMAT),
        *("tenant", record.tenant),
        *("model", record.model),
        *("recipe", record.recipe),
        *("prompt_format", record.prompt_format.value),
        *("on_miss", record.on_miss.value),
        *("ttl_s", record.ttl_s),
        *("created_at", record.created_at),
        *("expires_at", record.expires_at),
        *("num_tokens", len(record.token_ids)),
        *("tokens", np.asarray(record.token_ids, dtype="<u4").tobytes()),
        *("version", record.version),
        *("worker_id", record.worker_id),
        *("worker_epoch", record.worker_epoch),
        *("last_error", record.last_error),
        *("document_tokens", record.document_tokens),
        *("document_id", record.document_id),
        *("last_request", record.last_request),
        *("reached", _spans(record.reached)),
    ]


def _spans(reached: Reached) -> str:
    return " ".join(map(str, (reached.num_computed, *(bound for span in reached.selected for bound in span))))


def _reached(text: bytes) -> Reached:
    num_computed, *bounds = map(int, text.split())
    return Reached(num_computed, tuple(zip(bounds[::2], bounds[1::2], strict=True)))


def _unpacked(session_id: SessionId, fields: Mapping[bytes, bytes]) -> SessionRecord:
    """The inverse of `_packed`; what it reads it checks.

    Raises:
        InternalError: the hash isn't a record of this format.
    """
    try:
        if fields[b"format"] != RECORD_FORMAT:
            raise ValueError(f"format {fields[b'format']!r}, known is {RECORD_FORMAT!r}")
        tokens, num_tokens = fields[b"tokens"], int(fields[b"num_tokens"])
        if len(tokens) != num_tokens * TOKEN_BYTES:
            raise ValueError(f"{len(tokens)} bytes for {num_tokens} tokens")
        return SessionRecord(
            session_id=session_id,
            tenant=TenantId(fields[b"tenant"].decode()),
            model=fields[b"model"].decode(),
            recipe=fields[b"recipe"].decode(),
            prompt_format=PromptFormat(fields[b"prompt_format"].decode()),
            on_miss=OnMiss(fields[b"on_miss"].decode()),
            ttl_s=float(fields[b"ttl_s"]),
            created_at=float(fields[b"created_at"]),
            expires_at=float(fields[b"expires_at"]),
            token_ids=tuple(np.frombuffer(tokens, dtype="<u4").tolist()),
            version=int(fields[b"version"]),
            worker_id=fields[b"worker_id"].decode(),
            worker_epoch=int(fields[b"worker_epoch"]),
            last_error=fields[b"last_error"].decode(),
            # Records of before have none.
            document_tokens=int(fields.get(b"document_tokens", 0)),
            document_id=fields.get(b"document_id", b"").decode(),
            # Records of releases that didn't keep it have none.
            last_request=fields.get(b"last_request", b"").decode(),
            reached=_reached(fields.get(b"reached", b"0")),
        )
    except (KeyError, ValueError) as error:
        raise InternalError(
            f"record of session {session_id!r} is illegible: {error}; close the session and open a new one",
            reason="illegible_record",
        ) from error
