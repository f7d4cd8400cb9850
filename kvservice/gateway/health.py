"""What a gateway says of its health. Knows nothing of workers: `server` tells it what is served.

""  and the names of the services   SERVING while calls are answered: for load balancers, and for readiness
`alive`                             SERVING as long as the event loop comes by, also without a worker and while
                                    it drains: for liveness. To start a gateway again brings no worker back
"""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]
from grpc_health.v1.health import aio as aio_health  # type: ignore[import-untyped]

ALIVE = "alive"


class GatewayHealth(aio_health.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1, and under the name `alive` whether the process lives."""

    async def Check(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse],
    ) -> health_pb2.HealthCheckResponse:
        """See health.proto."""
        if request.service == ALIVE:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        return await super().Check(request, context)
