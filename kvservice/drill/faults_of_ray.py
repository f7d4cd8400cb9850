"""Ray loses its head: gcs, the head's raylet and Serve's controller, killed at once and started again later.

Calls of sessions don't pass through Ray, so nothing may change for them. Once the head is back it must do its work
again: a worker is killed then, and another one must come in its place.
"""

from __future__ import annotations

import asyncio

from kvservice.drill.deployment import Deployment
from kvservice.drill.faults import Fault
from kvservice.drill.processes import PROCESS
from kvservice.drill.ray_cluster import DrillRay
from kvservice.errors import Unavailable

AWAY_S = 5.0
"""Beyond the time that the calls take."""
REPLACED_S = 120.0
POLL_S = 0.2


def _ray(deployment: Deployment) -> DrillRay:
    assert deployment.ray is not None
    return deployment.ray


async def _kill_head(deployment: Deployment) -> None:
    _ray(deployment).kill_head()
    await asyncio.sleep(AWAY_S)


async def _start_head(deployment: Deployment) -> None:
    await _ray(deployment).start_head()


async def _kill_worker_and_head(deployment: Deployment) -> None:
    _ray(deployment).kill_head()
    _ray(deployment).kill_replica()
    await asyncio.sleep(AWAY_S)


async def _until_replaced(deployment: Deployment) -> None:
    """Starts the head, which must find out that a worker is gone and start another."""
    before = deployment.workers
    await _ray(deployment).start_head()
    loop = asyncio.get_running_loop()
    give_up = loop.time() + REPLACED_S
    while deployment.workers == before:
        if loop.time() > give_up:
            raise Unavailable("Ray has put no new worker in the place of the one that was killed", reason="ray")
        await asyncio.sleep(POLL_S)
        await deployment.until_whole(REPLACED_S)


RAY_FAULTS: tuple[Fault, ...] = (
    Fault("Ray head killed, and started again", PROCESS, _kill_head, _start_head, on_ray=True),
    Fault("Ray head killed, and a worker with it", PROCESS, _kill_worker_and_head, _until_replaced, on_ray=True),
)
