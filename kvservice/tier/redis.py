"""A tier in Redis, and how the service speaks to a Redis: time limits, no silent retries, faults by name.

Beside a session's frames there is one set of their keys, under the same hash tag, so that a session is deleted
without a look at every key of the server. The set may be evicted like any other key; then all keys are scanned.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from redis import Connection, ConnectionPool, SSLConnection
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry as SyncRetry
from redis.sentinel import Sentinel as SyncSentinel

from kvservice.errors import ConfigError, Unavailable
from kvservice.tier.answers import GARBLED, GarbledAnswerError, answers_to
from kvservice.tier.base import SOURCES, TIERS, Buffer, OpenSocket, TierUsage
from kvservice.tier.header import session_tag
from kvservice.types import SessionId

T = TypeVar("T")

TIMEOUT_S = 5.0
MAX_CONNECTIONS = 8
BATCH_BYTES = 8 << 20
"""The most bytes of values in one round trip (or one value): bounds memory, and how long the server is busy with us."""
BATCH_KEYS = 512
FAULTS = (RedisError, OSError)
"""What a Redis call may fail with; a time limit that has passed is an OSError."""

SENTINEL = "redis+sentinel"
CLUSTERS = ("redis+cluster", "rediss+cluster")
SENTINEL_PORT = 26379
SYNC: dict[str, Any] = {"retry": SyncRetry(NoBackoff(), 0), "protocol": 2, "driver_info": None}

_SENTENCES = {
    "timeout": "didn't answer in time",
    "connection": "can't be reached",
    "auth": "refused the password, or its user may not do this",
    "oom": "is out of memory: raise its maxmemory",
    "readonly": "is read-only: the URL must name the primary",
    "loading": "is still loading its data",
    "closed": "has been closed by this process",
    "garbled": "gave an answer that is none to its command: what comes from it isn't what it sent",
    "other": "refused a command",
}


def connect(url: str, *, timeout_s: float, max_connections: int) -> Redis:
    """A client of the Redis at `url` (redis, rediss, unix or redis+sentinel). It connects when it is first used.

    Nothing is retried, since a write whose answer was lost may have been made. A connection that broke while it was
    idle is made anew without a fault.

    Raises:
        ConfigError: the URL is malformed.
    """
    if urlsplit(url).scheme == SENTINEL:
        return _sentinel_client(url, timeout_s, max_connections)
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=max_connections,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            driver_info=None,
        )
    except ValueError as error:
        raise ConfigError(f"Redis URL {redacted(url)}: {error}", reason="redis_url") from error
    return Redis.from_pool(pool)


def _sentinel_client(url: str, timeout_s: float, max_connections: int) -> Redis:
    named = sentinel_url(url)
    limits: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        "driver_info": None,
    }
    sentinel = Sentinel(named.sentinels, sentinel_kwargs={**limits, **named.of_sentinels})  # type: ignore[no-untyped-call]
    settings = {"max_connections": max_connections, **limits, **named.of_redis}
    return cast(Redis, sentinel.master_for(named.name, _SentinelRedis, **settings))


class _SentinelRedis(Redis):
    """A client that closes its sentinels' connections with its own: the library leaves them open."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        assert isinstance(self.connection_pool, SentinelConnectionPool)
        for sentinel in self.connection_pool.sentinel_manager.sentinels:
            await sentinel.aclose()


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """What a redis+sentinel URL says: where to ask, for what, and how to log in there and here."""

    sentinels: list[tuple[str, int]]
    name: str
    of_redis: dict[str, Any]
    of_sentinels: dict[str, Any]


def sentinel_url(url: str) -> SentinelUrl:
    """The parts of `redis+sentinel://[user:password@]host[:port],host[:port]/name[?options]`.

    Options: `db`; `tls=true`, of servers and sentinels alike, and `ssl_...` as of rediss; `sentinel_username` and
    `sentinel_password`, where they need one.

    Raises:
        ConfigError: it is none.
    """
    try:
        parts = urlsplit(url)
        login, _, hosts = parts.netloc.rpartition("@")
        user, _, password = login.partition(":")
        sentinels = []
        for host in hosts.split(","):
            name, _, port = host.rpartition(":") if ":" in host else (host, "", str(SENTINEL_PORT))
            sentinels.append((name, int(port)))
        options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        of_sentinels = {
            key.removeprefix("sentinel_"): options.pop(key)
            for key in ("sentinel_username", "sentinel_password")
            if key in options
        }
        shared: dict[str, Any] = {key: options.pop(key) for key in list(options) if key.startswith("ssl_")}
        if options.pop("tls", "false") == "true":
            shared["ssl"] = True
        of_redis = {"db": int(options.pop("db", "0")), "username": unquote(user), "password": unquote(password)}
        if options or not parts.path.strip("/") or not all(host for host, _ in sentinels):
            raise ValueError(f"options {sorted(options)}" if options else "it needs hosts and a name")
    except ValueError as error:
        raise ConfigError(
            f"Redis URL {redacted(url)}: {error}; the form is redis+sentinel://host:port,host:port/name",
            reason="redis_url",
        ) from error
    kept = {key: value for key, value in of_redis.items() if value != ""}
    return SentinelUrl(sentinels, parts.path.strip("/"), {**kept, **shared}, {**of_sentinels, **shared})


def redacted(url: str) -> str:
    """The URL without user, password and options."""
    try:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    except ValueError:
        return "(malformed)"


def fault_reason(error: Exception) -> str:
    """One word for why a Redis call failed: a key of the table of sentences."""
    kinds: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
        ((RedisTimeoutError, TimeoutError), "timeout"),
        ((AuthenticationError, NoPermissionError), "auth"),
        (BusyLoadingError, "loading"),
        (OutOfMemoryError, "oom"),
        (ReadOnlyError, "readonly"),
        (GarbledAnswerError, "garbled"),
        ((RedisConnectionError, OSError), "connection"),
    )
    for kind, reason in kinds:
        if isinstance(error, kind):
            return reason
    if isinstance(error, ResponseError):
        # What a script's command failed with is in the text only.
        for word, reason in (("OOM", "oom"), ("READONLY", "readonly"), ("LOADING", "loading")):
            if re.search(rf"\b{word}\b", str(error)):
                return reason
    return "other"


def unavailable(error: Exception, where: str, prefix: str = "") -> Unavailable:
    """The fault as the service's own error, with reason `prefix` + `fault_reason`."""
    reason = fault_reason(error)
    return Unavailable(f"Redis at {where} {_SENTENCES[reason]}: {str(error) or reason}", reason=prefix + reason)


class Servers(Protocol):
    """One Redis, or several that share the keys among them. Every method raises one of FAULTS where it can't answer."""

    async def send(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers to commands in one round trip, errors among them. The second word of each is its one key, or
        the first of several with one hash tag."""
        ...

    async def ask_all(self, commands: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
        """The answers of each server."""
        ...

    async def scan(self, cursor: int, pattern: bytes | str, count: int) -> tuple[int, list[bytes]]:
        """The next cursor and some keys, as SCAN; of all servers."""
        ...

    async def aclose(self) -> None:
        """Closes connections."""
        ...


class OneServer:
    """`Servers` of one Redis."""

    def __init__(self, url: str, *, timeout_s: float, max_connections: int) -> None:
        self._redis = connect(url, timeout_s=timeout_s, max_connections=max_connections)

    async def send(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """See `Servers.send`; here commands may do without a key."""
        return await answers_to(self._redis, commands)

    async def ask_all(self, commands: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
        """See `Servers.ask_all`."""
        return [await self.send(commands)]

    async def scan(self, cursor: int, pattern: bytes | str, count: int) -> tuple[int, list[bytes]]:
        """See `Servers.scan`."""
        (answer,) = await self.send([("SCAN", cursor, "MATCH", pattern, "COUNT", count)])
        if isinstance(answer, Exception):
            raise answer
        return int(answer[0]), answer[1]

    async def aclose(self) -> None:
        """See `Servers.aclose`."""
        await self._redis.aclose()


@TIERS.register("redis", "rediss", "unix", SENTINEL)
class RedisTier:
    """`TierBackend` in one Redis, or in `servers`. Every round trip has a time limit.

    Args:
        url: redis, rediss or unix URL.
        timeout_s: limit of one round trip, connecting included.
        servers: what the URL names, where that isn't one Redis.
    """

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S, servers: Servers | None = None) -> None:
        self._servers = servers or OneServer(url, timeout_s=timeout_s, max_connections=MAX_CONNECTIONS)
        self._where = redacted(url)
        self._timeout_s = timeout_s
        self._closed = False

    async def put_many(self, items: Sequence[tuple[bytes, Buffer]], ttl_s: float) -> None:
        """See `TierBackend.put_many`."""
        ttl_ms = max(1, round(ttl_s * 1000))
        for batch in _batches([(item, len(item[1])) for item in items]):
            indexes: dict[bytes, list[bytes]] = {}
            for key, _ in batch:
                indexes.setdefault(index_key(key), []).append(key)
            commands: list[tuple[Any, ...]] = []
            # The index first: it may name frames that aren't there, and must not lack one that is.
            for index, keys in indexes.items():
                commands += [("SADD", index, *keys), ("PEXPIRE", index, ttl_ms)]
            commands += [("SET", key, memoryview(value), "PX", ttl_ms) for key, value in batch]
            await self._round_trip(commands)

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `TierBackend.get_many`."""
        found: dict[bytes, bytes | None] = {}
        lengths = [
            length
            for part in _parts(keys, BATCH_KEYS)
            for length in await self._round_trip([("STRLEN", key) for key in part])
        ]
        for batch in _batches([(key, length) for key, length in zip(keys, lengths, strict=True) if length]):
            values = await self._round_trip([("GET", key) for key in batch])
            found.update(zip(batch, values, strict=True))
        return [found.get(key) for key in keys]

    async def delete_session(self, tenant_tag: bytes, session_id: SessionId) -> int:
        """See `TierBackend.delete_session`."""
        tag = session_tag(tenant_tag, session_id)
        index = b"kv1i:" + tag
        (members,) = await self._round_trip([("SMEMBERS", index)])
        deleted = await self._unlink(list(members))
        await self._unlink([index])
        if not members or sum([each["evicted_keys"] for each in await self._asked("INFO", "stats")]):
            # There may be frames that no index names.
            async for keys in self._scan(b"kv1:" + tag + b":*"):
                deleted += await self._unlink(keys)
        return deleted

    async def usage(self) -> TierUsage:
        """See `TierBackend.usage`."""
        frames = frame_bytes = 0
        async for keys in self._scan(b"kv1:*"):
            lengths = await self._round_trip([("STRLEN", key) for key in keys])
            frames += sum(1 for length in lengths if length)
            frame_bytes += sum(lengths)
        memory = await self._asked("INFO", "memory")
        used, most = (sum(each[name] for each in memory) for name in ("used_memory", "maxmemory"))
        return TierUsage(frames, frame_bytes, used, most)

    async def aclose(self) -> None:
        """See `TierBackend.aclose`."""
        self._closed = True
        await self._servers.aclose()

    async def _unlink(self, keys: Sequence[bytes]) -> int:
        deleted = 0
        for part in _parts(keys, BATCH_KEYS):
            (count,) = await self._round_trip([("UNLINK", *part)])
            deleted += count
        return deleted

    async def _scan(self, pattern: bytes) -> AsyncIterator[list[bytes]]:
        """Yields lists of keys; those that are there from beginning to end come at least once."""
        cursor = 0
        while True:
            cursor, keys = await self._within(self._servers.scan(cursor, pattern, BATCH_KEYS))
            if keys:
                yield list(set(keys))
            if cursor == 0:
                return

    async def _asked(self, *command: str) -> list[Any]:
        """The answers of all servers."""
        return [self._checked(answers)[0] for answers in await self._within(self._servers.ask_all([command]))]

    async def _round_trip(self, commands: Iterable[tuple[Any, ...]]) -> list[Any]:
        """The answers to `commands`; raises for the first of them that is an error."""
        return self._checked(await self._within(self._servers.send(list(commands))))

    async def _within(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, within the time limit."""
        if self._closed:
            work.close()
            raise Unavailable(f"Redis at {self._where} {_SENTENCES['closed']}", reason="closed")
        try:
            async with asyncio.timeout(self._timeout_s):
                return await work
        except FAULTS as error:
            raise unavailable(error, self._where) from error

    def _checked(self, answers: list[Any]) -> list[Any]:
        for answer in answers:
            if isinstance(answer, Exception):
                raise unavailable(answer, self._where) from answer
        return answers


def index_key(key: bytes) -> bytes:
    """Key of the set that names all frames of the session of `key`."""
    return b"kv1i:" + key[key.index(b"{") : key.index(b"}") + 1]


def _parts(items: Sequence[Any], limit: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), limit):
        yield items[start : start + limit]


def _batches(items: Iterable[tuple[Any, int]]) -> Iterator[list[Any]]:
    """Splits (item, bytes) pairs into runs of at most BATCH_BYTES, or of one item."""
    batch: list[Any] = []
    batch_bytes = 0
    for item, num_bytes in items:
        if batch and batch_bytes + num_bytes > BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(item)
        batch_bytes += num_bytes
    if batch:
        yield batch


@SOURCES.register("redis", "rediss", "unix", SENTINEL)
class RedisValues:
    """`ValueSource` of one Redis. The library connects, secures and logs in; what then comes is read without it."""

    def __init__(self, url: str) -> None:
        self._where = redacted(url)
        self._sentinel = sentinel_url(url) if urlsplit(url).scheme == SENTINEL else None
        try:
            self._pool = None if self._sentinel else ConnectionPool.from_url(url, **SYNC)
        except ValueError as error:
            raise ConfigError(f"Redis URL {self._where}: {error}", reason="redis_url") from error

    def place_of(self, key: bytes) -> str:  # noqa: ARG002 -- part of the protocol
        """All are in one place."""
        return self._where

    def connect(self, place: str, timeout_s: float) -> OpenSocket:  # noqa: ARG002 -- part of the protocol
        """See `ValueSource.connect`. Sentinels are asked each time: the primary may be another one by now."""
        limits = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
        connection: AbstractConnection | None = None
        try:
            pool = self._pool or _pool_of_primary(self._sentinel, limits)
            connection = pool.connection_class(**{**pool.connection_kwargs, **limits})
            connection.connect()
        except (*FAULTS, *GARBLED) as error:
            if connection is not None:
                connection.disconnect()  # type: ignore[no-untyped-call]
            fault = GarbledAnswerError(repr(error)) if isinstance(error, GARBLED) else error
            raise unavailable(fault, self._where) from error
        # The one private name of the library that is used; tests fail if it goes.
        connected = connection._sock
        assert connected is not None
        return OpenSocket(connected, connection.disconnect)

    def refresh(self) -> None:
        """There is nothing to look up that `connect` doesn't."""


def _pool_of_primary(named: SentinelUrl | None, limits: dict[str, Any]) -> ConnectionPool:
    assert named is not None
    settings = {**SYNC, **limits, **named.of_sentinels}
    sentinel = SyncSentinel(named.sentinels, sentinel_kwargs=settings)  # type: ignore[no-untyped-call]
    host, port = sentinel.discover_master(named.name)  # type: ignore[no-untyped-call]
    of_redis = dict(named.of_redis)
    connection_class = SSLConnection if of_redis.pop("ssl", False) else Connection
    return ConnectionPool(connection_class, host=host, port=port, **SYNC, **of_redis)
