"""The runner against transformers' own Llama, the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvservice.models.families.llama import LLAMA
from kvservice.models.linear import Linear
from kvservice.models.llama import LlamaModel
from kvservice.models.loader import read_model
from kvservice.models.tiny import tiny_model, write_tiny_checkpoint

CPU = torch.device("cpu")
LOGIT_TOLERANCE = 1e-3
"""In fp32; the sums are taken in another order."""
BF16_ROUNDING = 2.0**-7
"""A unit in the last place of bf16, at most."""


def _oracle(folder: Path, dtype: torch.dtype = torch.float32):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def _oracle_greedy(oracle, prompt: list[int], num_tokens: int) -> list[int]:
    from transformers import DynamicCache

    cache, feed, out = DynamicCache(config=oracle.config), prompt, []
    for _ in range(num_tokens):
        logits = oracle(torch.tensor([feed]), past_key_values=cache).logits[0, -1]
        feed = [int(logits.argmax())]
        out += feed
    return out


@torch.no_grad()
def _oracle_logits(oracle, token_ids: list[int]) -> torch.Tensor:
    return oracle(torch.tensor([token_ids])).logits[0]


def test_logits_of_the_tiny_model_equal_those_of_transformers(tiny_folder, sequence, load):
    token_ids = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    logits = sequence(load(tiny_folder, torch.float32)).feed(token_ids)
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, _oracle_logits(_oracle(tiny_folder), token_ids), atol=LOGIT_TOLERANCE, rtol=0)


def test_greedy_tokens_of_the_tiny_model_equal_those_of_transformers(tiny_folder, sequence, load):
    prompt = list(b"A long document, and a question about it.")
    tokens = sequence(load(tiny_folder, torch.float32)).greedy(prompt, 32)
    assert tokens == _oracle_greedy(_oracle(tiny_folder), prompt, 32)


@pytest.mark.real_model
def test_logits_and_greedy_tokens_of_the_real_model_equal_those_of_transformers(real_model_folder, sequence, load):
    from kvservice.models.tokenizer import Tokenizer
    from kvservice.types import PromptFormat, TextRole

    text = "The printing press changed how knowledge travelled through Europe. In the 15th century"
    prompt = Tokenizer.load(real_model_folder).encode(text, TextRole.DOCUMENT, PromptFormat.RAW, first=True)
    model, oracle = load(real_model_folder, torch.float32), _oracle(real_model_folder)
    torch.testing.assert_close(
        sequence(model).feed(prompt), _oracle_logits(oracle, prompt), atol=LOGIT_TOLERANCE, rtol=0
    )
    assert sequence(model).greedy(prompt, 32) == _oracle_greedy(oracle, prompt, 32)


@pytest.mark.real_model
def test_the_real_model_in_bf16_continues_a_text_in_english(real_model_folder, sequence, load):
    from kvservice.models.tokenizer import Tokenizer
    from kvservice.types import PromptFormat, TextRole

    tokenizer = Tokenizer.load(real_model_folder)
    prompt = tokenizer.encode("The capital of France is", TextRole.DOCUMENT, PromptFormat.RAW, first=True)
    model = load(real_model_folder, torch.bfloat16)
    assert tokenizer.decode(sequence(model).greedy(prompt, 2)).startswith(" Paris")


def test_a_text_read_in_chunks_has_the_logits_of_the_text_read_at_once(sequence):
    model = tiny_model()
    token_ids = list(range(40, 100))
    in_chunks = sequence(model)
    logits = torch.cat([in_chunks.feed(token_ids[:7]), in_chunks.feed(token_ids[7:8]), in_chunks.feed(token_ids[8:])])
    torch.testing.assert_close(logits, sequence(model).feed(token_ids), atol=LOGIT_TOLERANCE, rtol=0)


def test_bf16_stays_close_to_fp32(sequence):
    token_ids = list(b"The same seed gives the same weights, rounded.")
    exact, rounded = sequence(tiny_model()).feed(token_ids), sequence(tiny_model(dtype=torch.bfloat16)).feed(token_ids)
    assert (rounded - exact).abs().mean() < 0.05 * exact.std()


def test_attention_gets_rotated_heads_and_every_layer_once():
    model = tiny_model(num_layers=3, num_heads=6, num_kv_heads=2, head_dim=32)
    seen: list[tuple[int, ...]] = []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append((layer, *q.shape, *k.shape, *v.shape))
        return q

    hidden = model.forward(model.embed(torch.tensor([1, 2, 3, 4, 5])), torch.tensor([0, 1, 2, 0, 1]), attend)
    assert seen == [(layer, 5, 6, 32, 5, 2, 32, 5, 2, 32) for layer in range(3)]
    assert hidden.shape == (5, 192)
    assert model.logits(hidden[[2, 4]]).shape == (2, 256)


def test_equal_tokens_at_other_positions_have_other_keys():
    model = tiny_model(num_layers=1)
    keys: list[torch.Tensor] = []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys.append(k.clone())
        return q

    model.forward(model.embed(torch.tensor([9, 9, 9])), torch.tensor([4, 2047, 4]), attend)
    assert torch.equal(keys[0][0], keys[0][2])
    assert not torch.allclose(keys[0][0], keys[0][1])


def test_weight_bytes_count_every_parameter_once(tmp_path):
    model = tiny_model()
    shapes = LLAMA.tensor_shapes(model.spec).values()
    assert model.weight_bytes == 4 * sum(torch.Size(shape).numel() for shape in shapes)


@pytest.mark.parametrize("num_rows", [1, 3, 64, 200])
def test_packed_products_equal_plain_ones(num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    weight = (torch.randn(96, 64, generator=generator) / 8).bfloat16()
    x = torch.randn(num_rows, 64, generator=generator).bfloat16()
    exact = x.float() @ weight.float().T
    assert (Linear(weight)(x).float() - exact).abs().max() <= BF16_ROUNDING * exact.abs().max()


def test_the_tiny_model_attends_to_few_tokens_and_does_not_stand_still(sequence):
    model = tiny_model()
    weights: list[torch.Tensor] = []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, dim=1)) * q.shape[-1] ** -0.5
        weights.append(scores[:, -1].softmax(-1))
        return q

    token_ids = torch.randint(0, 256, (512,), generator=torch.Generator().manual_seed(3))
    model.forward(model.embed(token_ids), torch.arange(512), attend)
    top_32 = torch.stack(weights).sort(dim=-1, descending=True).values[..., :32].sum(-1).mean()
    assert top_32 > 0.6
    assert len(set(sequence(model).greedy(list(b"Once upon a time"), 64))) > 16


def test_equal_seeds_give_equal_weights_in_memory_and_in_a_folder(tmp_path, sequence):
    folder = write_tiny_checkpoint(tmp_path / "model", seed=5)
    loaded = LlamaModel(*read_model(folder, torch.float32), CPU)
    in_memory: LlamaModel = tiny_model(5, vocab_size=259)
    assert torch.equal(sequence(loaded).feed([1, 2, 3]), sequence(in_memory).feed([1, 2, 3]))
    assert not torch.equal(sequence(tiny_model(6)).feed([1]), sequence(tiny_model(5)).feed([1]))
