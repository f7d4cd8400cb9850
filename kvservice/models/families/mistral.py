"""Mistral without a sliding window, such as 7B v0.2 and v0.3."""

from __future__ import annotations

from typing import Final

from kvservice.models.base import MODELS
from kvservice.models.families.decoder import AttentionBias, Decoder

MISTRAL: Final = Decoder(
    bias=AttentionBias.NEVER,
    only={"sliding_window": None},
    # A config without the setting means the window of the first Mistral, and is refused.
    absent={"sliding_window": 4096, "num_key_value_heads": 8},
)

MODELS.register("MistralForCausalLM")(MISTRAL)
