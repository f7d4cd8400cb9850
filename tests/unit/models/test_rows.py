"""A row's bits among other rows: alone, at any place, in any company."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from kvservice.models.llama import LlamaModel
from kvservice.models.loader import read_model
from kvservice.models.rows import DETERMINISTIC_ROWS, map_rows
from kvservice.models.tiny import tiny_model
from tests.unit.models.checkpoints import write_checkpoint

DTYPES = [torch.float32, torch.bfloat16]


def in_blocks(folder, dtype):
    return LlamaModel(*read_model(folder, dtype), torch.device("cpu"), row_block=DETERMINISTIC_ROWS)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def rowwise_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mixes a token's own q, k and v exactly: a stand-in for attention that can't bring in other rows."""
    group = q.shape[1] // k.shape[1]
    return q + (k + v).repeat_interleave(group, dim=1)


def run(model: LlamaModel, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    hidden = model.forward(model.embed(token_ids), positions, rowwise_attend)
    return hidden, model.logits(hidden)


def assert_rows_keep_their_bits(model: LlamaModel, num_rows: list[int]) -> None:
    """Runs some tokens alone, then among others of every step size, at random places."""
    generator = torch.Generator().manual_seed(11)
    shape = model.spec.shape
    tokens = torch.randint(0, shape.vocab_size, (4,), generator=generator)
    positions = torch.randint(0, shape.max_positions, (4,), generator=generator)
    alone = [run(model, tokens[i : i + 1], positions[i : i + 1]) for i in range(4)]
    for count in num_rows:
        step_tokens = torch.randint(0, shape.vocab_size, (count,), generator=generator)
        step_positions = torch.randint(0, shape.max_positions, (count,), generator=generator)
        places = torch.randperm(count, generator=generator)[:4]
        step_tokens[places], step_positions[places] = tokens[: len(places)], positions[: len(places)]
        hidden, logits = run(model, step_tokens, step_positions)
        for i, place in enumerate(places):
            assert torch.equal(hidden[place], alone[i][0][0]), (count, int(place))
            assert torch.equal(logits[place], alone[i][1][0]), (count, int(place))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_step_has_the_bits_of_the_row_alone(threads, dtype):
    model = tiny_model(dtype=dtype, row_block=DETERMINISTIC_ROWS)
    assert_rows_keep_their_bits(model, [2, 5, 31, 32, 33, 64, 97, 200])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_rows_of_odd_widths_keep_their_bits_in_every_family(tmp_path, threads, family, dtype):
    odd = {"hidden_size": 48, "intermediate_size": 80} | ({} if family == "Qwen2" else {"head_dim": 12})
    write_checkpoint(tmp_path, family, **odd)
    model = in_blocks(tmp_path, dtype)
    assert model.spec.shape.head_dim == 12
    assert_rows_keep_their_bits(model, [3, 32, 40, 130])


def test_rows_that_threads_split_in_the_middle_keep_their_bits(tmp_path, threads):
    # torch gives each thread at least 32,768 elements: with 3 threads, 32 rows of 3,402 fall apart within a row.
    write_checkpoint(tmp_path, "Llama", intermediate_size=3402, num_hidden_layers=1)
    model = in_blocks(tmp_path, torch.float32)
    same = torch.full((32,), 7)
    hidden, logits = run(model, same, same)
    assert torch.equal(hidden, hidden[:1].expand_as(hidden))
    assert torch.equal(logits, logits[:1].expand_as(logits))
    assert_rows_keep_their_bits(model, [32, 50])


@pytest.mark.real_model
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_real_model_keep_their_bits(real_model_folder, dtype):
    model = in_blocks(real_model_folder, dtype)
    assert_rows_keep_their_bits(model, [7, 32, 45])


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_change_no_more_than_the_rounding(sequence, dtype):
    token_ids = list(b"Computed in blocks, or all rows at once.")
    in_blocks = sequence(tiny_model(dtype=dtype, row_block=DETERMINISTIC_ROWS)).feed(token_ids)
    at_once = sequence(tiny_model(dtype=dtype)).feed(token_ids)
    assert (in_blocks - at_once).abs().mean() <= 4 * torch.finfo(dtype).eps * at_once.std()


def test_large_gates_do_not_overflow():
    model = tiny_model(row_block=DETERMINISTIC_ROWS)
    x = torch.tensor([-1e4, -200.0, -88.0, -1.0, 0.0, 1.0, 200.0])
    torch.testing.assert_close(model._silu(x), torch.nn.functional.silu(x))


@pytest.mark.parametrize("num_rows", [0, 1, 4, 5, 11])
def test_the_function_sees_blocks_of_one_size_only(num_rows):
    seen: list[tuple[torch.Size, ...]] = []

    def function(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((a.shape, b.shape))
        return a + 1, b.sum(-1)

    a, b = torch.rand(num_rows, 3), torch.rand(num_rows, 2, 5)
    for found, expected in zip(map_rows(function, 4, a, b), (a + 1, b.sum(-1)), strict=True):
        assert torch.equal(found, expected)
    assert seen == [((4, 3), (4, 2, 5))] * max(1, -(-num_rows // 4))


def test_without_blocks_the_function_gets_the_rows_themselves():
    rows = torch.rand(5, 2)
    seen = map_rows(partial(lambda kept, x: (kept.append(x) or x,), []), None, rows)
    assert seen[0] is rows


def test_a_step_without_wanted_logits_gets_none():
    model = tiny_model(row_block=DETERMINISTIC_ROWS)
    assert model.logits(torch.empty(0, 64)).shape == (0, 256)
