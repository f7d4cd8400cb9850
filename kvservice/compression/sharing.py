"""The sharing plan: which (layer, KV head)s attend to whose distant keys, and how. Made of a map when a worker starts.

Ma et al., "Compressing KV Cache for Long-Context LLM Inference with Inter-Layer Attention Similarity" (PoD),
arXiv:2412.02252, stages 2 and 3. Torch-free. Knows nothing of where keys lie.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from kvservice.compression.layer_groups import LayerGroups
from kvservice.errors import ConfigError
from kvservice.types import ModelShape


class SharingMode(Enum):
    """What a follower scores distant tokens by."""

    SCORE = "score"
    """Its anchor's queries and keys: its anchor's weights, with its own values."""
    KEY = "key"
    """Its own queries and its anchor's keys."""


@dataclass(frozen=True, slots=True)
class SharingPlan:
    """How distant keys are shared.

    A *cell* is a (layer, KV head). One that isn't its own anchor is a *follower*.

    Attributes:
        groups: who is whose anchor.
        mode: what followers score by.
        skip_above: a follower leaves the distant tokens of a query head out where what is near has at least this share
            of its attention; None: never.

    Raises:
        ConfigError: `skip_above` isn't a share, or isn't known before a follower has scored.
    """

    groups: LayerGroups
    mode: SharingMode = SharingMode.SCORE
    skip_above: float | None = None

    def __post_init__(self) -> None:
        if self.skip_above is None:
            return
        if not 0 < self.skip_above <= 1:
            raise ConfigError(f"skip_above={self.skip_above}: must be above 0 and at most 1")
        if self.mode is not SharingMode.SCORE:
            raise ConfigError(
                f"skip_above with sharing {self.mode.value!r}: the share of what is near is known beforehand only when "
                f"weights are the anchor's; use {SharingMode.SCORE.value!r}"
            )

    @property
    def num_followers(self) -> int:
        """Cells that store no distant keys."""
        return self.groups.num_cells - self.groups.num_groups


def shape_under(plan: SharingPlan, shape: ModelShape) -> ModelShape:
    """A model's shape as byte arithmetic needs it where keys are shared by `plan`.

    Raises:
        ConfigError: the plan is for another number of layers or KV heads.
    """
    groups = plan.groups
    if (groups.num_layers, groups.num_kv_heads) != (shape.num_layers, shape.num_kv_heads):
        raise ConfigError(
            f"the map is for {groups.num_layers} layers of {groups.num_kv_heads} KV heads, the model has "
            f"{shape.num_layers} of {shape.num_kv_heads}",
            reason="map_other_model",
        )
    return replace(shape, num_followers=plan.num_followers)
