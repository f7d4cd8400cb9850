"""Settings of workers inside Ray Serve replicas. Knows nothing of Ray itself."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvservice.config.worker import WorkerConfig

STOP_MARGIN_S = 15.0
"""What a replica gets beyond the grace of its running calls. At the end of both Ray Serve kills it."""


class Autoscaling(BaseModel):
    """Between which numbers of workers, and by what load, workers are added and taken away."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(1, ge=1, description="fewest workers")
    max_replicas: int = Field(ge=1, description="most workers")
    occupancy: float = Field(
        0.8,
        gt=0,
        le=1,
        description="bytes of running calls over capacity, of device or host, that workers are added at",
    )
    queue_s: float = Field(2.0, gt=0, description="seconds of prefill in a worker's queue that workers are added at")
    miss_s: float = Field(
        0.2, gt=0, description="seconds of each second spent on computing KV again that workers are added at"
    )
    delay_s: float = Field(20.0, ge=0, description="how long the load must last")
    down_delay_s: float = Field(
        300.0, ge=0, description="how long one worker fewer must have sufficed before one is taken away"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} must be at least min_replicas={self.min_replicas}")
        return self


class RayDeployment(BaseModel):
    """The workers of one model: one Ray Serve application with one deployment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("worker", pattern=r"^[a-z][a-z0-9-]{0,31}$", description="unique; workers' ids begin with it")
    worker: WorkerConfig = Field(
        default_factory=lambda: WorkerConfig(),
        description="settings of each of its workers; its `worker_id` is not used",
    )
    replicas: int = Field(1, ge=1, le=1024, description="workers, unless they are scaled by load")
    autoscaling: Autoscaling | None = Field(None, description="scale workers by load; unset: their number stays")
    num_cpus: float = Field(1.0, ge=0, description="CPUs that Ray sets aside for a worker; a fraction is allowed")
    num_gpus: float = Field(0.0, ge=0, description="GPUs that Ray sets aside for a worker; a fraction is allowed")
    resources: dict[str, float] = Field(
        default_factory=dict, description="Ray's custom resources of a worker: they keep it to nodes that have them"
    )
    max_ongoing_requests: int = Field(
        100, ge=1, description="control calls that a replica takes at a time; calls of sessions never pass through Ray"
    )
    health_check_period_s: float = Field(10.0, gt=0, description="seconds between two checks that the engine advances")
    health_check_timeout_s: float = Field(30.0, gt=0, description="a worker whose engine takes longer is started again")

    @property
    def first_replicas(self) -> int:
        """How many workers there are at the start."""
        return self.autoscaling.min_replicas if self.autoscaling is not None else self.replicas

    @property
    def stop_timeout_s(self) -> float:
        """How long a replica may take to stop."""
        return self.worker.drain_grace_s + STOP_MARGIN_S


class RayConfig(BaseModel):
    """What `serve --ray` is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str | None = Field(
        None, description="a running cluster, `auto` for the one of this machine; unset: one is started, and stopped"
    )
    deployments: tuple[RayDeployment, ...] = Field(
        (),
        description="one for each model; unset: one, of the table `worker` and with as many workers as `workers` says",
    )
    external_scaler_enabled: bool = Field(
        False,
        description="numbers of workers are set from outside by Ray Serve's REST API; Ray Serve scales nothing itself",
    )
    start_timeout_s: float = Field(300.0, gt=0, description="how long a worker may take to load its model")

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [deployment.name for deployment in self.deployments]
        if len(set(names)) < len(names):
            raise ValueError(f"deployments: names must be unique, got {', '.join(names)}")
        if self.external_scaler_enabled and any(deployment.autoscaling for deployment in self.deployments):
            raise ValueError(
                "external_scaler_enabled: no deployment may have `autoscaling` then; take one of the two out"
            )
        return self
