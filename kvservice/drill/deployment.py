"""A whole deployment on this machine, made to be broken: two redis-servers, gateways, workers, and links between.

    client ──► gateway 1, 2 ──► worker a, b ──► link ──► kv
                  └────────────────┴──────────► link ──► state

Every process has a link of its own to each server, so that one may be cut off while others aren't.
"""

from __future__ import annotations

import asyncio
import enum
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from kvservice.client import Client, LocalService, RetryPolicy, ServiceStats
from kvservice.config.api_keys import key_entry
from kvservice.drill.cluster import DrillCluster
from kvservice.drill.proxy import LinkFault, Proxy
from kvservice.drill.ray_cluster import DrillRay
from kvservice.drill.servers import KV_SETTINGS, STATE_SETTINGS, DrillSentinel, DrillServer, free_port
from kvservice.drill.skewed import write_skew
from kvservice.errors import KVServiceError, Unavailable
from kvservice.types import Role, WorkerId

TENANT = "local"
"""Whose sessions are looked at; its key is an operator's."""
CROWD_TENANT = "crowd"
"""Another one, without rights."""
RAY = "ray"
"""What stands for all workers that run on Ray: their deployment, their links."""
READY_TIMEOUT_S = 120.0
POLL_S = 0.05


class KvKind(enum.Enum):
    """What the kv role is."""

    ONE = "one server, behind proxies"
    SENTINEL = "a server with a replica, and a sentinel which workers ask for it; no proxies"
    CLUSTER = "three servers of a cluster; no proxies"


@dataclass(frozen=True, slots=True)
class DrillConfig:
    """What is deployed.

    Attributes:
        model: a fetched model's name, or a folder.
        folder: for data, settings and logs.
        dtype: of weights and KV.
        gateways: their names; the client calls the first.
        workers: their names.
        seed: of all that is random.
        kv: what the kv role is.
        on_ray: as many workers, as replicas on a Ray cluster, whose ids Ray chooses; the cluster is `Deployment.ray`.
        has_keys: the service asks for API keys: those of `Deployment.keys`.
        limits: of the gateways, beside those that a drill needs.
        kv_keys: the file of keys that workers seal stored KV with; None: it isn't sealed.
    """

    model: str
    folder: Path
    dtype: str = "fp32"
    gateways: tuple[str, ...] = ("gateway-1", "gateway-2")
    workers: tuple[str, ...] = ("a", "b")
    seed: int = 7
    kv: KvKind = KvKind.ONE
    on_ray: bool = False
    has_keys: bool = False
    limits: Mapping[str, float] = field(default_factory=dict)
    kv_keys: Path | None = None


@dataclass(slots=True)
class Links:
    """The connections of one process to the two servers."""

    state: Proxy
    kv: Proxy | None = None


@dataclass(slots=True)
class Deployment:
    """Use as `async with Deployment(config) as deployment:`."""

    config: DrillConfig
    kv: DrillServer = field(init=False)
    state: DrillServer = field(init=False)
    replica: DrillServer | None = field(init=False, default=None)
    sentinel: DrillSentinel | None = field(init=False, default=None)
    cluster: DrillCluster | None = field(init=False, default=None)
    ray: DrillRay | None = field(init=False, default=None)
    links: dict[str, Links] = field(init=False, default_factory=dict)
    processes: dict[str, LocalService] = field(init=False, default_factory=dict)
    clients: dict[str, Client] = field(init=False, default_factory=dict)
    http_ports: dict[str, int] = field(init=False, default_factory=dict)
    keys: dict[str, str] = field(init=False, default_factory=dict)
    """Of the API, by tenant; empty where it asks for none."""
    _found_workers: tuple[str, ...] = field(init=False, default=())
    _stack: AsyncExitStack = field(init=False, default_factory=AsyncExitStack)

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def client(self) -> Client:
        """Of the first gateway."""
        return self.clients[self.config.gateways[0]]

    @property
    def workers(self) -> tuple[str, ...]:
        """Their names: where they run on Ray, those that `until_whole` found last."""
        return self._found_workers if self.config.on_ray else self.config.workers

    @property
    def seed(self) -> int:
        """Of all that is random."""
        return self.config.seed

    def kv_links(self) -> Iterator[Proxy]:
        """Of all workers."""
        return (links.kv for links in self.links.values() if links.kv is not None)

    def set_kv(self, fault: LinkFault) -> None:
        """The same fault on every worker's link to the kv server."""
        for link in self.kv_links():
            link.set(fault)

    def set_state(self, fault: LinkFault) -> None:
        """The same fault on every link to the state server."""
        for links in self.links.values():
            links.state.set(fault)

    def new_client(self) -> Client:
        """One more client of the first gateway; the caller closes it."""
        return self.client_of(self.config.gateways[0], TENANT)

    def client_of(self, name: str, tenant: str, retry: RetryPolicy | None = None) -> Client:
        """A client of a gateway; the caller closes it."""
        return Client(self.processes[name].address, self.keys.get(tenant), retry=retry)

    def port(self, name: str) -> int:
        """Where a process listens for calls."""
        return int(self.processes[name].address.rpartition(":")[2])

    async def revive(self) -> list[str]:
        """Starts processes that have ended by themselves; gives their names."""
        ended = [name for name, process in self.processes.items() if not process.is_running]
        for name in ended:
            await self.processes[name].start()
        return ended

    async def until_whole(self, timeout_s: float = READY_TIMEOUT_S) -> ServiceStats:
        """Waits until the gateway knows all workers, and these are in touch with the kv server.

        Raises:
            Unavailable: that takes longer.
        """
        why = "the gateway doesn't answer"
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        stats = await self.client.stats()
                    except KVServiceError as error:
                        why = error.message
                    else:
                        there = {worker.worker_id for worker in stats.workers if worker.tier.connected}
                        if self._are_all(there):
                            return stats
                        why = f"workers in touch with the kv server: {', '.join(sorted(there)) or 'none'}"
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise Unavailable(f"the deployment isn't whole after {timeout_s:g} s: {why}", reason="not_whole") from None

    def _are_all(self, there: set[WorkerId]) -> bool:
        if not self.config.on_ray:
            return there == set(self.config.workers)
        self._found_workers = tuple(sorted(there))
        return len(there) == len(self.config.workers)

    async def _start(self) -> None:
        folder = self.config.folder
        folder.mkdir(mode=0o700, exist_ok=True)
        await self._start_servers(folder)
        gateways, workers = self.config.gateways, (RAY,) if self.config.on_ray else self.config.workers
        for index, name in enumerate((*gateways, *workers)):
            links = Links(Proxy("127.0.0.1", self.state.port, seed=self.config.seed + index))
            await links.state.start()
            self._stack.push_async_callback(links.state.aclose)
            if name in workers:
                links.kv = Proxy("127.0.0.1", self.kv.port, seed=self.config.seed + index)
                await links.kv.start()
                self._stack.push_async_callback(links.kv.aclose)
            self.links[name] = links
        secret = secrets.token_hex(32)
        if self.config.has_keys:
            self.keys = {tenant: secrets.token_urlsafe(24) for tenant in (TENANT, CROWD_TENANT)}
            self._write("keys.json", {"keys": [_key(key, tenant) for tenant, key in self.keys.items()]})
        self.http_ports = {name: free_port() for name in gateways}
        for name in gateways:
            # A port of its own: one that was killed must come back where its callers look for it.
            file = self._gateway_file(name, secret)
            self.processes[name] = self._process("gateway", name, file, free_port())
        for name in () if self.config.on_ray else workers:
            self.processes[name] = self._process("worker", name, self._worker_file(name), 0)
        for process in self.processes.values():
            self._stack.push_async_callback(process.kill)
        await asyncio.gather(*(process.start() for process in self.processes.values()))
        if self.config.on_ray:
            await self._start_ray()
        for name in gateways:
            self.clients[name] = await self._stack.enter_async_context(self.client_of(name, TENANT))
        await self.until_whole()

    async def _start_servers(self, folder: Path) -> None:
        self.state = DrillServer("state", folder / "state", STATE_SETTINGS)
        servers = [self.state]
        if self.config.kv is KvKind.CLUSTER:
            self.cluster = DrillCluster(folder)
            self.kv = self.cluster.servers[0]
            servers += self.cluster.servers
        else:
            self.kv = DrillServer("kv", folder / "kv", KV_SETTINGS)
            servers.append(self.kv)
        if self.config.kv is KvKind.SENTINEL:
            follows = (*KV_SETTINGS, f"replicaof 127.0.0.1 {self.kv.port}")
            self.replica = DrillServer("kv-replica", folder / "replica", follows, password=self.kv.password)
            self.sentinel = DrillSentinel(folder / "sentinel", self.kv)
            servers += [self.replica, self.sentinel]
        for server in servers:
            self._stack.callback(server.kill)
            await server.start()
        if self.cluster is not None:
            await self.cluster.join()

    async def _start_ray(self) -> None:
        """A cluster, and the workers on it. What differs from node to node they find in their environment."""
        settings = self._worker_settings(RAY)
        environment = {
            "KVSERVICE_STATE_URL": self.state.url(self.links[RAY].state.port),
            "KVSERVICE_REDIS_URL": str(settings.pop("redis_url")),
        }
        self.ray = DrillRay(self.config.folder / "ray", environment)
        self._stack.push_async_callback(self.ray.aclose)
        await self.ray.start()
        deployment = {
            "name": RAY,
            "worker": settings,
            "num_cpus": 0.25,
            "health_check_period_s": 1,
            "replicas": len(self.config.workers),
        }
        table = {"address": self.ray.address, "deployments": [deployment]}
        await self.ray.deploy(self._settings_file(RAY, {"ray": table}))

    def _process(self, command: str, name: str, settings: Path, port: int) -> LocalService:
        self.skew(name, 0.0)
        module = ("kvservice.drill.skewed", str(self._skew_file(name)))
        return LocalService(["--config", str(settings)], command=command, port=port, module=module)

    def skew(self, name: str, ahead_s: float) -> None:
        """The wall clock of a process is so much ahead from now on."""
        write_skew(self._skew_file(name), ahead_s)

    def _skew_file(self, name: str) -> Path:
        return self.config.folder / f"{name}.clock"

    def _kv_url(self, link: Proxy) -> str:
        if self.cluster is not None:
            return self.cluster.url()
        return self.sentinel.sentinel_url() if self.sentinel is not None else self.kv.url(link.port)

    def _gateway_file(self, name: str, secret: str) -> Path:
        # Sessions may be left to expire within the drill.
        limits = {"min_ttl_s": 1.0, **self.config.limits}
        gateway = {
            "secret": secret,
            "discovery_interval_s": 0.2,
            "sweep_interval_s": 2.0,
            "http_port": self.http_ports[name],
            "limits": limits,
        }
        keys = str((self.config.folder / "keys.json").absolute()) if self.config.has_keys else None
        return self._settings_file(name, {"gateway": gateway, "api_keys": keys})

    def _worker_file(self, name: str) -> Path:
        return self._settings_file(name, {"worker": {"worker_id": name, **self._worker_settings(name)}})

    def _worker_settings(self, name: str) -> dict[str, object]:
        link = self.links[name].kv
        assert link is not None
        return {
            "model": self.config.model,
            "dtype": self.config.dtype,
            "deterministic": True,
            "kv_bytes": "64MiB",
            "host_bytes": "128MiB",
            "threads": 1,
            "drain_grace_s": 1.0,
            "kv_ttl_s": 60.0,
            "kv_keys": str(self.config.kv_keys.absolute()) if self.config.kv_keys is not None else None,
            "redis_url": self._kv_url(link),
        }

    def _settings_file(self, name: str, settings: dict[str, object]) -> Path:
        own = {"state_url": self.state.url(self.links[name].state.port), "log_level": "WARNING"}
        return self._write(f"{name}.json", settings | own)

    def _write(self, name: str, content: dict[str, object]) -> Path:
        """A file for the owner's eyes only: it has passwords or keys in it."""
        path = self.config.folder / name
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(content, file)
        return path


def _key(key: str, tenant: str) -> dict[str, str]:
    role = Role.OPERATOR if tenant == TENANT else Role.TENANT
    return key_entry(key, tenant, role)
