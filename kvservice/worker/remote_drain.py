"""Drains a worker from beside it: for the hook that Kubernetes runs before it ends a pod. Knows nothing of engines."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from kvservice.config.identity import InternalTlsConfig
from kvservice.internal.tls import PemFiles, channel_credentials, server_name_options
from kvservice.internal.v1 import worker_pb2, worker_pb2_grpc
from kvservice.worker.server import SERVICE_NAME

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 5.0


async def drain_at(address: str, tls: InternalTlsConfig | None, grace_s: float | None, timeout_s: float) -> bool:
    """Drains the worker at `address`, and waits until it has stopped. False: no worker answers there.

    Args:
        address: of its internal service.
        tls: how to reach it; None: without.
        grace_s: how long its running calls may go on; None: as it is set.
        timeout_s: how long to wait for its end. It drains on after that.
    """
    async with _channel(address, tls) as channel:
        request = worker_pb2.DrainRequest()
        if grace_s is not None:
            request.grace.FromTimedelta(timedelta(seconds=grace_s))
        # Opened before the drain begins, so that its end can't be missed.
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
        try:
            response = await worker_pb2_grpc.WorkerServiceStub(channel).Drain(request, timeout=ANSWER_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            logger.warning("no_worker_to_drain", extra={"address": address, "code": error.code().name})
            return False
        logger.info("worker_draining", extra={"address": address, "running_calls": response.running_calls})
        try:
            async with asyncio.timeout(timeout_s):
                async for _ in watch:
                    pass
        except grpc.aio.AioRpcError:
            logger.info("worker_drained", extra={"address": address})
        except TimeoutError:
            logger.warning("worker_drains_on", extra={"address": address, "timeout_s": timeout_s})
        return True


def _channel(address: str, tls: InternalTlsConfig | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address)
    credentials = channel_credentials(PemFiles(tls.cert, tls.key, tls.ca))
    return grpc.aio.secure_channel(address, credentials, options=server_name_options(tls.server_name))
