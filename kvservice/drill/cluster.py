"""A Redis Cluster of three servers whose slots can be moved, whole or half-way. Knows nothing of the service."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from kvservice.drill.servers import KV_SETTINGS, POLL_S, START_TIMEOUT_S, DrillServer
from kvservice.errors import Unavailable

NUM_SERVERS = 3
NUM_SLOTS = 16384
BUS_PORTS_ABOVE = 10_000
"""Servers of a cluster talk to each other on their port and so many."""
MIGRATE_MS = 5000
AT_ONCE = 1000
SETTINGS = ("cluster-enabled yes", "cluster-config-file nodes.conf", "cluster-node-timeout 2000")


class DrillCluster:
    """Three primaries without replicas, and the slots among them in equal parts.

    Args:
        folder: where each has a folder of its own.
    """

    def __init__(self, folder: Path) -> None:
        first = DrillServer("kv-1", folder / "kv-1", (*KV_SETTINGS, *SETTINGS), port=_free_port())
        others = [
            DrillServer(
                f"kv-{number}",
                folder / f"kv-{number}",
                (*KV_SETTINGS, *SETTINGS),
                password=first.password,
                port=_free_port(),
            )
            for number in range(2, NUM_SERVERS + 1)
        ]
        self.servers = (first, *others)
        self._ids: list[str] = []

    def url(self) -> str:
        """For clients, who learn of the others from the first."""
        return f"redis+cluster://:{self.servers[0].password}@127.0.0.1:{self.servers[0].port}"

    async def join(self) -> None:
        """Makes a cluster of servers that run.

        Raises:
            Unavailable: they don't come together.
        """
        for index, server in enumerate(self.servers):
            self._ids.append(_text(await server.command("CLUSTER MYID")))
            slots = range(index * NUM_SLOTS // NUM_SERVERS, (index + 1) * NUM_SLOTS // NUM_SERVERS)
            await server.command("CLUSTER ADDSLOTS", *slots)
            await server.command("CLUSTER MEET", "127.0.0.1", self.servers[0].port)
        await self.until_whole()

    async def until_whole(self) -> None:
        """Waits until every server knows the others, and whose all slots are.

        Raises:
            Unavailable: that takes too long.
        """
        give_up = asyncio.get_running_loop().time() + START_TIMEOUT_S
        for server in self.servers:
            while not await _is_whole(server):
                if asyncio.get_running_loop().time() > give_up:
                    raise Unavailable(f"the cluster isn't whole, says {server.name}", reason="redis_start")
                await asyncio.sleep(POLL_S)

    async def begin_moves(self) -> None:
        """Each slot with keys in it is on its way to the next server: the keys are there, the slot isn't (ASK)."""
        # What is on its way to a server isn't its own yet.
        used = [await self._used_slots(server) for server in self.servers]
        for index, server in enumerate(self.servers):
            target = (index + 1) % NUM_SERVERS
            for slot in used[index]:
                await self.servers[target].command("CLUSTER SETSLOT", slot, "IMPORTING", self._ids[index])
                await server.command("CLUSTER SETSLOT", slot, "MIGRATING", self._ids[target])
                await self._carry(server, self.servers[target], slot)

    async def end_moves(self) -> None:
        """Slots that are on their way arrive (MOVED)."""
        for index, server in enumerate(self.servers):
            target = (index + 1) % NUM_SERVERS
            for slot in await self._leaving(server):
                # What has been written here since.
                await self._carry(server, self.servers[target], slot)
                for each in (self.servers[target], server, *self.servers):
                    await each.command("CLUSTER SETSLOT", slot, "NODE", self._ids[target])

    async def _carry(self, source: DrillServer, target: DrillServer, slot: int) -> None:
        while names := await source.command("CLUSTER GETKEYSINSLOT", slot, AT_ONCE):
            await source.command(
                *("MIGRATE", "127.0.0.1", target.port, "", 0, MIGRATE_MS, "REPLACE"),
                *("AUTH", target.password, "KEYS", *names),
            )

    async def _used_slots(self, server: DrillServer) -> list[int]:
        names = await server.command("KEYS", "*")
        return sorted({int(await server.command("CLUSTER KEYSLOT", name)) for name in names})

    async def _leaving(self, server: DrillServer) -> list[int]:
        """Slots that a server is giving up: `[SLOT->-ID]` in its own line of the list of nodes."""
        told = await server.command("CLUSTER NODES")
        if isinstance(told, dict):
            own = [field for node in told.values() if "myself" in node["flags"] for field in node.get("migrations", ())]
            return [int(each["slot"]) for each in own if each.get("state") == "migrating"]
        lines = [line for line in _text(told).splitlines() if "myself" in line]
        return [int(word[1:].partition("->-")[0]) for line in lines for word in line.split() if "->-" in word]


def _free_port() -> int:
    """A port whose bus port is free too."""
    while True:
        with closing(socket.socket()) as probe, closing(socket.socket()) as bus:
            bus.bind(("127.0.0.1", 0))
            port = int(bus.getsockname()[1]) - BUS_PORTS_ABOVE
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port


async def _is_whole(server: DrillServer) -> bool:
    told = await server.command("CLUSTER INFO")
    info = told if isinstance(told, dict) else dict(_pairs(_text(told)))
    wanted = {"cluster_state": "ok", "cluster_slots_assigned": str(NUM_SLOTS), "cluster_known_nodes": str(NUM_SERVERS)}
    return all(str(info.get(name)) == value for name, value in wanted.items())


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for line in text.split():
        name, _, value = line.partition(":")
        yield name, value


def _text(answer: object) -> str:
    return answer.decode() if isinstance(answer, bytes) else str(answer)
