"""Settings of one worker. Knows nothing of engines or sockets.

Sizes are integers of bytes or strings with a unit, binary or decimal: `512MiB`, `1.5GiB`, `3GB`.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ByteSize, ConfigDict, Field, SecretStr, field_validator, model_validator

from kvservice.config.identity import InternalTlsConfig
from kvservice.config.recipes import DEFAULT_RECIPE, RECIPES, SERVED_RECIPES

PositiveBytes = Annotated[ByteSize, Field(gt=0)]
"""A size of at least one byte: an integer, or a number with a unit."""


KvCodec = Literal["raw", "zstd", "values8", "values4"]
KV_CODECS: tuple[str, ...] = get_args(KvCodec)


class WorkerConfig(BaseModel):
    """What `kvservice worker` and the workers inside `serve` are told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    worker_id: str = Field(
        default_factory=lambda: f"worker-{secrets.token_hex(4)}",
        min_length=1,
        description="name in the store, unique in the fleet; unset: a random one",
    )
    model: str = Field("smollm2-135m", min_length=1, description="a fetched model's name, or a model folder")
    recipe: str = Field(DEFAULT_RECIPE, description="recipe of sessions that name none")
    kv_bytes: PositiveBytes = Field(
        default=ByteSize(512 * 2**20), description="all device memory but weights and activations"
    )
    host_bytes: ByteSize = Field(default=ByteSize(4 * 2**30), ge=0, description="most bytes of the host tier")
    step_tokens: int = Field(512, ge=64, le=8192, description="tokens of a step: decoding first, then prefill")
    max_prefills: int = Field(16, ge=1, le=64, description="sequences that may prefill at the same time")
    max_batch: int = Field(32, ge=1, le=1024, description="calls admitted at a time")
    threads: int | None = Field(None, ge=1, description="CPU threads of the engine; unset: one for each core")
    deterministic: bool = Field(
        False, description="no bit of a result depends on batch, chunking, swap or resume; slower"
    )
    host_link_bytes_per_s: PositiveBytes | None = Field(
        None, description="simulation, for measuring: KV comes from host memory no faster than this; unset: no limit"
    )
    sharing_map: Path | None = Field(
        None, description="which layers share distant keys, of `calibrate pod`; unset: recipes that share are refused"
    )
    sharing: Literal["score", "key"] = Field(
        "score", description="what a layer without distant keys scores by: its anchor's queries, or its own"
    )
    adapter: Path | None = Field(
        None,
        description="trained changes of the weights for that map, of `adapt pod`; recipes that don't share are refused",
    )
    skip_above: float | None = Field(
        None, gt=0, le=1, description="such a layer leaves distant tokens out where what is near has this share"
    )
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="of weights and KV")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where the engine computes")
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; without tls only loopback")
    port: int = Field(0, ge=0, le=65535, description="port to listen on; 0: any free one")
    tls: InternalTlsConfig | None = Field(None, description="mutual TLS with the gateways; unset: none")
    lease_ttl_s: float = Field(10.0, gt=0, le=3600, description="a worker that hasn't renewed for so long is gone")
    drain_grace_s: float = Field(30.0, ge=0, description="how long running calls may go on when the worker drains")
    stream_queue_messages: int = Field(
        1024, ge=8, description="messages that wait for a slow gateway before its stream is ended"
    )
    redis_url: SecretStr | None = Field(None, description="the kv Redis; unset: KV goes no further than host memory")
    kv_keys: Path | None = Field(
        None,
        description="file of keys to seal stored KV with, mode 0600; the same for all workers; unset: it isn't sealed",
    )
    kv_ttl_s: float = Field(
        3600.0, ge=60, description="stored KV that nobody has used or renewed for so long is gone; workers renew theirs"
    )
    kv_codec: KvCodec = Field(
        "raw", description="how KV is stored; with values8 and values4 a session that comes back answers a little else"
    )
    scrub_interval_s: float = Field(
        60.0, gt=0, description="between two rounds that compare the ledger with what the kv Redis holds"
    )
    tenant_stored_bytes: PositiveBytes = Field(
        default=ByteSize(64 * 2**30), description="most bytes in the kv Redis of a tenant without a quota of its own"
    )

    @field_validator("recipe")
    @classmethod
    def _recipe_is_served(cls, name: str) -> str:
        if name not in SERVED_RECIPES:
            raise ValueError(f"recipe {name!r} is not served: choose one of {', '.join(SERVED_RECIPES)}")
        return name

    @model_validator(mode="after")
    def _stores_exactly_what_it_promises(self) -> WorkerConfig:
        if self.deterministic and self.kv_codec in ("values8", "values4"):
            raise ValueError(f"kv_codec {self.kv_codec!r} loses bits, and deterministic promises all: use raw or zstd")
        return self

    @model_validator(mode="after")
    def _has_a_map_to_share_by(self) -> WorkerConfig:
        if self.sharing_map is None and RECIPES[self.recipe].shares_keys:
            raise ValueError(
                f"recipe {self.recipe!r} shares distant keys between layers: name a map of which (--map), made by "
                "`kvservice calibrate pod`"
            )
        return self

    @model_validator(mode="after")
    def _adapts_what_it_serves(self) -> WorkerConfig:
        if self.adapter is None:
            return self
        if self.sharing_map is None:
            raise ValueError("adapter without a map: name the map that it was trained with (--map)")
        if not RECIPES[self.recipe].shares_keys:
            raise ValueError(
                f"recipe {self.recipe!r} with an adapter: it changes the model's weights for all sessions of a worker, "
                "and serves only recipes that share distant keys: choose pod or pod-exact (--recipe)"
            )
        return self
