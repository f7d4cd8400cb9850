"""From a GGUF file of a Llama to a folder in Hugging Face's layout, in bf16. Knows nothing of where the file came from.

transformers can read GGUF too, but it needs `accelerate` for that and drops the pre-tokenizer that splits digits, so
numbers behind spaces would get other tokens than the model was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kvservice.errors import ModelError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

T = TypeVar("T")

_TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3
"""GGUF's token type of tokens that aren't text."""


def convert_gguf(source: Path, folder: Path, progress: Callable[[str], None]) -> None:
    """Writes model.safetensors (bf16), config.json and the tokenizer's files of `source` into the existing `folder`.

    Raises:
        ModelError: the file is no GGUF, or of a model that isn't a Llama with a `smollm` tokenizer.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file

    try:
        reader = GGUFReader(source)
    except ValueError as error:
        raise ModelError(f"{source.name} isn't a GGUF file: {error}", reason="model_damaged") from None
    _require(reader, "general.architecture", "llama")
    _require(reader, "tokenizer.ggml.model", "gpt2")
    _require(reader, "tokenizer.ggml.pre", "smollm")
    progress("dequantising the weights to bf16")
    tensors = dict(_tensors(reader))
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    # safetensors makes its file private; the folder may be shared by users, as in an image.
    weights.chmod((folder.stat().st_mode & 0o666) | 0o600)
    progress("writing the configuration and the tokenizer")
    _write_json(folder / "config.json", _config(reader, tie_embeddings="lm_head.weight" not in tensors))
    _write_tokenizer(reader, folder)


def _field(reader: GGUFReader, key: str, kind: type[T]) -> T:
    field = reader.get_field(key)
    value = None if field is None else field.contents()
    if not isinstance(value, kind):
        raise ModelError(f"the GGUF file's {key} is {value!r}, expected {kind.__name__}", reason="model_damaged")
    return value


def _require(reader: GGUFReader, key: str, expected: str) -> None:
    value = _field(reader, key, str)
    if value != expected:
        raise ModelError(f"the GGUF file's {key} is {value!r}: only {expected!r} is converted")


def _config(reader: GGUFReader, *, tie_embeddings: bool) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": _field(reader, "llama.embedding_length", int),
        "intermediate_size": _field(reader, "llama.feed_forward_length", int),
        "max_position_embeddings": _field(reader, "llama.context_length", int),
        "num_attention_heads": _field(reader, "llama.attention.head_count", int),
        "num_hidden_layers": _field(reader, "llama.block_count", int),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv", int),
        "head_dim": _field(reader, "llama.rope.dimension_count", int),
        # GGUF keeps it as float32: 1e-5 comes out as 9.99999975e-06.
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon', float):.6g}"),
        "rope_parameters": {"rope_theta": _field(reader, "llama.rope.freq_base", float), "rope_type": "default"},
        "tie_word_embeddings": tie_embeddings,
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens", list)),
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id", int),
        "eos_token_id": _eos_token_ids(reader),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id", int),
    }


def _eos_token_ids(reader: GGUFReader) -> list[int]:
    # Without the chat form the model ends a text with <|endoftext|>; the file names only the end of a turn.
    eos = _field(reader, "tokenizer.ggml.eos_token_id", int)
    tokens = _field(reader, "tokenizer.ggml.tokens", list)
    return [eos, *(i for i in (tokens.index("<|endoftext|>"),) if i != eos)]


def _tensors(reader: GGUFReader) -> Iterator[tuple[str, torch.Tensor]]:
    import torch
    from gguf import dequantize

    heads = {
        "attn_q": _field(reader, "llama.attention.head_count", int),
        "attn_k": _field(reader, "llama.attention.head_count_kv", int),
    }
    for tensor in reader.tensors:
        *block, kind, suffix = tensor.name.split(".")
        if kind not in _TENSOR_NAMES or suffix != "weight":
            raise ModelError(f"the GGUF file has a tensor {tensor.name!r}, which a Llama doesn't have")
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if kind in heads:
            # llama.cpp rotates neighbours, Hugging Face's Llama the two halves of a head: undo its reordering of rows.
            rows, hidden = values.shape
            values = values.view(heads[kind], rows // heads[kind] // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)
        prefix = f"model.layers.{block[1]}." if block else ""
        yield f"{prefix}{_TENSOR_NAMES[kind]}.weight", values.to(torch.bfloat16).contiguous()


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = [str(token) for token in _field(reader, "tokenizer.ggml.tokens", list)]
    types = _field(reader, "tokenizer.ggml.token_type", list)
    merges: list[tuple[str, str]] = []
    for merge in _field(reader, "tokenizer.ggml.merges", list):
        first, second = str(merge).split(" ")
        merges.append((first, second))
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": _field(reader, "llama.context_length", int),
            "clean_up_tokenization_spaces": False,
            "bos_token": tokens[_field(reader, "tokenizer.ggml.bos_token_id", int)],
            "eos_token": tokens[_field(reader, "tokenizer.ggml.eos_token_id", int)],
            "pad_token": tokens[_field(reader, "tokenizer.ggml.padding_token_id", int)],
            "unk_token": tokens[_field(reader, "tokenizer.ggml.unknown_token_id", int)],
            "chat_template": _field(reader, "tokenizer.chat_template", str),
        },
    )


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
