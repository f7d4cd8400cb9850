"""Drawing tokens by the CPU kernels, on every instruction set, against torch and the slow reference."""

from __future__ import annotations

import math

import pytest
import torch

from kvservice.engine import sampler
from kvservice.engine.sampler import SamplerRow
from kvservice.kernels import cpu
from kvservice.types import SamplingParams
from tests.conformance.test_kernels import isa, pytestmark  # noqa: F401
from tests.unit.engine import sampler_reference

VOCABS = [1, 2, 15, 16, 17, 300, 5003]

PARAMS = {
    "temperature": SamplingParams(temperature=0.7),
    "hot": SamplingParams(temperature=50.0),
    "cold": SamplingParams(temperature=1e-3),
    "coldest": SamplingParams(temperature=1e-30),
    "top_k": SamplingParams(temperature=1.0, top_k=7),
    "top_p": SamplingParams(temperature=1.0, top_p=0.9),
    "typical_p": SamplingParams(temperature=1.0, typical_p=0.6),
    "min_p": SamplingParams(temperature=1.0, min_p=0.1),
    "all": SamplingParams(temperature=0.8, top_k=50, typical_p=0.9, top_p=0.9, min_p=0.01),
}


def logits_of(vocab: int, rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def draw_of(params: SamplingParams, draw: int) -> cpu.Draw:
    return cpu.Draw(draw, params.temperature, params.top_k, params.typical_p, params.top_p, params.min_p)


def kept(logits: torch.Tensor, params: SamplingParams) -> set[int]:
    """What is drawn, of a row, when the draw goes through all that there is."""
    draws = [draw_of(params, i * 2**53 // 2000) for i in range(2000)]
    return set(cpu.draw_tokens(logits.expand(2000, -1), draws).tolist())


@pytest.mark.parametrize("vocab", VOCABS)
def test_the_highest_is_what_torch_finds(vocab: int) -> None:
    logits = logits_of(vocab, 5)
    logits[1] = -math.inf
    logits[2, vocab // 2] = math.inf
    values, tokens = cpu.highest(logits)
    assert torch.equal(values, logits.max(-1).values)
    assert torch.equal(logits.gather(1, tokens[:, None])[:, 0], values)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("at", [0, -1])
def test_a_row_with_a_nan_says_so_and_no_other(vocab: int, at: int) -> None:
    logits = logits_of(vocab, 3)
    logits[1, at] = math.nan
    values, _ = cpu.highest(logits)
    assert values.isnan().tolist() == [False, True, False]


def test_of_equal_logits_the_first_is_the_highest() -> None:
    logits = torch.zeros(1, 100)
    logits[0, [40, 70]] = 2.0
    assert cpu.highest(logits)[1].item() == 40


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("name", PARAMS)
def test_tokens_are_those_that_torch_draws(name: str, vocab: int) -> None:
    params, count = PARAMS[name], 64
    logits = logits_of(vocab, count, seed=vocab)
    logits[::3, ::2] = -math.inf
    logits[:, 0] = 1.0
    rows = [SamplerRow(params, i, ()) for i in range(count)]
    by_torch = sampler._drawn(torch.nn.functional.pad(logits, (0, -vocab % 4), value=-math.inf), rows, range(count))
    ours = sampler._drawn_by_kernel(logits, rows, range(count))
    # The two round weights differently: a draw may fall between them, or a token at the border of what is kept.
    assert (ours != by_torch).sum() <= 1
    assert logits.gather(1, ours[:, None]).isfinite().all()


@pytest.mark.parametrize("name", ["top_k", "top_p", "typical_p", "min_p", "all"])
@pytest.mark.parametrize("seed", range(4))
def test_what_can_be_drawn_is_what_the_slow_reference_keeps(name: str, seed: int) -> None:
    params = PARAMS[name]
    logits = logits_of(60, 1, seed)[0]
    choice = sampler_reference.choose(logits.tolist(), params)
    likely = {token for token, weight in choice.kept.items() if weight > 2e-3 * sum(choice.kept.values())}
    assert likely <= kept(logits, params) <= set(choice.kept)


def test_of_equal_tokens_all_stay_or_none() -> None:
    logits = torch.zeros(64)
    logits[:8] = 1.0
    assert kept(logits, SamplingParams(temperature=1.0, top_k=3)) == set(range(8))
    assert kept(logits, SamplingParams(temperature=1.0, top_p=0.05)) == set(range(8))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_alone_is_drawn_as_among_others(threads: int) -> None:
    before = cpu.num_threads()
    cpu.set_threads(threads)
    try:
        logits, params = logits_of(1000, 33), PARAMS["all"]
        draws = [draw_of(params, i * 2**53 // 33) for i in range(33)]
        together = cpu.draw_tokens(logits, draws)
        alone = [cpu.draw_tokens(logits[i : i + 1], draws[i : i + 1]).item() for i in range(33)]
        assert together.tolist() == alone
    finally:
        cpu.set_threads(before)


def test_tokens_come_as_often_as_their_weights_say() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    draws = [cpu.Draw(i * 2**53 // 1000, 1.0) for i in range(1000)]
    tokens = cpu.draw_tokens(logits.expand(1000, -1), draws)
    assert all(abs(count - 100 * (i + 1)) <= 1 for i, count in enumerate(tokens.bincount().tolist()))


@pytest.mark.parametrize(
    "draw", [cpu.Draw(1 << 53, 1.0), cpu.Draw(-1, 1.0), cpu.Draw(0, 0.0), cpu.Draw(0, 1.0, top_k=-1)]
)
def test_what_makes_no_draw_is_refused(draw: cpu.Draw) -> None:
    with pytest.raises(ValueError, match="draw must be in"):
        cpu.draw_tokens(torch.zeros(1, 8), [draw])


def test_logits_must_be_fp32_rows() -> None:
    with pytest.raises(ValueError, match=r"must be fp32 \[n, vocab\]"):
        cpu.highest(torch.zeros(2, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="one for each of 2 rows"):
        cpu.draw_tokens(torch.zeros(2, 8), [cpu.Draw(0, 1.0)])
