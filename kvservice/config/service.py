"""Settings of a whole service on one machine: what a `--config` file holds. Knows nothing of files or flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, SecretStr

from kvservice.config.gateway import GatewayConfig
from kvservice.config.ray import RayConfig, RayDeployment
from kvservice.config.worker import WorkerConfig

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogFormat = Literal["auto", "json", "text"]


class TelemetryConfig(BaseModel):
    """What a process says about itself, and to whom."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metrics_host: str = Field("127.0.0.1", min_length=1, description="Address of the Prometheus endpoint.")
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of the Prometheus endpoint; 0: a free one; unset: none. With `workers` their processes "
        "take the ports after it.",
    )
    traces: str = Field(
        "",
        pattern=r"^(|console|https?://.+)$",
        description="`console`, or an OTLP collector's URL (gRPC); empty: none.",
    )
    trace_ratio: float = Field(
        1.0, gt=0, le=1, description="Part of all traces that is kept; the same for every process of the service."
    )
    log_format: LogFormat = Field("auto", description="`json`, `text`, or `auto`: text on a terminal, else JSON.")


class ServiceConfig(BaseModel):
    """What `serve`, `gateway` and `worker` are told; each reads its part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gateway: GatewayConfig | None = Field(None, description="The gateway's own settings.")
    worker: WorkerConfig = Field(default_factory=lambda: WorkerConfig(), description="Settings of each worker.")
    workers: int = Field(0, ge=0, le=64, description="Worker processes; 0: one worker inside the process of `serve`.")
    ray: RayConfig | None = Field(None, description="Workers in Ray Serve replicas; unset: without Ray.")
    state_url: SecretStr | None = Field(
        None, description="The state Redis: sessions, repeats, leases. Unset: `serve` starts one of its own."
    )
    data_dir: Path | None = Field(
        None,
        description="Folder in which the state Redis that `serve` starts keeps sessions from start to start, and the "
        "service's secret. Unset: they end with the process, and `durable_tokens` is 0.",
    )
    redis_bytes: Annotated[ByteSize, Field(gt=0)] = Field(
        default=ByteSize(2**30), description="Memory of the kv Redis that `serve` starts when it is given no URL."
    )
    api_keys: Path | None = Field(None, description="File of hashed API keys. Unset: loopback only, one tenant.")
    log_level: LogLevel = Field("INFO", description="Least level of the service's log records.")
    telemetry: TelemetryConfig = Field(
        default_factory=lambda: TelemetryConfig(), description="Metrics, traces and the form of logs."
    )

    def ray_deployments(self) -> tuple[RayDeployment, ...]:
        """Those that `ray` names, or one of the service's own worker."""
        named = self.ray.deployments if self.ray is not None else ()
        return named or (RayDeployment(worker=self.worker, replicas=max(1, self.workers)),)
