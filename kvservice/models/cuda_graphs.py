"""Work on a CUDA device recorded once for each size of batch and then replayed as a whole. Knows nothing of the work.

A decode step of a small model is hundreds of launches, each of which costs the host more than the device takes for it.
A recorded graph is one launch. It reads and writes the same memory each time, so a step's numbers are put there first,
and its size is fixed: steps are filled up to the next size that is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Replay = Callable[[], None]

GRAPH_SIZES = (1, 2, 4, *range(8, 257, 8))
"""Rows that graphs are recorded for: few sizes, little filling."""


class StepGraphs:
    """The recorded steps.

    Args:
        record: makes the replay of a step of so many rows.
        sizes: numbers of rows, ascending.
    """

    def __init__(self, record: Callable[[int], Replay], sizes: Sequence[int] = GRAPH_SIZES) -> None:
        self._record = record
        self._sizes = tuple(sizes)
        self._replays: dict[int, Replay] = {}

    @property
    def recorded(self) -> tuple[int, ...]:
        """Sizes that are recorded, ascending."""
        return tuple(sorted(self._replays))

    def size_for(self, num_rows: int) -> int | None:
        """Rows of the smallest graph that holds `num_rows`; None: no graph is so large."""
        return next((size for size in self._sizes if size >= num_rows), None)

    def replay(self, size: int) -> None:
        """Does the step of `size` rows, recording it first if that hasn't been done."""
        if size not in self._replays:
            self._replays[size] = self._record(size)
        self._replays[size]()

    def clear(self) -> None:
        """Forgets all: memory that they use has moved."""
        self._replays.clear()


def capture(work: Callable[[], None]) -> Replay:
    """Records work on the current CUDA device.

    It is done twice beforehand, so that kernels are compiled and libraries have their workspaces: it must come to the
    same however often it is done. Other threads may use the device meanwhile.
    """
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        work()
        work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    replay: Replay = graph.replay
    return replay
