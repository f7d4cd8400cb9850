"""Settings of the gateway. Knows nothing of gRPC."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretBytes, model_validator

from kvservice.config.identity import InternalTlsConfig, JwtConfig, TlsConfig
from kvservice.config.limits import Limits
from kvservice.config.recipes import SERVED_RECIPES


class QuotaConfig(BaseModel):
    """What each tenant may use that has no quota of its own (SetQuota). Unset: no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: float | None = Field(None, gt=0, description="Calls of any kind; a minute's may come at once.")
    tokens_per_minute: float | None = Field(
        None, gt=0, description="Tokens read and generated; a call begins while some are left, and is paid at its end."
    )
    concurrent_calls: int | None = Field(None, ge=1, description="Appends and Generates at a time.")
    document_tokens: int | None = Field(
        None, ge=1, description="Tokens of one Append, or of the document of a Generate without a session."
    )
    sessions: int | None = Field(None, ge=1, description="Open sessions; never more than `limits.sessions_per_tenant`.")
    device_bytes: int | None = Field(None, ge=1, description="KV of its sessions on the device of each worker.")
    host_bytes: int | None = Field(None, ge=1, description="KV of its sessions in the host memory of each worker.")
    weight: float = Field(
        1.0, gt=0, le=1000, description="Share of the workers' time, against that of other tenants that ask for it too."
    )


class GatewayConfig(BaseModel):
    """What `serve` and `gateway` are told. A port of 0 takes a free one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    secret: SecretBytes = Field(
        description="16 to 64 bytes; tenants' names are hidden behind it in stored keys. The same for every gateway of "
        "one service and from start to start, else stored KV is not found again, and is computed anew."
    )
    host: str = Field("127.0.0.1", description="Address to listen on; without API keys only a loopback address.")
    port: int = Field(50051, ge=0, le=65535, description="Port of the public API; 0: a free one.")
    health_port: int | None = Field(
        None, ge=0, le=65535, description="Second port that serves grpc.health.v1 only; 0: a free one; unset: none."
    )
    http_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of the OpenAI-compatible HTTP API, with the same keys and TLS; 0: a free one; unset: none.",
    )
    tls: TlsConfig | None = Field(None, description="TLS of the public API; unset: none. The health port has none.")
    internal_tls: InternalTlsConfig | None = Field(None, description="Mutual TLS to the workers; unset: none.")
    jwt: JwtConfig | None = Field(None, description="JSON web tokens that are taken for API keys; unset: none.")
    reflection: bool = Field(True, description="Serve gRPC reflection. Needs a key where keys are in use.")
    default_model: str = Field("", description="Model of a session created without one; empty: the only one there is.")
    default_recipe: str = Field("", description="Recipe of a session created without one; empty: the model's default.")
    grace_s: float = Field(30.0, ge=0, description="Seconds that running calls have to end in when the service drains.")
    max_wait_s: float = Field(30.0, gt=0, description="Longest wait of a call for room on a worker, in seconds.")
    discovery_interval_s: float = Field(1.0, gt=0, description="Seconds between two looks at the workers' leases.")
    sweep_interval_s: float = Field(30.0, gt=0, description="Seconds between two sweeps for expired sessions.")
    usage_period_s: float = Field(
        60.0, gt=0, description="Seconds between two records of what tenants have stored; the same for every gateway."
    )
    refresh_tokens_per_s: float = Field(
        0.0,
        ge=0,
        description="Tokens a second that this gateway has computed again of sessions whose stored KV no worker can "
        "read any more, after a change of model or layout; 0: they are at their next call.",
    )
    lock_ttl_s: float = Field(
        8.0, gt=0, description="A session is free again this many seconds after the gateway that changed it was lost."
    )
    limits: Limits = Field(default_factory=Limits, description="Limits of the public API.")
    quota: QuotaConfig = Field(
        default_factory=lambda: QuotaConfig(), description="What each tenant may use that has no quota of its own."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 16 <= len(self.secret.get_secret_value()) <= 64:
            raise ValueError(f"secret: {len(self.secret.get_secret_value())} bytes; it must be 16 to 64")
        if self.default_recipe and self.default_recipe not in SERVED_RECIPES:
            raise ValueError(f"default_recipe={self.default_recipe!r}: served are {', '.join(SERVED_RECIPES)}")
        if not self.limits.min_ttl_s <= self.limits.default_ttl_s <= self.limits.max_ttl_s:
            raise ValueError("limits: default_ttl_s must lie between min_ttl_s and max_ttl_s")
        return self
