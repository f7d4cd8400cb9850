"""Which decode steps are recorded, and when. Recording itself needs a GPU: tests/conformance/test_triton.py."""

from __future__ import annotations

import pytest
import torch

from kvservice.models.cuda_graphs import GRAPH_SIZES, StepGraphs, capture


class Recorder:
    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.replayed: list[int] = []

    def __call__(self, size: int):
        self.recorded.append(size)
        return lambda: self.replayed.append(size)


def test_a_step_takes_the_smallest_size_that_holds_it() -> None:
    graphs = StepGraphs(Recorder())
    assert [graphs.size_for(rows) for rows in (1, 2, 3, 5, 8, 9, 250, 256)] == [1, 2, 4, 8, 8, 16, 256, 256]
    assert graphs.size_for(257) is None
    assert list(GRAPH_SIZES) == sorted(set(GRAPH_SIZES))


def test_a_size_is_recorded_once_and_replayed_each_time() -> None:
    recorder = Recorder()
    graphs = StepGraphs(recorder, (1, 4))
    for size in (4, 1, 4, 4):
        graphs.replay(size)
    assert recorder.recorded == [4, 1]
    assert recorder.replayed == [4, 1, 4, 4]
    assert graphs.recorded == (1, 4)


def test_what_was_recorded_is_void_when_memory_has_moved() -> None:
    recorder = Recorder()
    graphs = StepGraphs(recorder)
    graphs.replay(8)
    graphs.clear()
    assert graphs.recorded == ()
    graphs.replay(8)
    assert recorder.recorded == [8, 8]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="recording a CUDA graph needs a CUDA device")
def test_a_captured_step_reads_what_is_there_when_it_is_replayed() -> None:
    x, y = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
    replay = capture(lambda: torch.mul(x, 2, out=y))
    x.fill_(5)
    replay()
    assert y.eq(10).all()
