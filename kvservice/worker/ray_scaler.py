"""Who takes workers away when load goes: a Ray Serve application beside the workers' own, on Ray's head. Imports Ray.

    every few seconds: ask the replicas for their load ─► `scaling.Descent` names one, or none ─► it is told to retire

Being an application, it is there wherever the workers were deployed, by this program or from a file, and Ray Serve
starts it again when it dies. It holds nothing but for how long load has been low. Knows nothing of workers' settings.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve

from kvservice.config.ray import Autoscaling, RayDeployment
from kvservice.telemetry.logging import configure_logging
from kvservice.worker.scaling import Descent, Goals

logger = logging.getLogger(__name__)

SCALER_APPLICATION = "kvservice_scaler"
"""No worker's application is called so: their names begin with the prefix below, and have no underscore."""
APPLICATION_PREFIX = "kvservice-"
"""Of the workers' applications; the name of their deployment follows."""

LOOK_S = 5.0
"""Between two looks at whether a worker may go."""
ASK_TIMEOUT_S = 10.0
"""How long a replica may take to tell its load."""
HEALTH_PERIOD_S = 10.0
HEAD = {"node:__internal_head__": 0.001}
"""Ray's own resource of its head. On a worker's node the scaler would keep the node from being given back."""
OPTIONS: Mapping[str, Any] = {
    "name": "Scaler",
    "num_replicas": 1,
    "health_check_period_s": HEALTH_PERIOD_S,
    "ray_actor_options": {"num_cpus": 0, "resources": HEAD},
}
"""Ray Serve's options of its deployment, in the words that configuration files use too."""


class Scaler:
    """Looks at the load of the workers, and has those retire that aren't needed. Blocks; one thread at a time."""

    def __init__(self, scaled: Mapping[str, Autoscaling]) -> None:
        self._descents = {
            name: Descent(
                Goals(each.occupancy, each.queue_s, each.miss_s), each.min_replicas, each.down_delay_s, time.monotonic
            )
            for name, each in scaled.items()
        }
        self.failed_looks = 0

    def look(self) -> None:
        """Takes a worker away where one fewer has carried the load for long enough."""
        for name, descent in self._descents.items():
            try:
                handle = serve.get_app_handle(APPLICATION_PREFIX + name)
                reports = dict(handle.broadcast("tell").results(timeout_s=ASK_TIMEOUT_S))
                if (worker_id := descent.look(reports)) is not None:
                    logger.info("worker_retires", extra={"worker_id": worker_id, "workers": len(reports)})
                    handle.broadcast("retire", worker_id).results(timeout_s=ASK_TIMEOUT_S)
            except Exception:
                # A replica may have died just now; the next look finds out.
                self.failed_looks += 1
                logger.exception("look_at_load_failed", extra={"failed_looks": self.failed_looks})


class ScalerReplica:
    """What the application's one replica runs. Ray Serve calls its methods."""

    def __init__(self, scaled: Mapping[str, Mapping[str, object]]) -> None:
        configure_logging("INFO", json=True)
        self._scaler = Scaler({name: Autoscaling.model_validate(each) for name, each in scaled.items()})
        self._stop = threading.Event()
        self._looks = 0
        # Calls into Ray Serve wait, which its own loop must not.
        self._thread = threading.Thread(target=self._run, name="scaler", daemon=True)
        self._thread.start()

    def check_health(self) -> None:
        """Raises if nobody looks any more; Ray Serve then starts the replica again."""
        if not self._thread.is_alive():
            raise RuntimeError("the scaler's thread has ended")

    def looks(self) -> tuple[int, int]:
        """A control call: how often it has looked, and how many workers' applications it couldn't ask."""
        return self._looks, self._scaler.failed_looks

    def __del__(self) -> None:
        """Ray Serve calls it when the replica is to stop."""
        if (stop := getattr(self, "_stop", None)) is not None:
            stop.set()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            self._scaler.look()
            self._looks += 1


def scaled_deployments(deployments: Sequence[RayDeployment]) -> dict[str, Autoscaling]:
    """Those that may shrink, by name."""
    found = {each.name: each.autoscaling for each in deployments if each.autoscaling is not None}
    return {name: scaling for name, scaling in found.items() if scaling.max_replicas > scaling.min_replicas}


def scaler_arguments(deployments: Sequence[RayDeployment]) -> dict[str, Any] | None:
    """The `args` of the application; None: nothing may shrink, so none is needed."""
    scaled = scaled_deployments(deployments)
    return {name: each.model_dump(mode="json") for name, each in scaled.items()} or None


def scaler_application(scaled: Mapping[str, Any]) -> serve.Application:
    """The Ray Serve application, from its `args`."""
    return serve.deployment(ScalerReplica).options(**OPTIONS).bind(dict(scaled))
