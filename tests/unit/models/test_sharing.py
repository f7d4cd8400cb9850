"""Which models' layers can't share keys, told by the settings of their config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvservice.errors import ModelError
from kvservice.models.sharing import check_shareable, model_facts
from kvservice.models.tiny import tiny_spec, write_tiny_checkpoint

LLAMA = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "rms_norm_eps": 1e-5, "rope_theta": 1e5}


def folder_of(tmp_path: Path, config: dict[str, object]) -> Path:
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        LLAMA | {"rope_scaling": None, "sliding_window": None},
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 32768},
        {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"] * 4, "use_sliding_window": False},
        LLAMA | {"no_rope_layers": [1, 1, 1, 1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ],
)
def test_layers_that_rotate_alike_and_see_all_tokens_can_share(tmp_path: Path, config: dict[str, object]) -> None:
    check_shareable(folder_of(tmp_path, config))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"layer_types": ["sliding_attention", "full_attention"] * 2}, "layers 0, 2 don't see all tokens (sliding_att"),
        ({"layer_types": ["chunked_attention"] * 12}, "layers 0, 1, 2, 3, 4, 5, … don't"),
        ({"no_rope_layers": [1, 1, 1, 0]}, "layers 3 have no RoPE"),
        ({"no_rope_layer_interval": 4}, "no_rope_layer_interval=4"),
        ({"rope_theta": 1e6, "rope_local_base_freq": 1e4}, "different RoPE bases (rope_theta 1000000.0, rope_local"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            "different RoPE bases (full_attention 1000000.0, sliding_attention 10000.0)",
        ),
        ({"alibi": True}, "doesn't rotate"),
        ({"position_embedding_type": "absolute"}, "doesn't rotate"),
        ({"use_qk_norm": True}, "use_qk_norm=True: a norm"),
        ({"qk_layernorm": True}, "qk_layernorm=True: a norm"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"kv_lora_rank": 512}, "kv_lora_rank=512"),
    ],
)
def test_a_model_that_cannot_share_is_refused_by_name(tmp_path: Path, config: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError, match="model 'some-model' can't share distant keys") as refused:
        check_shareable(folder_of(tmp_path, config))
    assert words in refused.value.message
    assert refused.value.reason == "pod_unsupported"


def test_every_reason_is_given(tmp_path: Path) -> None:
    gemma = {"layer_types": ["sliding_attention"], "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    with pytest.raises(ModelError, match=r"RoPE bases.*; .*don't see all tokens"):
        check_shareable(folder_of(tmp_path, gemma))


def test_a_model_that_is_served_can_share(tmp_path: Path) -> None:
    check_shareable(write_tiny_checkpoint(tmp_path / "tiny"))


def test_the_facts_of_a_model_are_those_of_its_spec() -> None:
    facts = model_facts(tiny_spec(num_layers=3, num_kv_heads=2))
    assert (facts.num_layers, facts.num_kv_heads, facts.weights_digest) == (3, 2, "tiny")
    assert facts.fingerprint != model_facts(tiny_spec(num_layers=4, num_kv_heads=2)).fingerprint
