"""A small random Llama for tests: in memory, or as a model folder with a tokenizer of bytes. Downloads nothing.

The weights are scaled so that attention picks few tokens and greedy decoding doesn't stand still.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvservice.models.base import ModelSpec
from kvservice.models.families.llama import LLAMA
from kvservice.models.llama import LlamaModel
from kvservice.types import ModelShape

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_NUM_BYTES = 256
_QUERY_GAIN = 1.7
"""Standard deviation of query and key values: attention scores then vary by about three."""
_HEAD_GAIN = 3.0

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_spec(
    *,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    vocab_size: int = _NUM_BYTES,
    dtype: torch.dtype = torch.float32,
) -> ModelSpec:
    """The figures of a tiny model with 2,048 positions; without end tokens, so answers run to their full length."""
    hidden_size = num_heads * head_dim
    return ModelSpec(
        name="tiny",
        shape=ModelShape(
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            vocab_size=vocab_size,
            max_positions=2048,
            dtype_bytes=dtype.itemsize,
        ),
        rope_theta=10_000.0,
        norm_eps=1e-5,
        eos_token_ids=frozenset(),
        origin="random weights",
        digest="tiny",
        tie_embeddings=False,
        separator_ids=frozenset(b".,?!;: \t\n"),
    )


def tiny_tensors(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Random fp32 weights under Hugging Face's names, a function of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in LLAMA.tensor_shapes(spec).items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensors[name] = 1.0 + 0.1 * values
        elif name == "model.embed_tokens.weight":
            tensors[name] = values
        else:
            gain = _QUERY_GAIN if "q_proj" in name or "k_proj" in name else 1.0
            gain = _HEAD_GAIN if name == "lm_head.weight" else gain
            tensors[name] = values * gain / shape[1] ** 0.5
    return tensors


def tiny_model(
    seed: int = 0,
    *,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    vocab_size: int = _NUM_BYTES,
    dtype: torch.dtype = torch.float32,
    row_block: int | None = None,
) -> LlamaModel:
    """A random model on the CPU; equal arguments give equal weights, whatever `row_block`."""
    spec = tiny_spec(
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        dtype=dtype,
    )
    source = InMemory({name: tensor.to(dtype) for name, tensor in tiny_tensors(spec, seed).items()})
    return LlamaModel(spec, LLAMA.weights(spec, source), torch.device("cpu"), row_block=row_block)


def write_tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Writes a tiny model as a folder that `load_model` and `Tokenizer.load` read, and returns `folder`.

    Each byte of a text is one token. 259 tokens: the bytes, then <|endoftext|>, <|im_start|>, <|im_end|>; the first and
    the last of these end an answer. The weights are those of `tiny_model(seed, vocab_size=259)`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec = tiny_spec(vocab_size=_NUM_BYTES + len(_SPECIAL_TOKENS))
    save_file(tiny_tensors(spec, seed), folder / "model.safetensors", metadata={"format": "pt"})
    special_ids = {token: _NUM_BYTES + i for i, token in enumerate(_SPECIAL_TOKENS)}
    _write_json(folder / "config.json", tiny_config(spec) | {"eos_token_id": [special_ids["<|im_end|>"], _NUM_BYTES]})
    write_tiny_tokenizer(folder)
    return folder


def write_tiny_tokenizer(folder: Path) -> None:
    """Writes the tokenizer of `write_tiny_checkpoint`, for a folder that has a model of at least 259 tokens."""
    _write_json(
        folder / "tokenizer_config.json",
        {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"},
    )
    _write_tokenizer(folder / "tokenizer.json")


def tiny_config(spec: ModelSpec) -> dict[str, object]:
    """The config.json of a tiny model."""
    shape = spec.shape
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_positions,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": spec.norm_eps,
        "rope_parameters": {"rope_theta": spec.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": spec.tie_embeddings,
        "vocab_size": shape.vocab_size,
        "bos_token_id": None,
    }


class InMemory:
    """Tensors of a dict. Implements TensorSource."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See `TensorSource`."""
        return self._tensors[name].reshape(shape)


def _write_tokenizer(path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(characters)}
    vocab |= {token: _NUM_BYTES + i for i, token in enumerate(_SPECIAL_TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS])
    tokenizer.save(str(path), pretty=False)


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
