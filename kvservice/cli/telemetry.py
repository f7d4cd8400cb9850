"""Starts what a process says about itself: its metrics endpoint and its traces. Knows no metric and no span."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from kvservice import __version__
from kvservice.config.service import ServiceConfig
from kvservice.errors import KVServiceError
from kvservice.gateway.server import Gateway
from kvservice.telemetry.endpoint import MetricsEndpoint
from kvservice.telemetry.metrics import GatewayCollector, GatewayLevels, WorkerCollector
from kvservice.telemetry.page import AdminPage
from kvservice.telemetry.tracing import TRACING
from kvservice.types import WorkerStats
from kvservice.v1 import admin_pb2

if TYPE_CHECKING:
    from kvservice.worker.server import WorkerServer

logger = logging.getLogger(__name__)

READ_TIMEOUT_S = 10.0
"""An engine answers between two steps."""


def start_tracing(config: ServiceConfig, service: str, stack: contextlib.AsyncExitStack) -> None:
    """Begins to trace if that is wanted; what is left is sent when `stack` is closed."""
    telemetry = config.telemetry
    if telemetry.traces:
        TRACING.start(service, telemetry.traces, telemetry.trace_ratio)
        stack.push_async_callback(asyncio.to_thread, TRACING.stop)


def start_metrics(
    config: ServiceConfig,
    stack: contextlib.AsyncExitStack,
    *,
    gateway: Gateway | None = None,
    worker_id: str = "",
    worker: Callable[[], WorkerServer | None] | None = None,
) -> None:
    """Listens for Prometheus if that is wanted, until `stack` is closed. Call it in the event loop of the parts.

    Args:
        config: says where.
        stack: of the process.
        gateway: shown if given.
        worker_id: of the worker.
        worker: gives the worker once there is one; shown if given.
    """
    telemetry = config.telemetry
    if telemetry.metrics_port is None:
        return
    loop = asyncio.get_running_loop()
    endpoint = MetricsEndpoint(gateway.metrics.registry if gateway is not None else None)
    if gateway is not None:
        endpoint.add(GatewayCollector(_levels_reader(gateway, loop)))
        endpoint.show(AdminPage("gateway", _stats_of(gateway.stats, loop)))
    if worker is not None:
        endpoint.add(WorkerCollector(worker_id, _stats_reader(worker)))
        if gateway is None:
            endpoint.show(AdminPage("worker", _stats_of(_report_of(worker), loop)))
    endpoint.start(telemetry.metrics_host, telemetry.metrics_port)
    stack.push_async_callback(asyncio.to_thread, endpoint.close)


def _levels_reader(gateway: Gateway, loop: asyncio.AbstractEventLoop) -> Callable[[], GatewayLevels]:
    async def levels() -> GatewayLevels:
        return gateway.levels()

    return lambda: asyncio.run_coroutine_threadsafe(levels(), loop).result(READ_TIMEOUT_S)


def _stats_of(
    report: Callable[[], Awaitable[admin_pb2.GetStatsResponse]], loop: asyncio.AbstractEventLoop
) -> Callable[[], admin_pb2.GetStatsResponse | None]:
    async def reported() -> admin_pb2.GetStatsResponse:
        return await report()

    def read() -> admin_pb2.GetStatsResponse | None:
        if not loop.is_running():
            return None
        try:
            return asyncio.run_coroutine_threadsafe(reported(), loop).result(READ_TIMEOUT_S)
        except (KVServiceError, TimeoutError) as error:
            logger.warning("stats_missing", extra={"why": str(error)})
            return None

    return read


def _report_of(worker: Callable[[], WorkerServer | None]) -> Callable[[], Awaitable[admin_pb2.GetStatsResponse]]:
    async def report() -> admin_pb2.GetStatsResponse:
        server = worker()
        workers = [await server.report()] if server is not None else []
        return admin_pb2.GetStatsResponse(
            workers=workers,
            running_calls=sum(each.running_calls for each in workers),
            sessions=sum(each.resident_sessions for each in workers),
            version=__version__,
        )

    return report


def _stats_reader(worker: Callable[[], WorkerServer | None]) -> Callable[[], WorkerStats | None]:
    def read() -> WorkerStats | None:
        server = worker()
        try:
            return server.stats().result(READ_TIMEOUT_S) if server is not None else None
        except (KVServiceError, TimeoutError) as error:
            # It has stopped, or a step takes long: the other parts of the process are still shown.
            logger.warning("worker_stats_missing", extra={"why": str(error)})
            return None

    return read
