"""Settings of one engine."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class EngineConfig(BaseModel):
    """Budgets are bytes and whole tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kv_bytes: int = Field(512 << 20, gt=0, description="the device arena: all KV, indexes, recall slots and staging")
    host_bytes: int = Field(4 << 30, ge=0, description="bound of the host tier")
    step_tokens: int = Field(512, ge=64, le=8192, description="tokens of one step: decoding first, then prefill")
    max_prefills: int = Field(16, ge=1, le=64, description="sequences that hold the prefill workspace at a time")
    max_batch: int = Field(32, ge=1, le=1024, description="answers under way at a time")
    deterministic: bool = Field(
        False, description="no bit of a result depends on batch, chunking, swap or resume; the model must be able to"
    )
    max_decode_stretch: float = Field(
        1.25,
        gt=1.0,
        description="a step that decodes may take this many times as long while one other sequence waits to be read; "
        "longer while more wait",
    )
    step_host_bytes: int = Field(
        64 << 20,
        gt=0,
        description="host KV that sequences attending to all of theirs may read in a step in which others decode too",
    )
    host_link_bytes_per_s: int | None = Field(
        None, gt=0, description="simulation: KV comes from host memory no faster than this; unset: as fast as it can"
    )
