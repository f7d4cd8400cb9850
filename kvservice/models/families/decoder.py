"""What Llama-shaped families have in common: figures, tensors, and what the runner refuses. Knows nothing of files.

What the runner doesn't do is refused here by name: a model that ran without it would answer wrongly in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

import torch

from kvservice.errors import ModelError
from kvservice.models.base import LayerWeights, ModelIdentity, ModelSpec, ModelWeights, TensorSource
from kvservice.types import ModelShape

_ONLY: Final[Mapping[str, object]] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "use_qk_norm": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
"""Settings of config.json, and the one value of each that the runner does. An absent setting has this value."""


class AttentionBias(Enum):
    """Which projections of attention have a bias."""

    NEVER = auto()
    QKV = auto()
    """Queries, keys and values, always."""
    CONFIG = auto()
    """These three and the output, if config.json has `attention_bias: true`."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """A ModelFamily: RMS norms, rotated halves of heads, grouped queries, SiLU-gated MLP, and what sets it apart."""

    bias: AttentionBias
    qk_norm: bool = False
    """Whether queries and keys are normed per head before rotation."""
    only: Mapping[str, object] = field(default_factory=dict)
    """Further settings of config.json that may have one value only."""
    absent: Mapping[str, object] = field(default_factory=dict)
    """What transformers takes an absent setting for, where that isn't what all families take it for."""

    def spec(self, config: Mapping[str, object], identity: ModelIdentity, dtype: torch.dtype) -> ModelSpec:
        """See `ModelFamily`. Reads the layouts of transformers 4 and 5."""
        config = {**self.absent, **config}
        for key, allowed in {**_ONLY, **self.only}.items():
            _refuse_other(key, config.get(key, allowed), allowed)
        _refuse_other_layers(config.get("layer_types"))
        has_bias = self.bias is AttentionBias.CONFIG and config.get("attention_bias", False) is True
        return ModelSpec(
            name=identity.name,
            shape=_shape(config, dtype),
            rope_theta=_rope_theta(config),
            norm_eps=_positive(config, "rms_norm_eps", 1e-6),
            eos_token_ids=identity.eos_token_ids,
            origin=identity.origin,
            digest=identity.digest,
            tie_embeddings=config.get("tie_word_embeddings", False) is True,
            qkv_bias=has_bias or self.bias is AttentionBias.QKV,
            o_bias=has_bias,
            qk_norm=self.qk_norm,
            separator_ids=identity.separator_ids,
        )

    def tensor_shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        """See `ModelFamily`."""
        shape = spec.shape
        layer = _layer_shapes(spec)
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (shape.vocab_size, shape.hidden_size),
            "model.norm.weight": (shape.hidden_size,),
        }
        if not spec.tie_embeddings:
            shapes["lm_head.weight"] = (shape.vocab_size, shape.hidden_size)
        for index in range(shape.num_layers):
            shapes |= {f"model.layers.{index}.{name}": size for name, size in layer.items()}
        return shapes

    def ignores(self, name: str, spec: ModelSpec) -> bool:
        """See `ModelFamily`. Old checkpoints keep RoPE's frequencies; tied ones may keep the embedding twice."""
        return name.endswith("rotary_emb.inv_freq") or (spec.tie_embeddings and name == "lm_head.weight")

    def weights(self, spec: ModelSpec, source: TensorSource) -> ModelWeights:
        """See `ModelFamily`."""
        shapes = self.tensor_shapes(spec)

        def read(name: str) -> torch.Tensor:
            return source.tensor(name, shapes[name])

        def layers() -> Iterator[LayerWeights]:
            for index in range(spec.shape.num_layers):
                attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
                yield LayerWeights(
                    norm1=read(f"model.layers.{index}.input_layernorm.weight"),
                    qkv=torch.cat([read(f"{attention}.{part}_proj.weight") for part in "qkv"]),
                    o=read(f"{attention}.o_proj.weight"),
                    norm2=read(f"model.layers.{index}.post_attention_layernorm.weight"),
                    gate_up=torch.cat([read(f"{mlp}.{part}_proj.weight") for part in ("gate", "up")]),
                    down=read(f"{mlp}.down_proj.weight"),
                    qkv_bias=(
                        torch.cat([read(f"{attention}.{part}_proj.bias") for part in "qkv"]) if spec.qkv_bias else None
                    ),
                    o_bias=read(f"{attention}.o_proj.bias") if spec.o_bias else None,
                    q_norm=read(f"{attention}.q_norm.weight") if spec.qk_norm else None,
                    k_norm=read(f"{attention}.k_norm.weight") if spec.qk_norm else None,
                )

        embed = read("model.embed_tokens.weight")
        lm_head = embed if spec.tie_embeddings else read("lm_head.weight")
        return ModelWeights(embed=embed, layers=layers(), norm=read("model.norm.weight"), lm_head=lm_head)


def _shape(config: Mapping[str, object], dtype: torch.dtype) -> ModelShape:
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
    return shape


def _layer_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    shape = spec.shape
    hidden, inner = shape.hidden_size, shape.intermediate_size
    q_rows, kv_rows = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_rows, hidden),
        "self_attn.k_proj.weight": (kv_rows, hidden),
        "self_attn.v_proj.weight": (kv_rows, hidden),
        "self_attn.o_proj.weight": (hidden, q_rows),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if spec.qkv_bias:
        rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
        shapes |= {f"self_attn.{part}_proj.bias": (count,) for part, count in rows.items()}
    if spec.o_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if spec.qk_norm:
        shapes |= {f"self_attn.{part}_norm.weight": (shape.head_dim,) for part in "qk"}
    return shapes


def _rope_theta(config: Mapping[str, object]) -> float:
    # transformers 5 keeps all of RoPE in rope_parameters, version 4 in rope_theta and rope_scaling. Where a config has
    # both, transformers 5 follows rope_scaling.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
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
            f"config.json has {key}={value!r}: the runner does only {allowed!r}", reason="model_unsupported"
        )


def _refuse_other_layers(layer_types: object) -> None:
    for layer_type in layer_types if isinstance(layer_types, list) else []:
        _refuse_other("layer_types", layer_type, "full_attention")


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
