"""Which models can share distant keys between layers, and what a map says of one. Knows nothing of weights or groups.

A layer that uses another's keys takes them as they are stored, rotated. So all layers must rotate alike, and see the
same tokens. What the loader refuses for the runner's sake is refused here for the map's, with that reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from kvservice.compression.sharing_map import ModelFacts
from kvservice.errors import ModelError
from kvservice.models.base import ModelSpec
from kvservice.models.folder import read_json


def model_facts(spec: ModelSpec) -> ModelFacts:
    """What a map must have been made for to be used with this model."""
    shape = spec.shape
    return ModelFacts(
        name=spec.name,
        origin=spec.origin,
        weights_digest=spec.digest,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rope_theta=spec.rope_theta,
        qk_norm=spec.qk_norm,
    )


def check_shareable(folder: Path) -> None:
    """Refuses a model whose layers can't use one another's keys.

    Raises:
        ModelError: it can't, with every reason that its config.json gives; or there is no config.json.
    """
    reasons = list(_reasons(read_json(folder, "config.json")))
    if reasons:
        raise ModelError(
            f"model {folder.resolve().name!r} can't share distant keys between layers (PoD): {'; '.join(reasons)}. "
            "Use another recipe",
            reason="pod_unsupported",
        )


def _reasons(config: Mapping[str, object]) -> Iterator[str]:
    yield from _other_positions(config)
    yield from _other_windows(config)
    for key in ("use_qk_norm", "qk_layernorm"):
        if config.get(key):
            yield f"{key}={config[key]!r}: a norm of queries and keys that the runner doesn't do"
    if config.get("attn_logit_softcapping") is not None:
        yield f"attn_logit_softcapping={config['attn_logit_softcapping']!r}: scores aren't plain products"
    if config.get("kv_lora_rank") is not None:
        yield f"kv_lora_rank={config['kv_lora_rank']!r}: it keeps a latent vector, no keys of KV heads"


def _other_positions(config: Mapping[str, object]) -> Iterator[str]:
    if config.get("alibi") or config.get("position_embedding_type") not in (None, "rope", "rotary"):
        yield "it doesn't rotate queries and keys (RoPE)"
    layers = config.get("no_rope_layers")
    # 1 marks a layer that rotates, 0 one that doesn't.
    if isinstance(layers, list) and not all(layers):
        without = [index for index, rotates in enumerate(layers) if not rotates]
        yield f"layers {_some(without)} have no RoPE (no_rope_layers)"
    elif config.get("no_rope_layer_interval"):
        yield f"no_rope_layer_interval={config['no_rope_layer_interval']!r}: some layers have no RoPE"
    bases = _rope_bases(config)
    if len(set(bases.values())) > 1:
        yield f"layers rotate with different RoPE bases ({', '.join(f'{key} {base}' for key, base in bases.items())})"


def _rope_bases(config: Mapping[str, object]) -> dict[str, object]:
    """Every base in config.json, by where it stands."""
    bases = {key: config[key] for key in ("rope_theta", "rope_local_base_freq") if config.get(key) is not None}
    for holder in ("rope_parameters", "rope_scaling"):
        rope = config.get(holder)
        kinds = (
            {kind: value for kind, value in rope.items() if isinstance(value, dict)} if isinstance(rope, dict) else {}
        )
        bases |= {kind: value["rope_theta"] for kind, value in kinds.items() if "rope_theta" in value}
    return bases


def _other_windows(config: Mapping[str, object]) -> Iterator[str]:
    layer_types = config.get("layer_types")
    if isinstance(layer_types, list):
        others = [index for index, kind in enumerate(layer_types) if kind != "full_attention"]
        if others:
            kinds = ", ".join(sorted({str(layer_types[index]) for index in others}))
            yield f"layers {_some(others)} don't see all tokens ({kinds})"
    elif config.get("use_sliding_window", True) and config.get("sliding_window") is not None:
        yield f"sliding_window={config['sliding_window']!r}: layers see a sliding window, not all tokens"


def _some(layers: list[int]) -> str:
    most = 6
    return ", ".join(map(str, layers[:most])) + (", …" if len(layers) > most else "")
