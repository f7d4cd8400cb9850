import torch

from kvservice.evaluation.bootstrap import bootstrap_interval


def test_the_interval_holds_the_mean_and_is_a_function_of_the_seed() -> None:
    texts = [torch.rand(64, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    low, high = bootstrap_interval(texts, seed=1)
    assert low < float(torch.stack(texts).mean()) < high
    assert bootstrap_interval(texts, seed=1) == (low, high)


def test_texts_that_differ_widen_the_interval_however_many_tokens_each_has() -> None:
    alike = [torch.full((512,), 0.5) for _ in range(4)]
    unlike = [torch.full((512,), value) for value in (0.1, 0.3, 0.7, 0.9)]
    low, high = bootstrap_interval(alike, seed=1)
    assert high - low < 1e-6
    low, high = bootstrap_interval(unlike, seed=1)
    assert high - low > 0.3


def test_a_text_shorter_than_a_block_counts() -> None:
    assert bootstrap_interval([torch.tensor([0.25, 0.75])], seed=1) == (0.5, 0.5)
