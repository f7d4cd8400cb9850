"""`kvservice drain-worker`: what runs before a worker's pod ends. Knows nothing of sessions."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer

from kvservice.cli.output import hint
from kvservice.cli.settings import CONFIG_VARIABLE, WORKER_HOST_VARIABLE, read_settings, service_config
from kvservice.config.ray import STOP_MARGIN_S
from kvservice.errors import ConfigError


def drain_worker(
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help=f"The service's settings file; or set {CONFIG_VARIABLE}."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT",
            help=f"The worker. Unset: {WORKER_HOST_VARIABLE}, and the settings' port of workers.",
        ),
    ] = None,
    grace_s: Annotated[
        float | None, typer.Option("--grace-s", min=0, help="Seconds for running calls. Unset: as the worker is set.")
    ] = None,
) -> None:
    """Drain one worker, reached directly, and wait for its end. Needs the certificate of a gateway or worker.

    Where no worker answers there is nothing to drain, and the exit code is 0 too.
    """
    from kvservice.worker.remote_drain import drain_at

    path = config or (Path(named) if (named := os.environ.get(CONFIG_VARIABLE)) else None)
    settings = read_settings(path)
    settings.pop("gateway", None)
    # Those of a fleet share their port and their certificates.
    worker = service_config(settings).ray_deployments()[0].worker
    host = os.environ.get(WORKER_HOST_VARIABLE)
    if address is None and (not host or not worker.port):
        raise ConfigError(
            f"which worker? Give --address, or set {WORKER_HOST_VARIABLE} and a `port` in the settings' table `worker`"
        )
    where = address or f"{f'[{host}]' if ':' in str(host) else host}:{worker.port}"
    timeout_s = (worker.drain_grace_s if grace_s is None else grace_s) + STOP_MARGIN_S
    found = asyncio.run(drain_at(where, worker.tls, grace_s, timeout_s))
    hint(f"the worker at {where} has drained" if found else f"no worker answers at {where}: nothing to drain")
