"""Random checkpoints of every family, written by transformers itself."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from kvservice.models.tiny import write_tiny_tokenizer

FIGURES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
}
FAMILIES: dict[str, dict[str, object]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 24},
    "Mistral": {"head_dim": 40, "sliding_window": None},
}


def write_checkpoint(folder: Path, family: str, **changes: object) -> transformers.PreTrainedModel:
    """Writes a random model of the family as transformers does, and returns it."""
    config = getattr(transformers, f"{family}Config")(**{**FIGURES, **FAMILIES[family], **changes})
    oracle = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            # transformers starts norms at one and biases at zero, where a forgotten one wouldn't show.
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * values)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * values)
            else:
                parameter.copy_(values / parameter.shape[-1] ** 0.5)
    oracle.save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return oracle
