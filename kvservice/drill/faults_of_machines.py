"""What machines do to processes: full disks, no memory left, clocks that jump, networks that are cut.

Disks and memory are limits of one process, changed while it runs. Networks are cut by packet filters, in a network
namespace of the drill's own alone: nothing that others use is touched.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable

from kvservice.drill.deployment import Deployment
from kvservice.drill.faults import STATE, Act, Fault
from kvservice.drill.limits import limit_files, limit_memory
from kvservice.errors import Unavailable

MACHINE = "machine"
NETWORK = "network"

DAY_S = 86_400.0
JUMP_S = 2 * DAY_S
"""Longer than a session lives unless it is used."""
DISK_LEFT_BYTES = 64
FILTER = ("iptables", "--wait")
LOOPBACK = "lo"

Names = Callable[[Deployment], Iterable[str]]


def _gateways(deployment: Deployment) -> Iterable[str]:
    return deployment.config.gateways


def _first_gateway(deployment: Deployment) -> Iterable[str]:
    return deployment.config.gateways[:1]


def _workers(deployment: Deployment) -> Iterable[str]:
    return deployment.config.workers


def _first_worker(deployment: Deployment) -> Iterable[str]:
    return deployment.config.workers[:1]


# Disks


async def _fill_disk(deployment: Deployment) -> None:
    limit_files(deployment.state.pid, deployment.state.longest_file() + DISK_LEFT_BYTES)


async def _fill_disk_of_lazy_server(deployment: Deployment) -> None:
    await deployment.state.command("CONFIG", "SET", "appendfsync", "everysec")
    await _fill_disk(deployment)


async def _start_state_again(deployment: Deployment) -> None:
    deployment.state.kill()
    await deployment.state.start()


async def _empty_disk(deployment: Deployment) -> None:
    limit_files(deployment.state.pid, None)
    await deployment.state.command("CONFIG", "SET", "appendfsync", "always")


# Memory


def _no_memory(names: Names) -> Act:
    async def act(deployment: Deployment) -> None:
        for name in names(deployment):
            limit_memory(deployment.processes[name].pid, 0)

    return act


def _memory_again(names: Names) -> Act:
    async def act(deployment: Deployment) -> None:
        for name in names(deployment):
            if deployment.processes[name].is_running:
                limit_memory(deployment.processes[name].pid, None)

    return act


# Clocks


def _jump(names: Names, ahead_s: float) -> Act:
    async def act(deployment: Deployment) -> None:
        for name in names(deployment):
            deployment.skew(name, ahead_s)

    return act


def _clock(who: str, names: Names, ahead_s: float, *, reduced: bool = False) -> Fault:
    direction = "ahead" if ahead_s > 0 else "behind"
    name = f"clock of {who} jumps two days {direction}"
    return Fault(name, MACHINE, _jump(names, ahead_s), _jump(names, 0.0), reduced=reduced)


# Networks


def has_own_network() -> bool:
    """Whether this process is in a network namespace that nobody else uses: all there is in it is loopback."""
    return os.path.exists("/proc/self/ns/net") and [name for _, name in socket.if_nameindex()] == [LOOPBACK]


async def open_own_network() -> None:
    """Turns loopback on, in a namespace of our own.

    Raises:
        Unavailable: that can't be done.
    """
    await _administer("ip", "link", "set", LOOPBACK, "up")


def _cut(ports: Callable[[Deployment], Iterable[int]]) -> Act:
    async def act(deployment: Deployment) -> None:
        for port in ports(deployment):
            for side in ("--dport", "--sport"):
                await _administer(*FILTER, "-A", "INPUT", "-p", "tcp", side, str(port), "-j", "DROP")

    return act


async def _join(deployment: Deployment) -> None:
    del deployment
    await _administer(*FILTER, "-F", "INPUT")


async def _administer(*command: str) -> None:
    if not has_own_network():
        raise Unavailable("the drill cuts no network but one of its own", reason="not_own_network")
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, told = await process.communicate()
    if process.returncode:
        raise Unavailable(f"{' '.join(command)}: {told.decode(errors='replace').strip()}", reason="network")


def _to_first_worker(deployment: Deployment) -> Iterable[int]:
    return (deployment.port(name) for name in _first_worker(deployment))


def _around_first_worker(deployment: Deployment) -> Iterable[int]:
    for name in _first_worker(deployment):
        links = deployment.links[name]
        yield from (deployment.port(name), links.state.port, *((links.kv.port,) if links.kv else ()))


def _to_first_gateway(deployment: Deployment) -> Iterable[int]:
    return (deployment.port(name) for name in _first_gateway(deployment))


def _gateway_to_state(deployment: Deployment) -> Iterable[int]:
    return (deployment.links[name].state.port for name in _first_gateway(deployment))


def _workers_to_state(deployment: Deployment) -> Iterable[int]:
    return (deployment.links[name].state.port for name in _workers(deployment))


def _workers_to_kv(deployment: Deployment) -> Iterable[int]:
    return (link.port for link in deployment.kv_links())


def _network(name: str, ports: Callable[[Deployment], Iterable[int]], *expects: str, may_fail: bool = False) -> Fault:
    return Fault(f"network cut: {name}", NETWORK, _cut(ports), _join, frozenset(expects), may_fail=may_fail)


MACHINE_FAULTS: tuple[Fault, ...] = (
    Fault("state: disk full, the server ends", STATE, _fill_disk, _start_state_again, may_fail=True),
    Fault("state: disk full, writes are refused", STATE, _fill_disk_of_lazy_server, _empty_disk, may_fail=True),
    Fault("workers get no more memory", MACHINE, _no_memory(_workers), _memory_again(_workers), may_fail=True),
    Fault("gateways get no more memory", MACHINE, _no_memory(_gateways), _memory_again(_gateways), may_fail=True),
    _clock("a gateway", _first_gateway, JUMP_S, reduced=True),
    _clock("a gateway", _first_gateway, -JUMP_S),
    _clock("the workers", _workers, JUMP_S),
    _clock("the workers", _workers, -JUMP_S),
)

NETWORK_FAULTS: tuple[Fault, ...] = (
    _network("gateways and a worker", _to_first_worker),
    _network("a worker and all others", _around_first_worker),
    _network("workers and kv", _workers_to_kv, "timeout", "breaker", "connection"),
    _network("workers and state", _workers_to_state, may_fail=True),
    _network("a gateway and state", _gateway_to_state, may_fail=True),
    _network("client and gateway", _to_first_gateway, may_fail=True),
)
"""Only in a network namespace of the drill's own."""
