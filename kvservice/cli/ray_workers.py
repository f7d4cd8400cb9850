"""`kvservice ray`: the workers of a service inside Ray Serve replicas, from start to end. Imports Ray.

A process of its own even under `serve --ray`: Ray forks, and a process that serves gRPC must not. And a gateway needs
no Ray.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from kvservice.cli.ray_app import IMPORT_PATH, SCALER_IMPORT_PATH, open_worker
from kvservice.cli.settings import REDIS_URL_VARIABLE, STATE_URL_VARIABLE
from kvservice.config.ray import RayConfig
from kvservice.config.service import ServiceConfig
from kvservice.errors import ConfigError
from kvservice.worker.ray_serve import RayFleet, cluster_config

SIGNAL_LOOK_S = 1.0
"""Python runs a signal's handler when its main thread comes by."""


def run_ray(config: ServiceConfig, announce: Callable[[str], None], *, stop_with_stdin: bool) -> int:
    """Starts or joins a cluster and runs the workers on it until a signal; the exit code. Blocks, in the main thread.

    Raises:
        ConfigError: no state Redis is named, or the cluster can't be joined.
        Unavailable: a worker didn't start.
    """
    if config.state_url is None:
        raise ConfigError(f"no state Redis: give --state-url, or set {STATE_URL_VARIABLE}")
    ray = config.ray or RayConfig()
    fleet = RayFleet(ray, config.ray_deployments(), open_worker)
    stop = threading.Event()
    try:
        fleet.start(_environment(config))

        def end(_number: int, _frame: FrameType | None) -> None:
            stop.set()

        # Ray has set handlers of its own, which end the process without a drain.
        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        if stop_with_stdin:
            threading.Thread(target=_follow_stdin, args=(stop,), name="stdin", daemon=True).start()
        announce("ray")
        while not stop.wait(SIGNAL_LOOK_S):
            pass
    finally:
        fleet.stop()
    return 0


def serve_config(config: ServiceConfig) -> str:
    """See `cluster_config`."""
    return cluster_config(config.ray or RayConfig(), config.ray_deployments(), IMPORT_PATH, SCALER_IMPORT_PATH)


def _follow_stdin(stop: threading.Event) -> None:
    # Unbuffered: the lock of a buffered read would stop the interpreter from ending.
    while os.read(0, 4096):
        pass
    stop.set()


def _environment(config: ServiceConfig) -> dict[str, str]:
    """What the replicas find in their environment."""
    urls = {STATE_URL_VARIABLE: config.state_url, REDIS_URL_VARIABLE: config.worker.redis_url}
    found = {name: url.get_secret_value() for name, url in urls.items() if url is not None}
    # Read when torch is first imported; see cli.main.
    return found | {name: os.environ[name] for name in ("GOMP_SPINCOUNT",) if name in os.environ}
