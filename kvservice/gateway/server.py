"""The gateway as one thing that starts, drains and stops. The only place that puts its parts together."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from kvservice.config.gateway import GatewayConfig
from kvservice.errors import ConfigError
from kvservice.gateway.admission import Admission
from kvservice.gateway.answers import Answers
from kvservice.gateway.appends import Appends
from kvservice.gateway.auth import Authenticator, KeySource
from kvservice.gateway.fleet import Fleet
from kvservice.gateway.health import GatewayHealth
from kvservice.gateway.interceptors import ServiceInterceptor
from kvservice.gateway.metering import Metering
from kvservice.gateway.operations import Operations
from kvservice.gateway.quotas import Quotas
from kvservice.gateway.reception import Reception
from kvservice.gateway.refresh import Refresher, refresh_forever
from kvservice.gateway.repeats import Repeats
from kvservice.gateway.runs import Runs
from kvservice.gateway.servicer_admin import AdminServicer
from kvservice.gateway.servicer_inference import InferenceServicer
from kvservice.gateway.servicer_sessions import SessionServicer
from kvservice.gateway.sessions import Sessions
from kvservice.gateway.web.front import WebFront
from kvservice.gateway.web_tokens import WebTokens
from kvservice.gateway.worker_link import ChannelSecurity
from kvservice.internal.https import server_context
from kvservice.internal.tls import PemFiles, channel_credentials, server_credentials
from kvservice.store.base import StateStore
from kvservice.store.rates import MemoryRateStore, RateStore
from kvservice.store.tasks import end_tasks
from kvservice.store.usage import MemoryUsageLog, UsageLog
from kvservice.telemetry.metrics import GatewayLevels, GatewayMetrics
from kvservice.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc, sessions_pb2, sessions_pb2_grpc

logger = logging.getLogger(__name__)

SERVICE_NAMES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (sessions_pb2, "SessionService"),
        (inference_pb2, "InferenceService"),
        (admin_pb2, "AdminService"),
    )
)
REFRESH_INTERVAL_S = 10.0
"""Between two rounds of sessions that are computed again."""
STOP_GRACE_S = 5.0
"""What is left when the gateway stops are answers on their way; streams have been ended by the drain."""


MAX_CONNECTION_AGE_MS = 600_000
"""gRPC takes up to a tenth more or less. Calls that run then go on."""


class Gateway:
    """One gateway. The stores and the keys are the caller's; `clock` gives unix seconds, unset the store's.

    `rates` counts what tenants use, and `usage` writes it down; without them this gateway does so alone. Without keys
    and tokens everybody is the operator of tenant `local`, and only loopback addresses are listened on.
    """

    def __init__(
        self,
        config: GatewayConfig,
        store: StateStore,
        keys: KeySource | None = None,
        *,
        rates: RateStore | None = None,
        usage: UsageLog | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        clock = clock or store.clock
        if keys is None and config.jwt is None and not _is_loopback(config.host):
            raise ConfigError(
                f"host={config.host!r} without API keys: anybody could use the service. Give an API-key file, or "
                "listen on 127.0.0.1"
            )
        limits = config.limits
        self._config = config
        self._credentials = _server_credentials(config)
        self.metrics = GatewayMetrics()
        """What it counts."""
        self._metering = Metering(usage or MemoryUsageLog(), clock)
        self._quotas = Quotas(rates or MemoryRateStore(clock), config.quota, self.metrics, self._metering)
        self._ledger = store.ledger
        self._runs = Runs()
        self._fleet = Fleet(
            store, f"gateway-{secrets.token_hex(4)}", config.discovery_interval_s, _worker_security(config)
        )
        self._admission = Admission(self._fleet, max_waiting=limits.waiting_calls, max_wait_s=config.max_wait_s)
        repeats = Repeats(store, limits.request_memory_s, config.lock_ttl_s)
        self._sessions = Sessions(config, store, self._fleet, self._runs, repeats, clock, quotas=self._quotas)
        self._appends = Appends(
            self._sessions, self._fleet, self._admission, self._runs, repeats, limits, quotas=self._quotas
        )
        self._operations = Operations(self._sessions, self._fleet, self._runs, repeats, limits)
        self._answers = Answers(
            config, self._sessions, self._fleet, self._admission, self._runs, repeats, quotas=self._quotas
        )
        self.refresher: Refresher | None = None
        if config.refresh_tokens_per_s:
            rate = config.refresh_tokens_per_s
            self.refresher = Refresher(
                store, self._sessions, self._fleet, self._admission, tokens_per_s=rate, lock_ttl_s=config.lock_ttl_s
            )
        tokens = WebTokens(config.jwt) if config.jwt is not None else None
        self._reception = Reception(Authenticator(keys, tokens, clock), self._quotas, self.metrics)
        self._web = WebFront(
            self._reception,
            self._answers,
            self._sessions,
            self._fleet,
            limits,
            default_model=config.default_model,
            is_open=keys is None and config.jwt is None,
        )
        self._admin = AdminServicer(
            self._fleet,
            self._ledger,
            admission=self._admission,
            runs=self._runs,
            quotas=self._quotas,
            tag=self._sessions.tag,
            begin_drain=self.begin_drain,
            grace_s=self._config.grace_s,
        )
        self._health = GatewayHealth()
        self._servers: list[grpc.aio.Server] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._draining: asyncio.Task[None] | None = None
        self.failed_sweeps = 0
        self.failed_samples = 0
        self.health_address: str | None = None
        """Where the health-only port is, once started."""
        self.http_address: str | None = None
        """Where the HTTP API is, once started."""

    @property
    def fleet(self) -> Fleet:
        """The workers it is connected to."""
        return self._fleet

    def levels(self) -> GatewayLevels:
        """What it does at this moment. For the event loop it runs in."""
        return GatewayLevels(
            running_calls=len(self._runs),
            waiting_calls=self._admission.waiting,
            connected_workers=len(self._fleet.views()),
            draining=self._runs.draining,
            failed_sweeps=self.failed_sweeps,
            failed_looks=self._fleet.failed_looks,
            failed_over_calls=self._admission.failed_over,
            refreshed_tokens=self.refresher.done.tokens if self.refresher is not None else 0,
        )

    async def stats(self) -> admin_pb2.GetStatsResponse:
        """The service as this gateway sees it, as operators are told. For the event loop it runs in."""
        return await self._admin.report()

    async def start(self) -> str:
        """Listens, and begins to look for workers; gives the address. Health is SERVING once a worker is connected.

        Raises:
            ConfigError: a port is in use, or the address isn't this machine's.
        """
        for name in ("", *SERVICE_NAMES):
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        server = self._public_server()
        self._servers.append(server)
        address = _bind(server, self._config.host, self._config.port, "port", self._credentials)
        if self._config.health_port is not None:
            health_server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
            health_pb2_grpc.add_HealthServicer_to_server(self._health, health_server)
            self._servers.append(health_server)
            self.health_address = _bind(health_server, self._config.host, self._config.health_port, "health_port")
        for each in self._servers:
            await each.start()
        if self._config.http_port is not None:
            tls = self._config.tls
            context = server_context(PemFiles(tls.cert, tls.key, tls.client_ca)) if tls is not None else None
            self.http_address = await self._web.start(self._config.host, self._config.http_port, context)
            logger.info("http_started", extra={"address": self.http_address})
        self._fleet.start()
        self._tasks = [asyncio.create_task(each) for each in (self._report_health(), self._sweep(), self._meter())]
        if self.refresher is not None:
            self._tasks.append(asyncio.create_task(refresh_forever(self.refresher, REFRESH_INTERVAL_S)))
        logger.info("gateway_started", extra={"address": address, "tls": self._credentials is not None})
        if self._credentials is None and not _is_loopback(self._config.host):
            logger.warning("listening_without_tls", extra={"address": address})
        return address

    def begin_drain(self, grace_s: float) -> None:
        """Begins to drain in the background; see `drain`. A second call changes nothing."""
        if self._draining is None:
            # At once, so that no call slips in before the task runs.
            self._runs.draining = True
            self._draining = asyncio.create_task(self._drain(grace_s))

    async def drain(self, grace_s: float | None = None) -> None:
        """Takes no new work, reports NOT_SERVING, and waits until running calls have ended; those that still run
        after the grace are cancelled. The listener stays open: call `stop` to close it."""
        self.begin_drain(self._config.grace_s if grace_s is None else grace_s)
        if self._draining is not None:
            await asyncio.shield(self._draining)

    async def leave(self) -> None:
        """Drains, and hangs up, for one gateway of several: callers' next calls go over a new connection, and so to
        another gateway, while this one lets running ones end. Callers of the only one should hear `draining`: `drain`.
        """
        self.begin_drain(self._config.grace_s)
        # Health keeps a port of its own, if it has one. Streams that aren't calls of sessions are ended by `stop`.
        hang_up = asyncio.create_task(self._servers[0].stop(self._config.grace_s + STOP_GRACE_S), name="hang-up")
        self._tasks.append(hang_up)
        await self.drain()

    async def stop(self) -> None:
        """Ends everything. Calls that still run are cancelled: call `drain` before to let them end."""
        await self.drain(0.0) if self._draining is None else await self._cut_short()
        await end_tasks(self._tasks)
        await asyncio.gather(self._web.stop(), *(server.stop(STOP_GRACE_S) for server in self._servers))
        await self._fleet.aclose()

    async def _cut_short(self) -> None:
        if self._draining is not None and not self._draining.done():
            await self._runs.drain(0.0)
            await self._draining

    async def _drain(self, grace_s: float) -> None:
        logger.info("gateway_draining", extra={"grace_s": grace_s, "running_calls": len(self._runs)})
        await self._health.enter_graceful_shutdown()
        await self._runs.drain(grace_s)

    def _public_server(self) -> grpc.aio.Server:
        limits = self._config.limits
        options = [
            # A second gateway on the same port must be an error, not a silent share of the calls.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", limits.message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            # Clients may ping as often as every 10 s, also between calls.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            # Callers come by a new connection now and then, so that gateways which were added later get some too.
            ("grpc.max_connection_age_ms", MAX_CONNECTION_AGE_MS),
            # Whoever connects and says nothing, and whoever connects too often.
            ("grpc.server_handshake_timeout_ms", round(limits.header_s * 1000)),
            ("grpc.max_allowed_incoming_connections", limits.connections),
            ("grpc.max_concurrent_streams", limits.streams_per_connection),
        ]
        interceptor = ServiceInterceptor(self._reception, message_s=limits.upload_idle_s)
        server = grpc.aio.server(interceptors=[interceptor], options=options)
        sessions_pb2_grpc.add_SessionServiceServicer_to_server(
            SessionServicer(self._sessions, self._operations, self._appends, self._answers, limits), server
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(self._answers, self._fleet, self._config.default_model), server
        )
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self._admin, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._config.reflection:
            names = (*SERVICE_NAMES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
            reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
        return server

    async def _report_health(self) -> None:
        while True:
            version = self._fleet.version
            serving = health_pb2.HealthCheckResponse.SERVING
            status = serving if self._fleet.views() else health_pb2.HealthCheckResponse.NOT_SERVING
            for name in ("", *SERVICE_NAMES):
                await self._health.set(name, status)
            await self._fleet.changed_since(version)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._config.sweep_interval_s)
            try:
                await self._sessions.sweep()
            except Exception:
                # What wasn't swept now is swept later.
                self.failed_sweeps += 1
                logger.exception("sweep_failed", extra={"failed_sweeps": self.failed_sweeps})

    async def _meter(self) -> None:
        while True:
            await asyncio.sleep(self._config.usage_period_s)
            try:
                await self._metering.sample_stored(self._ledger, self._config.usage_period_s)
            except Exception:
                # A period without a record; the next one has its own.
                self.failed_samples += 1
                logger.exception("usage_sample_failed", extra={"failed_samples": self.failed_samples})


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _server_credentials(config: GatewayConfig) -> grpc.ServerCredentials | None:
    tls = config.tls
    return server_credentials(PemFiles(tls.cert, tls.key, tls.client_ca)) if tls is not None else None


def _worker_security(config: GatewayConfig) -> ChannelSecurity | None:
    """How workers are spoken to. The files are read at each connection, and now, to find a fault at the start."""
    tls = config.internal_tls
    if tls is None:
        return None
    files = PemFiles(tls.cert, tls.key, tls.ca)
    channel_credentials(files)
    return ChannelSecurity(files, tls.server_name)


def _bind(
    server: grpc.aio.Server, host: str, port: int, setting: str, credentials: grpc.ServerCredentials | None = None
) -> str:
    bracketed = f"[{host}]" if ":" in host else host
    wanted = f"{bracketed}:{port}"
    try:
        bound = server.add_insecure_port(wanted) if credentials is None else server.add_secure_port(wanted, credentials)
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise ConfigError(
            f"{setting}={port}: can't listen on {bracketed}:{port}. Most likely another process uses the port: "
            f"stop it, choose another {setting}, or give 0 to take a free one",
            field=setting,
        )
    return f"{bracketed}:{bound}"
