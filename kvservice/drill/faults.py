"""The faults of servers and links, each a name, how it comes, how it goes, and what must be seen of it.

Knows how to break a deployment, and nothing of how what then happens is looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from kvservice.drill.deployment import Deployment, KvKind
from kvservice.drill.proxy import NO_FAULT, LinkFault
from kvservice.drill.servers import DrillServer

Act = Callable[[Deployment], Awaitable[None]]

TIER = "tier"
STATE = "state"

POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        name: unique.
        part: what it strikes.
        inject: brings it about.
        heal: ends it.
        expects: reasons of misses of which one at least must be counted; empty: none need be.
        may_fail: calls may be refused while it lasts, clearly.
        reduced: part of the short form.
        kv: what the kv role must be.
        on_ray: the workers must run on Ray.
        most_s: so long a call may take under it; 0: however long.
    """

    name: str
    part: str
    inject: Act
    heal: Act
    expects: frozenset[str] = frozenset()
    may_fail: bool = False
    reduced: bool = False
    kv: KvKind = KvKind.ONE
    on_ray: bool = False
    most_s: float = 0.0


def _kv_link(fault: LinkFault) -> Act:
    async def act(deployment: Deployment) -> None:
        deployment.set_kv(fault)

    return act


def _state_link(fault: LinkFault) -> Act:
    async def act(deployment: Deployment) -> None:
        deployment.set_state(fault)

    return act


def _kv_commands(*commands: tuple[str, ...]) -> Act:
    async def act(deployment: Deployment) -> None:
        for command in commands:
            await deployment.kv.command(*command)

    return act


def _of_kv_link(name: str, fault: LinkFault, *expects: str, reduced: bool = False) -> Fault:
    return Fault(name, TIER, _kv_link(fault), _kv_link(NO_FAULT), frozenset(expects), reduced=reduced)


def _of_state_link(name: str, fault: LinkFault) -> Fault:
    return Fault(name, STATE, _state_link(fault), _state_link(NO_FAULT), may_fail=True)


async def _kill_kv_saved(deployment: Deployment) -> None:
    await deployment.kv.command("SAVE")
    deployment.kv.kill()


async def _kill_kv_empty(deployment: Deployment) -> None:
    deployment.kv.kill(lose_data=True)


async def _start_kv(deployment: Deployment) -> None:
    await deployment.kv.start()


async def _freeze_kv(deployment: Deployment) -> None:
    deployment.kv.freeze()


async def _thaw_kv(deployment: Deployment) -> None:
    deployment.kv.thaw()


async def _kill_state(deployment: Deployment) -> None:
    deployment.state.kill()


async def _start_state(deployment: Deployment) -> None:
    await deployment.state.start()


async def _freeze_state(deployment: Deployment) -> None:
    deployment.state.freeze()


async def _thaw_state(deployment: Deployment) -> None:
    deployment.state.thaw()


async def _fail_over(deployment: Deployment) -> None:
    """The primary is killed, and what takes its place has lost what the primary had acknowledged."""
    replica, sentinel = deployment.replica, deployment.sentinel
    assert replica is not None
    assert sentinel is not None
    await _until(replica, lambda table: table.get("master_link_status") == "up")
    await replica.command("CONFIG", "SET", "replica-read-only", "no")
    await replica.command("FLUSHALL")
    await replica.command("CONFIG", "SET", "replica-read-only", "yes")
    deployment.kv.kill()
    while True:
        if await sentinel.primary_port() == replica.port:
            return
        await asyncio.sleep(POLL_S)


async def _until(server: DrillServer, condition: Callable[[dict[str, object]], bool]) -> None:
    """Waits until what a server says of its replication fulfils a condition."""
    while True:
        answer = await server.command("INFO", "replication")
        if isinstance(answer, dict) and condition(answer):
            return
        await asyncio.sleep(POLL_S)


_SMALL = (("CONFIG", "SET", "maxmemory", "1mb"),)
_LARGE = (("CONFIG", "SET", "maxmemory", "512mb"), ("CONFIG", "SET", "maxmemory-policy", "allkeys-lru"))

FAULTS: tuple[Fault, ...] = (
    _of_kv_link("latency and jitter", LinkFault(latency_s=0.05, jitter_s=0.1)),
    _of_kv_link("resets in mid-frame", LinkFault(reset_after_bytes=5000), "connection", "breaker"),
    _of_kv_link("truncated replies", LinkFault(truncate_after_bytes=5000), "connection", "breaker"),
    _of_kv_link("bits flipped in replies", LinkFault(flip_every_bytes=20_000), "checksum", "connection", reduced=True),
    _of_kv_link("bits flipped in requests", LinkFault(flip_every_bytes=5000, flip_requests=True)),
    _of_kv_link("black hole", LinkFault(black_hole=True), "timeout", "breaker"),
    _of_kv_link("slow drip", LinkFault(drip_bytes_per_s=20_000), "timeout", "breaker"),
    _of_kv_link("connections refused", LinkFault(refuses=True), "connection", "breaker"),
    _of_kv_link("LOADING", LinkFault(error="-LOADING Redis is loading the dataset in memory"), "connection", "breaker"),
    _of_kv_link("MOVED", LinkFault(error="-MOVED 3999 127.0.0.1:1"), "connection", "breaker"),
    _of_kv_link("ASK", LinkFault(error="-ASK 3999 127.0.0.1:1"), "connection", "breaker"),
    _of_kv_link("OOM at every command", LinkFault(error="-OOM command not allowed"), "oom", "breaker"),
    Fault(
        "server full, evicting nothing",
        TIER,
        _kv_commands(*_SMALL, ("CONFIG", "SET", "maxmemory-policy", "noeviction")),
        _kv_commands(*_LARGE),
        frozenset({"write:oom", "write:breaker"}),
    ),
    Fault(
        "evicted between look-up and read",
        TIER,
        # The server makes room before it carries out a command.
        _kv_commands(*_SMALL, ("GET", "drill"), *_LARGE),
        _kv_commands(),
        frozenset({"absent"}),
        reduced=True,
    ),
    Fault(
        "READONLY: the server is a replica",
        TIER,
        _kv_commands(("REPLICAOF", "127.0.0.1", "1")),
        _kv_commands(("REPLICAOF", "NO", "ONE")),
        frozenset({"write:readonly", "write:breaker"}),
    ),
    Fault(
        "killed, restarted empty", TIER, _kill_kv_empty, _start_kv, frozenset({"connection", "breaker"}), reduced=True
    ),
    Fault("killed, restarted with its data", TIER, _kill_kv_saved, _start_kv, frozenset({"connection", "breaker"})),
    Fault("server frozen", TIER, _freeze_kv, _thaw_kv, frozenset({"timeout", "breaker"})),
    Fault(
        "Sentinel fails over, and writes that were acknowledged are lost",
        TIER,
        _fail_over,
        _start_kv,
        frozenset({"absent"}),
        kv=KvKind.SENTINEL,
    ),
    _of_state_link("state: latency and jitter", LinkFault(latency_s=0.02, jitter_s=0.03)),
    _of_state_link("state: resets", LinkFault(reset_after_bytes=500)),
    _of_state_link("state: black hole", LinkFault(black_hole=True)),
    _of_state_link("state: connections refused", LinkFault(refuses=True)),
    Fault("state: killed, restarted", STATE, _kill_state, _start_state, may_fail=True),
    Fault("state: server frozen", STATE, _freeze_state, _thaw_state, may_fail=True),
)
"""In the order in which they are tried."""
