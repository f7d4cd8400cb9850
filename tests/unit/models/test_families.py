"""Each family against transformers' own classes, from random checkpoints that transformers itself has written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from kvservice.errors import ModelError
from kvservice.models.base import MODELS
from kvservice.models.llama import LlamaModel
from kvservice.models.loader import load_model, read_model
from tests.unit.models.checkpoints import FAMILIES, write_checkpoint

CPU = torch.device("cpu")
LOGIT_TOLERANCE = 1e-4
"""In fp32, for logits of about one; the sums are taken in another order."""
PROMPT = torch.randint(0, 256, (96,), generator=torch.Generator().manual_seed(1)).tolist()


def change_config(folder: Path, drop: tuple[str, ...] = (), **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def load(folder: Path):
    return load_model(folder, dtype=torch.float32, device=CPU)


def assert_equal_logits(logits: torch.Tensor, oracle: transformers.PreTrainedModel) -> None:
    with torch.no_grad():
        expected = oracle(torch.tensor([PROMPT])).logits[0]
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize(("num_kv_heads", "tied"), [(2, False), (4, True), (1, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(tmp_path, sequence, load, family, num_kv_heads, tied):
    oracle = write_checkpoint(tmp_path, family, num_key_value_heads=num_kv_heads, tie_word_embeddings=tied)
    model = load(tmp_path)
    assert model.spec.tie_embeddings is tied
    assert model.spec.rope_theta == 50_000.0
    assert_equal_logits(sequence(model).feed(PROMPT), oracle)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_biases_that_a_config_asks_for_are_added(tmp_path, sequence, load, family):
    oracle = write_checkpoint(tmp_path, family, attention_bias=True)
    model = load(tmp_path)
    assert (model.spec.qkv_bias, model.spec.o_bias) == (True, True)
    assert_equal_logits(sequence(model).feed(PROMPT), oracle)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_stays_close_to_fp32(tmp_path, sequence, load, family):
    write_checkpoint(tmp_path, family)
    rounded = load(tmp_path, torch.bfloat16)
    exact = sequence(load(tmp_path)).feed(PROMPT)
    assert (sequence(rounded).feed(PROMPT) - exact).abs().mean() < 0.05 * exact.std()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_transformers_4_means_the_same(tmp_path, sequence, load, family):
    write_checkpoint(tmp_path, family)
    expected = sequence(load(tmp_path)).feed(PROMPT)
    drop = ("rope_parameters", "layer_types", "dtype")
    change_config(tmp_path, drop, rope_theta=50_000.0, rope_scaling=None, torch_dtype="float32")
    if family.startswith("Qwen"):
        # Version 4 wrote the window's size even where the window was off.
        change_config(tmp_path, use_sliding_window=False, sliding_window=32768, max_window_layers=3)
    assert torch.equal(sequence(load(tmp_path)).feed(PROMPT), expected)


def test_weight_bytes_count_biases_and_norms(tmp_path):
    write_checkpoint(tmp_path, "Qwen2")
    model = LlamaModel(*read_model(tmp_path, torch.float32), CPU)
    shapes = MODELS.get("Qwen2ForCausalLM").tensor_shapes(model.spec).values()
    assert model.weight_bytes == 4 * sum(torch.Size(shape).numel() for shape in shapes)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 32}, "use_sliding_window=True"),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 32}, "use_sliding_window=True"),
        ("Qwen2", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "layer_types='sliding_attention'"),
        ("Mistral", {"sliding_window": 4096}, "sliding_window=4096: the runner does only None"),
        ("Qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ("Qwen3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ("Mistral", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ("Qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("Llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("Mistral", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("Qwen2", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
        ("Qwen3", {"architectures": ["Qwen3MoeForCausalLM"]}, r"Qwen3Moe.*Llama.*Mistral.*Qwen2.*Qwen3ForCausalLM"),
    ],
)
def test_what_the_runner_does_not_do_is_refused_by_name(tmp_path, family, changes, message):
    write_checkpoint(tmp_path, family)
    change_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=message) as raised:
        load(tmp_path)
    assert raised.value.reason == "model_unsupported"


def test_a_mistral_that_does_not_name_its_window_has_the_one_that_transformers_takes(tmp_path):
    write_checkpoint(tmp_path, "Mistral")
    change_config(tmp_path, drop=("sliding_window",))
    assert transformers.AutoConfig.from_pretrained(tmp_path).sliding_window == 4096
    with pytest.raises(ModelError, match="sliding_window=4096"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("family", "written_as", "unread"),
    [("Qwen2", "Llama", r"q_proj\.bias|k_proj\.bias"), ("Qwen3", "Mistral", r"k_norm\.weight")],
)
def test_a_checkpoint_under_the_name_of_another_family_is_refused_by_its_tensors(tmp_path, family, written_as, unread):
    write_checkpoint(tmp_path, family)
    change_config(tmp_path, architectures=[f"{written_as}ForCausalLM"], sliding_window=None)
    with pytest.raises(ModelError, match=f"doesn't use, the first is .*({unread})"):
        load(tmp_path)
