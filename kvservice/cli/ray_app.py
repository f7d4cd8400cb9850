"""What Ray Serve imports in its own processes: how a replica's worker is wired, and the builder of an application.

applications: [{import_path: "kvservice.cli.ray_app:build", args: {...}}]
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from pydantic import SecretStr
from ray import serve

from kvservice.cli import compose
from kvservice.cli.settings import REDIS_URL_VARIABLE, STATE_URL_VARIABLE
from kvservice.config.ray import RayDeployment
from kvservice.config.worker import WorkerConfig
from kvservice.errors import ConfigError
from kvservice.store import open_state_store
from kvservice.telemetry.logging import configure_logging
from kvservice.worker import ray_serve
from kvservice.worker.server import WorkerServer

IMPORT_PATH = f"{__name__}:build"


@asynccontextmanager
async def open_worker(config: WorkerConfig) -> AsyncIterator[WorkerServer]:
    """A replica's worker. URLs come from the environment, so that no configuration holds a password.

    Raises:
        ConfigError: the environment names no state Redis.
    """
    state_url = os.environ.get(STATE_URL_VARIABLE)
    if not state_url:
        raise ConfigError(f"no state Redis: set {STATE_URL_VARIABLE} in the environment of Ray's nodes")
    if redis_url := os.environ.get(REDIS_URL_VARIABLE):
        config = config.model_copy(update={"redis_url": SecretStr(redis_url)})
    configure_logging("INFO", json=True)
    async with AsyncExitStack() as stack:
        store = await open_state_store(state_url, config.tenant_stored_bytes)
        stack.push_async_callback(store.aclose)
        yield await compose.worker(config, store, stack)


def build(deployment: RayDeployment) -> serve.Application:
    """The application of one model's workers, from the `args` of a Ray Serve configuration file."""
    return ray_serve.application(deployment, open_worker, {})
