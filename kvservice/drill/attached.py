"""A drill on a service that runs already, from outside: what may be done to it there, and what may not.

may      connections of its Redis are cut (CLIENT KILL), or it falls silent for seconds (CLIENT PAUSE); stored frames of
         the drill's own sessions are deleted or damaged
if told  all stored KV is deleted (FLUSHDB): that costs every tenant time, and nobody data
never    whatever could lose what `state` holds, sessions of others, or a process

Others who use the service are slowed down while it runs, and some of their calls may fail as clearly as its own do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from kvservice.client import Client, ServiceStats
from kvservice.drill.examine import Examiner
from kvservice.drill.faults import STATE, TIER
from kvservice.drill.outcomes import FaultReport
from kvservice.drill.stillness import found_in_peace
from kvservice.errors import ConfigError, KVServiceError, Unavailable
from kvservice.tier.redis import CLUSTERS, FAULTS, connect, redacted, unavailable

COMMAND_TIMEOUT_S = 15.0
"""Longer than a server falls silent."""
SILENT_S = 6.0
STATE_SILENT_S = 3.0
CUT_EVERY_S = 0.2
PAGE = 1000
FLEET_KEY = "kvs:{fleet}:epoch"
"""Of every server in the role `state`."""

Deed = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class AttachedConfig:
    """What is drilled, and what may be done to it.

    Attributes:
        kv_url: of the Redis in the role kv.
        state_url: of the one in the role state; None: it is left alone.
        tenant: of the key. What it has beside the drill's sessions is left alone.
        may_lose_kv: all stored KV may be deleted.
        seed: of all that is random.
    """

    kv_url: str
    state_url: str | None = None
    tenant: str = "local"
    may_lose_kv: bool = False
    seed: int = 7


@dataclass(frozen=True, slots=True)
class AttachedFault:
    """As `faults.Fault`, of a service that isn't the drill's own."""

    name: str
    part: str
    inject: Deed
    heal: Deed
    expects: frozenset[str] = frozenset()
    may_fail: bool = False
    most_s: float = 0.0


class RunningService:
    """What an examiner needs of a service that runs. `workers` are those that were there at the beginning."""

    def __init__(self, client: Client, workers: tuple[str, ...], seed: int) -> None:
        self.client = client
        self.workers = workers
        self.seed = seed

    @classmethod
    async def of(cls, client: Client, seed: int) -> RunningService:
        """A service as it is now.

        Raises:
            ConfigError: it has too few workers to move a session between.
        """
        there = tuple(sorted(worker.worker_id for worker in (await client.stats()).workers))
        if len(there) < 2:
            raise ConfigError(
                f"the service has {len(there)} workers: a drill moves sessions between two, to see their KV come back"
            )
        return cls(client, there, seed)

    async def until_whole(self, timeout_s: float) -> ServiceStats:
        """Waits until all workers are there, and in touch with the kv server.

        Raises:
            Unavailable: that takes longer.
        """
        give_up = asyncio.get_running_loop().time() + timeout_s
        while True:
            try:
                stats = await self.client.stats()
                if set(self.workers) <= {worker.worker_id for worker in stats.workers if worker.tier.connected}:
                    return stats
            except KVServiceError:
                pass
            if asyncio.get_running_loop().time() > give_up:
                raise Unavailable(f"the service isn't whole after {timeout_s:g} s", reason="not_whole")
            await asyncio.sleep(CUT_EVERY_S)

    async def revive(self) -> list[str]:
        """Its processes are its operator's to start."""
        return []


class _Server:
    """A Redis of the service, and what a drill may do to it."""

    def __init__(self, url: str) -> None:
        if urlsplit(url).scheme in CLUSTERS:
            raise ConfigError(f"{redacted(url)}: faults are applied to one server from outside, not to a cluster")
        self._where = redacted(url)
        self._redis = connect(url, timeout_s=COMMAND_TIMEOUT_S, max_connections=1)
        self._cutting: asyncio.Task[None] | None = None
        self._silent_until = 0.0

    async def command(self, *words: str | bytes | int) -> Any:  # noqa: ANN401 -- as its client's
        try:
            return await self._redis.execute_command(*words)  # type: ignore[no-untyped-call]
        except FAULTS as error:
            raise unavailable(error, self._where) from error

    async def cut(self) -> None:
        """Ends all connections but the drill's, again and again."""

        async def cutting() -> None:
            while True:
                await self.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await asyncio.sleep(CUT_EVERY_S)

        self._cutting = asyncio.create_task(cutting())

    async def stop_cutting(self) -> None:
        cutting, self._cutting = self._cutting, None
        if cutting is not None:
            cutting.cancel()
            await asyncio.gather(cutting, return_exceptions=True)

    async def fall_silent(self, seconds: float) -> None:
        """It takes commands and answers none. It ends by itself, even if the drill is killed."""
        await self.command("CLIENT", "PAUSE", round(seconds * 1000), "ALL")
        self._silent_until = asyncio.get_running_loop().time() + seconds

    async def silence_ends(self) -> None:
        await asyncio.sleep(self._silent_until - asyncio.get_running_loop().time())

    async def frames_of(self, session: str) -> list[bytes]:
        cursor, found = 0, []
        while True:
            cursor, names = await self.command("SCAN", cursor, "MATCH", f"kv1:{{*:{session}}}:*", "COUNT", PAGE)
            found += names
            if not int(cursor):
                return sorted(set(found))

    async def has_state(self) -> bool:
        return bool(await self.command("EXISTS", FLEET_KEY))

    async def aclose(self) -> None:
        await self.stop_cutting()
        await self._redis.aclose()


async def run_attached(
    config: AttachedConfig, client: Client, recipe: str, report: Callable[[FaultReport], None]
) -> list[FaultReport]:
    """Tries one fault after another on a service that runs; the first report is that of no fault.

    Args:
        config: what may be done.
        client: of the service, with an operator's key.
        recipe: of the sessions.
        report: told of each fault as it is through.

    Raises:
        ConfigError: what is asked for would lose what must not be lost, or can't be done here.
        KVServiceError: the service doesn't work without a fault.
    """
    kv = _Server(config.kv_url)
    state = _Server(config.state_url) if config.state_url is not None else None
    try:
        if await kv.has_state():
            raise ConfigError(f"{redacted(config.kv_url)} holds the service's state: a drill deletes nothing there")
        service = await RunningService.of(client, config.seed)
        examiner = Examiner(service, recipe, tenant=config.tenant, is_alone=False)
        reports = [await examiner.without_fault()]
        report(reports[0])
        for fault in attached_faults(kv, state, examiner, may_lose_kv=config.may_lose_kv):
            reports.append(await found_in_peace(partial(examiner.examine, fault, fault.inject, fault.heal)))
            report(reports[-1])
        return reports
    finally:
        await kv.aclose()
        if state is not None:
            await state.aclose()


def attached_faults(
    kv: _Server, state: _Server | None, examiner: Examiner, *, may_lose_kv: bool
) -> tuple[AttachedFault, ...]:
    """What may be done."""

    async def delete_own() -> None:
        names = await kv.frames_of(examiner.cold_session)
        if names:
            await kv.command("UNLINK", *names)

    async def damage_own() -> None:
        for name in await kv.frames_of(examiner.cold_session):
            middle = int(await kv.command("STRLEN", name)) // 2
            (byte,) = await kv.command("GETRANGE", name, middle, middle)
            await kv.command("SETRANGE", name, middle, bytes([byte ^ 1]))

    async def delete_all() -> None:
        await kv.command("FLUSHDB")

    async def nothing() -> None:
        pass

    found = [
        AttachedFault("kv: connections cut", TIER, kv.cut, kv.stop_cutting),
        AttachedFault("kv: silent", TIER, lambda: kv.fall_silent(SILENT_S), kv.silence_ends),
        AttachedFault("kv: own frames deleted", TIER, delete_own, nothing, frozenset({"absent"})),
        AttachedFault("kv: own frames damaged", TIER, damage_own, nothing, frozenset({"checksum"})),
    ]
    if may_lose_kv:
        found.append(AttachedFault("kv: all frames deleted", TIER, delete_all, nothing, frozenset({"absent"})))
    if state is not None:
        found += [
            AttachedFault("state: connections cut", STATE, state.cut, state.stop_cutting, may_fail=True),
            AttachedFault(
                "state: silent", STATE, lambda: state.fall_silent(STATE_SILENT_S), state.silence_ends, may_fail=True
            ),
        ]
    return tuple(found)
