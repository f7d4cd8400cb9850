"""Model folders that are missing something, damaged, or of a kind that the runner doesn't do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvservice.errors import ModelError
from kvservice.models.base import MODELS
from kvservice.models.llama import LlamaModel
from kvservice.models.loader import load_model, read_model
from kvservice.models.tiny import tiny_config, tiny_spec, tiny_tensors

CPU = torch.device("cpu")
FETCH = "kvservice model fetch smollm2-135m"


def load(folder: Path, dtype: torch.dtype = torch.float32):
    return load_model(folder, dtype=dtype, device=CPU)


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Keys are tensor names with `__` for dots."""
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def test_the_spec_says_what_the_folder_holds(tiny_folder):
    spec = load(tiny_folder, torch.bfloat16).spec
    assert spec.name == "tiny"
    assert spec.shape == tiny_spec(vocab_size=259, dtype=torch.bfloat16).shape
    assert (spec.rope_theta, spec.norm_eps, spec.tie_embeddings) == (10_000.0, 1e-5, False)
    assert spec.eos_token_ids == {256, 258}
    assert spec.origin == "folder tiny"
    assert "LlamaForCausalLM" in MODELS.names()


def test_the_digest_follows_the_weights_and_nothing_else(tiny_folder):
    before = load(tiny_folder).spec.digest
    change_config(tiny_folder, torch_dtype="float32")
    assert load(tiny_folder, torch.bfloat16).spec.digest == before
    norm = load_file(tiny_folder / "model.safetensors")["model.norm.weight"]
    norm[0] += 2**-20
    change_tensors(tiny_folder, model__norm__weight=norm)
    assert load(tiny_folder).spec.digest != before


def test_generation_config_adds_end_tokens(tiny_folder):
    (tiny_folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert load(tiny_folder).spec.eos_token_ids == {7, 256, 258}


def test_a_sharded_checkpoint_equals_a_whole_one(tiny_folder, sequence):
    whole = sequence(load(tiny_folder)).feed([1, 2, 3])
    tensors = load_file(tiny_folder / "model.safetensors")
    (tiny_folder / "model.safetensors").unlink()
    shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, tiny_folder / shard)
    (tiny_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert torch.equal(sequence(load(tiny_folder)).feed([1, 2, 3]), whole)
    (tiny_folder / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model-1\.safetensors"):
        load(tiny_folder)


def test_tied_embeddings_are_the_head_and_lie_in_memory_once(tiny_folder, sequence):
    untied = LlamaModel(*read_model(tiny_folder, torch.float32), CPU)
    change_config(tiny_folder, tie_word_embeddings=True)
    change_tensors(tiny_folder, lm_head__weight=None)
    tied = LlamaModel(*read_model(tiny_folder, torch.float32), CPU)
    shape = tied.spec.shape
    assert untied.weight_bytes - tied.weight_bytes == 4 * shape.vocab_size * shape.hidden_size
    tensors = load_file(tiny_folder / "model.safetensors")
    x = torch.randn(2, shape.hidden_size)
    normed = torch.nn.functional.rms_norm(x, (shape.hidden_size,), tensors["model.norm.weight"], tied.spec.norm_eps)
    assert torch.equal(tied.logits(x), torch.nn.functional.linear(normed, tensors["model.embed_tokens.weight"]))


def test_a_config_of_transformers_4_means_the_same(tiny_folder, sequence):
    expected = sequence(load(tiny_folder)).feed([1, 2, 3])
    change_config(tiny_folder, rope_parameters=None, rope_scaling=None, rope_theta=10_000.0)
    assert torch.equal(sequence(load(tiny_folder)).feed([1, 2, 3]), expected)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named_together_with_the_command_that_helps(tiny_folder, name):
    (tiny_folder / name).unlink()
    with pytest.raises(ModelError, match=f"has no {name}.*{FETCH}") as raised:
        load(tiny_folder)
    assert raised.value.reason == "model_missing"


def test_a_missing_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ModelError, match=f"nowhere doesn't exist.*{FETCH}"):
        load(tmp_path / "nowhere")


def test_pickled_weights_are_not_loaded(tiny_folder):
    (tiny_folder / "model.safetensors").rename(tiny_folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no pickled weights"):
        load(tiny_folder)


@pytest.mark.parametrize("kept_bytes", [0, 5, 3000, -1])
def test_a_truncated_weight_file_is_refused(tiny_folder, kept_bytes):
    path = tiny_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(ModelError, match="isn't a whole safetensors file"):
        load(tiny_folder)


@pytest.mark.parametrize("content", ["{", "[1]", "\udce9"])
def test_a_config_that_is_no_json_object_is_refused(tiny_folder, content):
    (tiny_folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"config\.json (isn't valid JSON|isn't UTF-8|holds a JSON list)"):
        load(tiny_folder)


def test_a_missing_tensor_is_named(tiny_folder):
    change_tensors(tiny_folder, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(ModelError, match=r"lack 1 tensors, the first is model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tiny_folder)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tiny_folder):
    change_tensors(tiny_folder, model__layers__0__self_attn__k_proj__weight=torch.zeros(16, 64))
    with pytest.raises(ModelError, match=r"k_proj\.weight has shape \[16, 64\], config\.json asks for \[32, 64\]"):
        load(tiny_folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tiny_folder, value):
    down = load_file(tiny_folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    down[3, 5] = value
    change_tensors(tiny_folder, model__layers__1__mlp__down_proj__weight=down)
    with pytest.raises(ModelError, match=r"down_proj\.weight holds NaN or infinity"):
        load(tiny_folder)


def test_integer_weights_are_refused(tiny_folder):
    change_tensors(tiny_folder, model__norm__weight=torch.ones(64, dtype=torch.int8))
    with pytest.raises(ModelError, match=r"is torch\.int8: only bf16, fp16 and fp32"):
        load(tiny_folder)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_norm.weight"])
def test_a_tensor_that_the_runner_would_not_read_is_refused(tiny_folder, name):
    change_tensors(tiny_folder, **{name: torch.ones(16)})
    with pytest.raises(ModelError, match=f"doesn't use, the first is {name}"):
        load(tiny_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel.*supported are LlamaForCausalLM"),
        ({"architectures": None}, "supported are LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': the runner does only 'silu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"use_qk_norm": True}, "use_qk_norm=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config="),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types='sliding_attention'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rotates all layers alike"),
    ],
)
def test_what_the_runner_does_not_do_is_refused_by_name(tiny_folder, changes, message):
    change_config(tiny_folder, **changes)
    with pytest.raises(ModelError, match=message) as raised:
        load(tiny_folder)
    assert raised.value.reason == "model_unsupported"


def test_biases_that_the_config_asks_for_must_be_there(tiny_folder):
    change_config(tiny_folder, attention_bias=True)
    with pytest.raises(ModelError, match=r"lack 8 tensors, the first is model\.layers\.0\.self_attn\.k_proj\.bias"):
        load(tiny_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size=None must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be an integer of at least 1"),
        ({"num_attention_heads": True}, "num_attention_heads=True"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 isn't a multiple of 3"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0 must be a number above 0"),
        ({"rope_parameters": {"rope_theta": "much"}}, "rope_theta='much'"),
    ],
)
def test_wrong_figures_are_refused_with_their_value(tiny_folder, changes, message):
    change_config(tiny_folder, **changes)
    with pytest.raises(ModelError, match=message) as raised:
        load(tiny_folder)
    assert raised.value.reason == "model_damaged"


def test_other_number_formats_than_fp32_and_bf16_are_refused(tiny_folder):
    with pytest.raises(ModelError, match=r"torch\.float16: the runner does float32 and bfloat16"):
        load(tiny_folder, torch.float16)


def test_heads_need_not_fill_the_hidden_size(tiny_folder, sequence):
    spec = tiny_spec(vocab_size=259)
    spec = replace(spec, shape=replace(spec.shape, num_heads=6, num_kv_heads=3, head_dim=8))
    (tiny_folder / "config.json").write_text(json.dumps(tiny_config(spec)))
    save_file(tiny_tensors(spec, 0), tiny_folder / "model.safetensors")
    assert sequence(load(tiny_folder)).feed([1, 2, 3]).shape == (3, 259)


def test_an_index_that_names_files_elsewhere_is_refused(tiny_folder):
    index = {"weight_map": {"model.norm.weight": "../tiny/model.safetensors"}}
    (tiny_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="names files outside its folder"):
        load(tiny_folder)


@pytest.mark.real_model
def test_the_real_model_is_what_its_name_says(real_model_folder):
    spec = load(real_model_folder, torch.bfloat16).spec
    shape = spec.shape
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (30, 9, 3, 64)
    assert (shape.hidden_size, shape.vocab_size, shape.max_positions) == (576, 49152, 8192)
    assert spec.name == "smollm2-135m"
    assert "dequantised" in spec.origin
    assert spec.tie_embeddings
    assert 2 in spec.eos_token_ids
