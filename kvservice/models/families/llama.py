"""Llama 1 to 3 and what is shaped like it, such as SmolLM2. Llama 3.1 and later scale RoPE, which is refused."""

from __future__ import annotations

from typing import Final

from kvservice.models.base import MODELS
from kvservice.models.families.decoder import AttentionBias, Decoder

LLAMA: Final = Decoder(bias=AttentionBias.CONFIG, only={"sliding_window": None})

MODELS.register("LlamaForCausalLM")(LLAMA)
