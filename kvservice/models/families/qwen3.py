"""Qwen3: queries and keys are normed per head, and heads needn't fill the hidden size."""

from __future__ import annotations

from typing import Final

from kvservice.models.base import MODELS
from kvservice.models.families.decoder import AttentionBias, Decoder

# `sliding_window` may be anything: it counts only with `use_sliding_window`, which is refused.
QWEN3: Final = Decoder(bias=AttentionBias.CONFIG, qk_norm=True, absent={"num_key_value_heads": 32, "head_dim": 128})

MODELS.register("Qwen3ForCausalLM")(QWEN3)
