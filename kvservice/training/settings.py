"""What a training run is told. Knows nothing of how it is done."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvservice.compression.sharing import SharingMode
from kvservice.config.recipes import POD_EXACT
from kvservice.types import GROUP_TOKENS, SINK_TOKENS

FIRST_DISTANT = SINK_TOKENS + POD_EXACT.window_tokens + GROUP_TOKENS
"""Tokens before this one have nothing distant to look at."""

Matrix = Literal["qkv", "o", "gate_up", "down"]


class TrainingSettings(BaseModel):
    """How to train. Two runs with equal settings, but for `steps`, are one run of which the one goes further."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: SharingMode
    steps: int = Field(ge=1)
    context: int = Field(2048, gt=FIRST_DISTANT)
    texts_per_step: int = Field(2, ge=1)
    method: Literal["lora", "full"] = "lora"
    rank: int = Field(16, ge=1, le=256)
    matrices: Annotated[tuple[Matrix, ...], Field(min_length=1)] = ("qkv", "o", "gate_up", "down")
    layers: Literal["followers", "all"] = "followers"
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(5, ge=1)
    loss_tokens: int = Field(512, ge=1)
    state_weight: float = Field(0.0, ge=0)
    recompute: bool = False
    seed: int = 7

    @property
    def identity(self) -> str:
        """All that a run that is gone on with must have in common with its beginning."""
        return self.model_dump_json(exclude={"steps", "recompute"})

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0 on: rises, stays, and falls over the last third of the steps."""
        rising = (step + 1) / self.warmup_steps
        falling = (self.steps - step) / max(1, self.steps // 3)
        return self.learning_rate * min(1.0, rising, falling)
