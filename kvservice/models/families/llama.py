"""How Llama checkpoints name their figures and tensors. Knows nothing of files.

What the runner doesn't do is refused here by name: a model that ran without it would answer wrongly in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import torch

from kvservice.errors import ModelError
from kvservice.models.base import MODELS, LayerWeights, ModelIdentity, ModelSpec, ModelWeights, TensorSource
from kvservice.types import ModelShape

_ONLY: Final[Mapping[str, object]] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "use_qk_norm": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
"""Settings of config.json, and the one value of each that the runner does. An absent setting has this value."""


class LlamaFamily:
    """`LlamaForCausalLM`: RMS norms, rotated halves of heads, grouped queries, SiLU-gated MLP."""

    def spec(self, config: Mapping[str, object], identity: ModelIdentity, dtype: torch.dtype) -> ModelSpec:
        """See `ModelFamily`. Reads the layouts of transformers 4 and 5."""
        for key, allowed in _ONLY.items():
            _refuse_other(key, config.get(key, allowed), allowed)
        hidden_size = _count(config, "hidden_size")
        num_heads = _count(config, "num_attention_heads")
        shape = ModelShape(
            num_layers=_count(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_count(config, "num_key_value_heads", num_heads),
            head_dim=_count(config, "head_dim", hidden_size // num_heads),
            hidden_size=hidden_size,
            intermediate_size=_count(config, "intermediate_size"),
            vocab_size=_count(config, "vocab_size"),
            max_positions=_count(config, "max_position_embeddings"),
            dtype_bytes=dtype.itemsize,
        )
        if num_heads % shape.num_kv_heads:
            raise _damaged(f"num_attention_heads={num_heads} isn't a multiple of {shape.num_kv_heads} key-value heads")
        if shape.head_dim % 2:
            raise _damaged(f"head_dim={shape.head_dim} is odd, its halves can't be rotated")
        return ModelSpec(
            name=identity.name,
            shape=shape,
            rope_theta=_rope_theta(config),
            norm_eps=_positive(config, "rms_norm_eps", 1e-6),
            eos_token_ids=identity.eos_token_ids,
            origin=identity.origin,
            digest=identity.digest,
            tie_embeddings=config.get("tie_word_embeddings", False) is True,
        )

    def tensor_shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        """See `ModelFamily`."""
        shape = spec.shape
        hidden, inner = shape.hidden_size, shape.intermediate_size
        q_rows, kv_rows = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (q_rows, hidden),
            "self_attn.k_proj": (kv_rows, hidden),
            "self_attn.v_proj": (kv_rows, hidden),
            "self_attn.o_proj": (hidden, q_rows),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (shape.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not spec.tie_embeddings:
            shapes["lm_head.weight"] = (shape.vocab_size, hidden)
        for index in range(shape.num_layers):
            shapes |= {f"model.layers.{index}.{name}.weight": size for name, size in layer.items()}
        return shapes

    def ignores(self, name: str, spec: ModelSpec) -> bool:
        """See `ModelFamily`. Old checkpoints keep RoPE's frequencies; tied ones may keep the embedding twice."""
        return name.endswith("rotary_emb.inv_freq") or (spec.tie_embeddings and name == "lm_head.weight")

    def weights(self, spec: ModelSpec, source: TensorSource) -> ModelWeights:
        """See `ModelFamily`."""
        shapes = self.tensor_shapes(spec)

        def read(name: str) -> torch.Tensor:
            return source.tensor(f"{name}.weight", shapes[f"{name}.weight"])

        def layers() -> Iterator[LayerWeights]:
            for index in range(spec.shape.num_layers):
                prefix = f"model.layers.{index}"
                yield LayerWeights(
                    norm1=read(f"{prefix}.input_layernorm"),
                    qkv=torch.cat([read(f"{prefix}.self_attn.{part}_proj") for part in "qkv"]),
                    o=read(f"{prefix}.self_attn.o_proj"),
                    norm2=read(f"{prefix}.post_attention_layernorm"),
                    gate_up=torch.cat([read(f"{prefix}.mlp.{part}_proj") for part in ("gate", "up")]),
                    down=read(f"{prefix}.mlp.down_proj"),
                )

        embed = read("model.embed_tokens")
        lm_head = embed if spec.tie_embeddings else read("lm_head")
        return ModelWeights(embed=embed, layers=layers(), norm=read("model.norm"), lm_head=lm_head)


MODELS.register("LlamaForCausalLM")(LlamaFamily())


def _rope_theta(config: Mapping[str, object]) -> float:
    # transformers 5 keeps all of RoPE in rope_parameters, version 4 in rope_theta and rope_scaling.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise _damaged(f"rope_parameters={rope!r} isn't an object")
    _refuse_other("rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
    _refuse_other("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
    if any(isinstance(value, dict) for value in rope.values()):
        raise ModelError(f"rope_parameters={rope!r}: the runner rotates all layers alike", reason="model_unsupported")
    return _positive(rope if "rope_theta" in rope else config, "rope_theta", 10_000.0)


def _refuse_other(key: str, value: object, allowed: object) -> None:
    if value != allowed:
        raise ModelError(
            f"config.json has {key}={value!r}: the Llama runner does only {allowed!r}", reason="model_unsupported"
        )


def _count(config: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _damaged(f"{key}={value!r} must be an integer of at least 1")
    return value


def _positive(config: Mapping[str, object], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise _damaged(f"{key}={value!r} must be a number above 0")
    return float(value)


def _damaged(what: str) -> ModelError:
    return ModelError(f"config.json is wrong: {what}", reason="model_damaged")
