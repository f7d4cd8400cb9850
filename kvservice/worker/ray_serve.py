"""The worker as a Ray Serve deployment, and the applications of a fleet.

    application of a model ─► deployment ─► replicas: each a HostedWorker with an internal gRPC address of its own

Ray places, checks, restarts and scales. No token, and no call of a session, passes through it: gateways find a
replica's worker by its lease in the state Redis, like any other worker. Knows nothing of models: the caller gives what
opens one.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import ray
import yaml
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from kvservice.config.ray import RayConfig, RayDeployment
from kvservice.config.worker import WorkerConfig
from kvservice.errors import ConfigError, Unavailable
from kvservice.worker.hosting import HostedWorker
from kvservice.worker.ray_scaler import (
    APPLICATION_PREFIX,
    OPTIONS,
    SCALER_APPLICATION,
    scaler_application,
    scaler_arguments,
)
from kvservice.worker.scaling import RETIRING, Goals, MissMeter, report, target
from kvservice.worker.server import WorkerServer

logger = logging.getLogger(__name__)

OpenWorker = Callable[[WorkerConfig], AbstractAsyncContextManager[WorkerServer]]
"""A function at the top of a module: a replica's process finds it by its name."""

DEPLOYMENT = "Worker"
PUSH_INTERVAL_S = 10.0
"""`metrics_interval_s` of Ray Serve, which is not to be set: how often loads reach the policy. The variable that
is to take its place, `RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S`, is read nowhere in 2.60."""


class WorkerReplica:
    """What a replica runs. Ray Serve calls its methods; nobody else does."""

    def __init__(self, settings: Mapping[str, object], open_worker: OpenWorker) -> None:
        """Starts the worker; returns once it serves and is registered."""
        self._deployment = RayDeployment.model_validate(settings)
        replica = serve.get_replica_context().replica_id.unique_id
        self._worker_id = f"{self._deployment.name}-{replica}"
        worker = self._deployment.worker.model_copy(update={"worker_id": self._worker_id})
        self._misses = MissMeter(time.monotonic)
        self._retired_at: float | None = None
        self._worker = HostedWorker(partial(open_worker, worker))
        self.address = self._worker.start()

    async def check_health(self) -> None:
        """Raises unless the engine's loop advances; Ray Serve then starts the replica again."""
        # One that is retiring has to live until the policy has heard of it, though its worker may have stopped.
        if self._retired_at is None or time.monotonic() - self._retired_at > 2 * PUSH_INTERVAL_S + 1.0:
            await self._worker.check(self._deployment.health_check_timeout_s)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """See `scaling.report`."""
        if self._retired_at is not None:
            return {RETIRING: 1.0}
        stats = await self._worker.stats()
        return report(stats, self._misses.look(stats))

    async def stats(self) -> dict[str, float]:
        """A control call: the load, for operators and tests."""
        return report(await self._worker.stats())

    async def tell(self) -> tuple[str, dict[str, float]]:
        """A control call: the worker's id and its load."""
        return self._worker_id, {RETIRING: 1.0} if self._retired_at is not None else await self.stats()

    async def retire(self, worker_id: str) -> bool:
        """A control call to all replicas: the one of that worker drains, hands its sessions over, and is given up."""
        if worker_id != self._worker_id:
            return False
        if self._retired_at is None:
            self._retired_at = time.monotonic()
            self._worker.begin_drain()
        return True

    def __del__(self) -> None:
        """Drains. Ray Serve calls it when a replica is to stop, and kills the replica if it takes too long."""
        worker = getattr(self, "_worker", None)
        if worker is not None:
            worker.drain(self._deployment.stop_timeout_s)


class MemoryPolicy:
    """Ray Serve's autoscaling policy: adds workers by load, and forgets those that were retired.

    `scaling` has the arithmetic.
    """

    def __init__(self, occupancy: float, queue_s: float, miss_s: float) -> None:
        self._goals = Goals(occupancy, queue_s, miss_s)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas that Ray Serve should aim at, and the names of those that are being retired."""
        by_replica: dict[str, dict[str, float]] = {}
        for name, values in (context.aggregated_metrics or {}).items():
            for replica, value in values.items():
                by_replica.setdefault(replica.unique_id, {})[name] = value
        running = [replica.unique_id for replica in context.running_replicas]
        before = (context.policy_state or {}).get(RETIRING, [])
        wanted, retiring = target(by_replica, running, context.target_num_replicas, before, self._goals)
        return wanted, {RETIRING: retiring}


def application(
    deployment: RayDeployment, open_worker: OpenWorker, environment: Mapping[str, str]
) -> serve.Application:
    """The Ray Serve application of one model's workers.

    Args:
        deployment: how many, and of what.
        open_worker: makes a replica's worker.
        environment: variables of the replicas' processes. Whoever may ask the cluster sees them.
    """
    options = deployment_options(deployment)
    options["ray_actor_options"]["runtime_env"] = {"env_vars": dict(environment)}
    settings = deployment.model_dump(mode="json", exclude={"worker": {"redis_url", "worker_id"}})
    return serve.deployment(WorkerReplica).options(**options).bind(settings, open_worker)


def deployment_options(deployment: RayDeployment) -> dict[str, Any]:
    """Ray Serve's options of a deployment, in the words that its configuration files use too."""
    options: dict[str, Any] = {
        "name": DEPLOYMENT,
        "max_ongoing_requests": deployment.max_ongoing_requests,
        "health_check_period_s": deployment.health_check_period_s,
        "health_check_timeout_s": deployment.health_check_timeout_s,
        "graceful_shutdown_timeout_s": deployment.stop_timeout_s,
        "ray_actor_options": {"num_cpus": deployment.num_cpus, "num_gpus": deployment.num_gpus},
    }
    if deployment.resources:
        options["ray_actor_options"]["resources"] = dict(deployment.resources)
    scaling = deployment.autoscaling
    if scaling is None:
        options["num_replicas"] = deployment.replicas
        return options
    policy = AutoscalingPolicy(
        policy_function=f"{MemoryPolicy.__module__}:{MemoryPolicy.__name__}",
        policy_kwargs={"occupancy": scaling.occupancy, "queue_s": scaling.queue_s, "miss_s": scaling.miss_s},
    )
    options["autoscaling_config"] = AutoscalingConfig(
        min_replicas=scaling.min_replicas,
        max_replicas=scaling.max_replicas,
        upscale_delay_s=scaling.delay_s,
        # The target follows a worker that has gone already.
        downscale_delay_s=0.0,
        policy=policy,
    ).model_dump(exclude_unset=True)
    return options


def cluster_config(
    config: RayConfig, deployments: Sequence[RayDeployment], import_path: str, scaler_import_path: str
) -> str:
    """A Ray Serve configuration file for a cluster, as `serve build` would write it. It holds no secret.

    Args:
        config: of the whole.
        deployments: an application for each; and one that takes workers away, where any may be.
        import_path: of a function that takes a RayDeployment and gives an application.
        scaler_import_path: of a function that takes `scaler_arguments` and gives an application.
    """
    applications: list[dict[str, Any]] = [
        {
            "name": application_name(deployment),
            "import_path": import_path,
            # No proxy runs, so that none has to be told apart by its route.
            "route_prefix": None,
            "external_scaler_enabled": config.external_scaler_enabled,
            "args": deployment.model_dump(mode="json", exclude={"worker": {"redis_url", "worker_id"}}),
            "deployments": [deployment_options(deployment)],
        }
        for deployment in deployments
    ]
    if (scaled := scaler_arguments(deployments)) is not None:
        applications.append(
            {
                "name": SCALER_APPLICATION,
                "import_path": scaler_import_path,
                "route_prefix": None,
                "args": scaled,
                "deployments": [dict(OPTIONS)],
            }
        )
    return yaml.safe_dump({"proxy_location": "Disabled", "applications": applications}, sort_keys=False)


def application_name(deployment: RayDeployment) -> str:
    """What a deployment's application is called in Ray Serve."""
    return APPLICATION_PREFIX + deployment.name


class RayFleet:
    """The workers of one service on a Ray cluster. All methods block; call them from one thread at a time."""

    def __init__(self, config: RayConfig, deployments: Sequence[RayDeployment], open_worker: OpenWorker) -> None:
        self._config = config
        self._deployments = deployments
        self._open_worker = open_worker
        self._deployed: list[str] = []
        self._connected = False
        self._owns_cluster = False

    def start(self, environment: Mapping[str, str]) -> None:
        """Starts or joins the cluster, and deploys; returns when every application runs.

        Args:
            environment: variables of the replicas' processes.

        Raises:
            ConfigError: the cluster that was named can't be joined.
            Unavailable: a worker didn't start; its log, in Ray's folder of logs, says why.
        """
        self._owns_cluster = self._config.address is None
        self._connect(self._config.address)
        serve.start(proxy_location="Disabled")
        for deployment in self._deployments:
            name = application_name(deployment)
            self._deployed.append(name)
            try:
                serve.run(
                    application(deployment, self._open_worker, environment),
                    name=name,
                    route_prefix=None,
                    external_scaler_enabled=self._config.external_scaler_enabled,
                )
            except RuntimeError as error:
                raise Unavailable(f"the workers of {deployment.name!r} didn't start: {error}") from None
        if (scaled := scaler_arguments(self._deployments)) is not None:
            self._deployed.append(SCALER_APPLICATION)
            serve.run(scaler_application(scaled), name=SCALER_APPLICATION, route_prefix=None)

    def stop(self) -> None:
        """Takes down what was deployed, which drains it; and the cluster, if it was started here."""
        if not self._connected:
            return
        self._connected = False
        for name in reversed(self._deployed):
            serve.delete(name)
        if self._owns_cluster:
            serve.shutdown()
        ray.shutdown()

    def _connect(self, address: str | None) -> None:
        joins = address is not None
        try:
            ray.init(
                address,
                num_cpus=None if joins else max(os.cpu_count() or 1, self._cpus()),
                include_dashboard=None if joins else self._config.external_scaler_enabled,
                logging_level=logging.WARNING,
                log_to_driver=False,
                configure_logging=False,
            )
        except ConnectionError as error:
            raise ConfigError(f"ray.address={address!r}: no cluster there can be joined: {error}") from None
        self._connected = True

    def _cpus(self) -> int:
        """What the workers ask for: a machine is not refused for having fewer."""
        return int(sum(each.num_cpus * each.first_replicas for each in self._deployments)) + 1
