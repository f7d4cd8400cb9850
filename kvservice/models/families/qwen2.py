"""Qwen2 and Qwen2.5: queries, keys and values have a bias."""

from __future__ import annotations

from typing import Final

from kvservice.models.base import MODELS
from kvservice.models.families.decoder import AttentionBias, Decoder

# `sliding_window` may be anything: it counts only with `use_sliding_window`, which is refused.
QWEN2: Final = Decoder(bias=AttentionBias.QKV, absent={"num_key_value_heads": 32})

MODELS.register("Qwen2ForCausalLM")(QWEN2)
