"""Settings of one engine."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class EngineConfig(BaseModel):
    """Budgets are bytes and whole tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kv_bytes: int = Field(512 << 20, gt=0, description="the device arena: all KV, indexes, recall slots and staging")
    host_bytes: int = Field(4 << 30, ge=0, description="bound of the host tier")
    prefill_chunk_tokens: int = Field(512, ge=64, le=8192, description="tokens of one sequence prefilled in a step")
    max_prefills: int = Field(2, ge=1, le=64, description="sequences that hold the prefill workspace at a time")
    max_batch: int = Field(32, ge=1, le=1024, description="calls admitted at a time")
