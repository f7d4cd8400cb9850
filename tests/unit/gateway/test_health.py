from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvservice.gateway.health import ALIVE
from tests.unit.gateway.conftest import running

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_gateway_lives_while_it_drains_but_serves_no_more() -> None:
    async with running(health_port=0) as service, grpc.aio.insecure_channel(service.gateway.health_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def status(name: str) -> int:
            return (await health.Check(health_pb2.HealthCheckRequest(service=name))).status

        assert (await status(""), await status(ALIVE)) == (SERVING, SERVING)
        await service.gateway.drain(0.0)
        # To start it again would end the drain and bring nothing back.
        assert (await status(""), await status(ALIVE)) == (NOT_SERVING, SERVING)
