"""What Ray Serve imports in its own processes: how a replica's worker is wired, and the builder of an application.

applications: [{import_path: "kvservice.cli.ray_app:build", args: {...}}]

What differs from node to node comes from the environment of Ray's nodes: the URLs, the address that workers are reached
at, and the settings file with what a process says about itself.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from pydantic import SecretStr
from ray import serve

from kvservice.cli import compose, telemetry
from kvservice.cli.settings import (
    CONFIG_VARIABLE,
    REDIS_URL_VARIABLE,
    STATE_URL_VARIABLE,
    WORKER_HOST_VARIABLE,
    read_settings,
    service_config,
)
from kvservice.config.ray import RayDeployment
from kvservice.config.service import ServiceConfig
from kvservice.config.worker import WorkerConfig
from kvservice.errors import ConfigError
from kvservice.store import open_state_store
from kvservice.telemetry.logging import configure_logging
from kvservice.worker import ray_scaler, ray_serve
from kvservice.worker.server import WorkerServer

IMPORT_PATH = f"{__name__}:build"
SCALER_IMPORT_PATH = f"{__name__}:build_scaler"


@asynccontextmanager
async def open_worker(config: WorkerConfig) -> AsyncIterator[WorkerServer]:
    """A replica's worker. URLs come from the environment, so that no configuration holds a password.

    Raises:
        ConfigError: the environment names no state Redis, or a settings file that can't be used.
    """
    state_url = os.environ.get(STATE_URL_VARIABLE)
    if not state_url:
        raise ConfigError(f"no state Redis: set {STATE_URL_VARIABLE} in the environment of Ray's nodes")
    node = node_config(os.environ)
    config = config.model_copy(update=of_node(os.environ))
    configure_logging(node.log_level, json=node.telemetry.log_format != "text")
    async with AsyncExitStack() as stack:
        telemetry.start_tracing(node, "kvservice-worker", stack)
        store = await open_state_store(state_url, config.tenant_stored_bytes)
        stack.push_async_callback(store.aclose)
        worker = await compose.worker(config, store, stack)
        telemetry.start_metrics(node, stack, worker_id=config.worker_id, worker=lambda: worker)
        yield worker


def node_config(environment: Mapping[str, str]) -> ServiceConfig:
    """The settings file that the environment of a node names; without one, the defaults.

    Raises:
        ConfigError: it can't be read, or a setting is wrong.
    """
    path = environment.get(CONFIG_VARIABLE)
    settings = read_settings(Path(path) if path else None)
    # The gateway's need a secret that no worker has.
    settings.pop("gateway", None)
    return service_config(settings)


def of_node(environment: Mapping[str, str]) -> dict[str, object]:
    """What the environment of a node sets of a worker's settings."""
    found: dict[str, object] = {}
    if url := environment.get(REDIS_URL_VARIABLE):
        found["redis_url"] = SecretStr(url)
    if host := environment.get(WORKER_HOST_VARIABLE):
        found["host"] = host
    return found


def build(args: Mapping[str, object]) -> serve.Application:
    """The application of one model's workers, from the `args` of a Ray Serve configuration file.

    Ray Serve would make a pydantic model of them only if it saw its class here, and it doesn't look behind a deferred
    annotation.
    """
    return ray_serve.application(RayDeployment.model_validate(args), open_worker, {})


def build_scaler(args: Mapping[str, object]) -> serve.Application:
    """The application that takes workers away when load goes."""
    return ray_scaler.scaler_application(args)
