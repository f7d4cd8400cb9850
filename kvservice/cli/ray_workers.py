"""Workers in Ray Serve replicas, for `serve --ray`. Imports Ray, so it is imported only when asked for."""

from __future__ import annotations

import asyncio
import os

from kvservice.cli.ray_app import IMPORT_PATH, open_worker
from kvservice.cli.settings import REDIS_URL_VARIABLE, STATE_URL_VARIABLE
from kvservice.config.ray import RayConfig, RayDeployment
from kvservice.config.service import ServiceConfig
from kvservice.errors import Unavailable
from kvservice.worker.ray_serve import RayFleet, cluster_config


class RayWorkers:
    """The replicas of one service. Ray starts again those that end, so none is ever missed for long."""

    def __init__(self, config: ServiceConfig, ray: RayConfig) -> None:
        deployments = ray_deployments(config, ray)
        self.num_workers = sum(deployment.first_replicas for deployment in deployments)
        self._config = config
        self._start_timeout_s = ray.start_timeout_s
        self._fleet = RayFleet(ray, deployments, open_worker)

    async def start(self) -> None:
        """Starts or joins the cluster, and deploys. Ready when it returns."""
        start = asyncio.to_thread(self._fleet.start, _environment(self._config))
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await start
        except TimeoutError:
            raise Unavailable(f"the workers on Ray were not ready within {self._start_timeout_s:g} s") from None

    async def ended(self, num_workers: int) -> int:
        """Never returns: Ray Serve starts workers again."""
        del num_workers
        await asyncio.Event().wait()
        return 0

    async def stop(self) -> None:
        """Drains the replicas, and takes them down."""
        await asyncio.to_thread(self._fleet.stop)


def ray_deployments(config: ServiceConfig, ray: RayConfig) -> tuple[RayDeployment, ...]:
    """Those that the settings name, or one of the service's own worker."""
    return ray.deployments or (RayDeployment(worker=config.worker, replicas=max(1, config.workers)),)


def serve_config(config: ServiceConfig, ray: RayConfig) -> str:
    """See `cluster_config`."""
    return cluster_config(ray, ray_deployments(config, ray), IMPORT_PATH)


def _environment(config: ServiceConfig) -> dict[str, str]:
    """What the replicas find in their environment."""
    urls = {STATE_URL_VARIABLE: config.state_url, REDIS_URL_VARIABLE: config.worker.redis_url}
    found = {name: url.get_secret_value() for name, url in urls.items() if url is not None}
    # Read when torch is first imported; see cli.main.
    return found | {name: os.environ[name] for name in ("GOMP_SPINCOUNT",) if name in os.environ}
