"""A tier in a Redis Cluster: which of its servers has a key, and how that is found out again when it changes.

Everything that is asked for names one key, whose hash tag gives its slot; the cluster's map of slots gives the server.
All else, time limits and faults by name, is as with one Redis. The kv role alone may be a cluster.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from socket import socket as Socket
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from redis import ConnectionPool
from redis.asyncio import Redis
from redis.connection import AbstractConnection
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, TryAgainError

from kvservice.errors import ConfigError
from kvservice.tier.answers import GARBLED, GarbledAnswerError, answers_to
from kvservice.tier.base import SOURCES, TIERS, OpenSocket
from kvservice.tier.redis import CLUSTERS, FAULTS, SYNC, TIMEOUT_S, RedisTier, connect, redacted, unavailable

NUM_SLOTS = 16384
MAX_CONNECTIONS = 4
"""To each server."""
ASK_SLOTS = ("CLUSTER", "SLOTS")


@dataclass(frozen=True, slots=True)
class SlotMap:
    """Which server has which slot.

    Attributes:
        places: `host:port` of the primaries, in order.
        owners: the place of each slot; empty: nobody's.
    """

    places: tuple[str, ...]
    owners: tuple[str, ...]

    @classmethod
    def of(cls, answer: Sequence[Any], asked: str) -> SlotMap:
        """From the answer to CLUSTER SLOTS of the server at `asked`.

        Raises:
            ClusterDownError: nobody has any slot.
            GarbledAnswerError: it is no such answer.
        """
        if answer == []:
            raise ClusterDownError("CLUSTERDOWN its slots are nobody's")
        owners = [""] * NUM_SLOTS
        try:
            for start, stop, primary, *_replicas in answer:
                if not 0 <= start <= stop < NUM_SLOTS:
                    raise ValueError(f"slots {start} to {stop}")
                host, port = primary[0], int(primary[1])
                name = host.decode() if isinstance(host, bytes) else host
                # A server that doesn't know its own name leaves it out.
                place = f"{name or asked.rpartition(':')[0]}:{port}"
                owners[start : stop + 1] = [place] * (stop + 1 - start)
        except GARBLED as error:
            raise GarbledAnswerError(f"no map of slots: {error!r}"[:200]) from error
        return cls(tuple(sorted(set(owners) - {""})), tuple(owners))

    def place_of(self, key: bytes) -> str:
        """The server of a key.

        Raises:
            ClusterDownError: nobody has its slot.
        """
        place = self.owners[key_slot(key)]
        if not place:
            raise ClusterDownError("CLUSTERDOWN a key's slot is nobody's")
        return place


@dataclass(frozen=True, slots=True)
class ClusterUrl:
    """`redis+cluster://[user:password@]host:port[,host:port][?options]`; with TLS it begins with `rediss`."""

    scheme: str
    login: str
    seeds: tuple[str, ...]
    query: str

    @classmethod
    def of(cls, url: str) -> ClusterUrl:
        """The parts of a URL.

        Raises:
            ConfigError: it is none.
        """
        parts = urlsplit(url)
        login, at, hosts = parts.netloc.rpartition("@")
        seeds = tuple(host if ":" in host else f"{host}:6379" for host in hosts.split(","))
        if not hosts or parts.path.strip("/") not in ("", "0") or not all(seed.split(":")[0] for seed in seeds):
            raise ConfigError(
                f"Redis URL {redacted(url)}: the form is redis+cluster://host:port,host:port, without a database",
                reason="redis_url",
            )
        return cls(parts.scheme.partition("+")[0], login + at, seeds, parts.query)

    def at(self, place: str) -> str:
        """The URL of one server."""
        return urlunsplit((self.scheme, self.login + place, "/0", self.query, ""))


class ClusterServers:
    """`Servers` of a cluster: a client for each, made when it is first needed."""

    def __init__(self, url: str, *, timeout_s: float, max_connections: int = MAX_CONNECTIONS) -> None:
        self._url = ClusterUrl.of(url)
        self._timeout_s = timeout_s
        self._max_connections = max_connections
        # Made now, so that a malformed URL is found out.
        self._clients = {self._url.seeds[0]: self._connect(self._url.seeds[0])}
        self._map: SlotMap | None = None
        self._asking = asyncio.Lock()

    async def send(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """See `Servers.send`."""
        answers: list[Any] = [None] * len(commands)
        left = list(range(len(commands)))
        for _ in range(2):
            await self._send(commands, left, answers)
            left = [index for index in left if _has_moved(answers[index])]
            if not left:
                break
            self._map = None
        for index, answer in enumerate(answers):
            if isinstance(answer, AskError) and not isinstance(answer, MovedError):
                # Its slot is on its way to another server, and the key is there already.
                place = f"{answer.host}:{answer.port}"
                _, answers[index] = await self._pipeline(place, [("ASKING",), commands[index]])
        return answers

    async def ask_all(self, commands: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
        """See `Servers.ask_all`."""
        places = (await self._slots()).places
        return list(await asyncio.gather(*(self._pipeline(place, commands) for place in places)))

    async def scan(self, cursor: int, pattern: bytes | str, count: int) -> tuple[int, list[bytes]]:
        """See `Servers.scan`. One server after another: a cursor says where, and which is the server's turn."""
        places = (await self._slots()).places
        theirs, turn = divmod(cursor, len(places))
        (answer,) = await self._pipeline(places[turn], [("SCAN", theirs, "MATCH", pattern, "COUNT", count)])
        if isinstance(answer, Exception):
            raise answer
        following, keys = int(answer[0]), answer[1]
        if following:
            return following * len(places) + turn, keys
        return (turn + 1) % len(places), keys

    async def aclose(self) -> None:
        """See `Servers.aclose`."""
        for client in self._clients.values():
            await client.aclose()

    async def _send(self, commands: Sequence[tuple[Any, ...]], left: Sequence[int], answers: list[Any]) -> None:
        slots = await self._slots()
        by_place: dict[str, list[int]] = {}
        for index in left:
            by_place.setdefault(slots.place_of(commands[index][1]), []).append(index)
        places = list(by_place)
        found = await asyncio.gather(
            *(self._pipeline(place, [commands[index] for index in by_place[place]]) for place in places)
        )
        for place, some in zip(places, found, strict=True):
            for index, answer in zip(by_place[place], some, strict=True):
                answers[index] = answer

    async def _pipeline(self, place: str, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        if place not in self._clients:
            self._clients[place] = self._connect(place)
        try:
            return await answers_to(self._clients[place], commands)
        except FAULTS:
            # Another server may have taken its place.
            self._map = None
            raise

    async def _slots(self) -> SlotMap:
        async with self._asking:
            if self._map is None:
                self._map = await self._asked()
            return self._map

    async def _asked(self) -> SlotMap:
        fault: Exception | None = None
        for place in dict.fromkeys((*self._clients, *self._url.seeds)):
            try:
                (answer,) = await self._pipeline(place, [ASK_SLOTS])
                if isinstance(answer, Exception):
                    raise answer
                return SlotMap.of(answer, place)
            except FAULTS as error:
                fault = error
        assert fault is not None
        raise fault

    def _connect(self, place: str) -> Redis:
        return connect(self._url.at(place), timeout_s=self._timeout_s, max_connections=self._max_connections)


def _has_moved(answer: object) -> bool:
    return isinstance(answer, MovedError | ClusterDownError | TryAgainError)


@TIERS.register(*CLUSTERS)
class ClusterTier(RedisTier):
    """`TierBackend` in a cluster. All frames of a session are on one of its servers."""

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__(url, timeout_s=timeout_s, servers=ClusterServers(url, timeout_s=timeout_s))


@SOURCES.register(*CLUSTERS)
class ClusterValues:
    """`ValueSource` of a cluster. Its map of slots is asked for when it is first needed, and after a fault."""

    def __init__(self, url: str) -> None:
        self._url = ClusterUrl.of(url)
        self._where = redacted(url)
        self._map: SlotMap | None = None
        self._asking = threading.Lock()

    def place_of(self, key: bytes) -> str:
        """See `ValueSource.place_of`. Blocks when nobody knows, for no longer than connecting may."""
        with self._asking:
            if self._map is None:
                self._map = self._asked()
            slots = self._map
        try:
            return slots.place_of(key)
        except ClusterDownError as error:
            raise unavailable(error, self._where) from error

    def connect(self, place: str, timeout_s: float) -> OpenSocket:
        """See `ValueSource.connect`."""
        try:
            connection = self._connected(place, timeout_s)
        except FAULTS as error:
            self._map = None
            raise unavailable(error, self._where) from error
        # As in `RedisValues`; of this class the type says that it never has one.
        connected: Socket | None = getattr(connection, "_sock")  # noqa: B009
        assert connected is not None
        return OpenSocket(connected, connection.disconnect)

    def refresh(self) -> None:
        """See `ValueSource.refresh`."""
        with self._asking:
            self._map = self._asked()

    def _asked(self) -> SlotMap:
        known = self._map.places if self._map is not None else ()
        fault: Exception | None = None
        for place in dict.fromkeys((*self._url.seeds, *known)):
            try:
                connection = self._connected(place, TIMEOUT_S)
            except FAULTS as error:
                fault = error
                continue
            try:
                connection.send_command(*ASK_SLOTS)  # type: ignore[no-untyped-call]
                return SlotMap.of(connection.read_response(), place)
            except (*FAULTS, *GARBLED) as error:
                fault = error
            finally:
                connection.disconnect()  # type: ignore[no-untyped-call]
        assert fault is not None
        raise unavailable(fault, self._where) from fault

    def _connected(self, place: str, timeout_s: float) -> AbstractConnection:
        """A new connection. Raises one of FAULTS."""
        limits = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
        pool = ConnectionPool.from_url(self._url.at(place), **SYNC)
        connection: AbstractConnection = pool.connection_class(**{**pool.connection_kwargs, **limits})
        try:
            connection.connect()  # type: ignore[no-untyped-call]
        except FAULTS:
            connection.disconnect()  # type: ignore[no-untyped-call]
            raise
        return connection
