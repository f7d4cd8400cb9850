"""Where the time of a decode step goes, beside what its bytes and its products take at this machine's own limits.

Contexts are drawn, not read (see `bench.context`): a decode step does the same over them. Attention's time is what a
step over the whole context takes more than one over hardly any.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvservice.attention.batch import BatchAttention
from kvservice.bench.context import measure_contexts
from kvservice.bench.wrapped import WrappedModel
from kvservice.config.recipes import DENSE
from kvservice.models.base import Model
from kvservice.types import ModelShape

READ_BYTES = 1 << 30
"""Of one read that tells the memory's speed: far more than caches hold."""

PRODUCT_SIZE = 2048
"""Rows, columns and depth of a product that tells the matrix units' speed."""

TRIES = 5
LEAST_CONTEXT = 16
LAYERS, ATTENTION, HEAD, REST = "products of the layers", "attention", "head", "tables, drawing, output"


@dataclass(frozen=True, slots=True)
class Limits:
    """What this machine can do at best, with the threads that torch was given."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a decode step.

    Attributes:
        ms: measured, median.
        num_bytes: weights or KV that it can't do without reading.
        flops: its multiplications and additions.
    """

    name: str
    ms: float
    num_bytes: int
    flops: int

    def byte_ms(self, limits: Limits) -> float:
        """Time its bytes take at the memory's own speed."""
        return self.num_bytes / limits.bytes_per_s * 1e3

    def flop_ms(self, limits: Limits) -> float:
        """Time its products take at the matrix units' own speed."""
        return self.flops / limits.flops_per_s * 1e3


@dataclass(frozen=True, slots=True)
class StepParts:
    """A decode step of `batch` dense sequences over `context_tokens` each. The parts make up the step."""

    batch: int
    context_tokens: int
    parts: tuple[Part, ...]

    @property
    def whole(self) -> Part:
        """The step."""
        return Part(
            "whole step",
            sum(part.ms for part in self.parts),
            sum(part.num_bytes for part in self.parts),
            sum(part.flops for part in self.parts),
        )


class TimedModel(WrappedModel):
    """A model that keeps what its layers and its head took, of steps that give `batch` rows alone.

    Args:
        model: does the work.
        batch: rows of a decode step.
    """

    def __init__(self, model: Model, batch: int) -> None:
        super().__init__(model)
        self._batch = batch
        self.layers_s: list[float] = []
        self.head_s: list[float] = []

    def forward(self, x: Tensor, positions: Tensor, attention: BatchAttention, layers: range | None = None) -> Tensor:
        """See `Model`."""
        started = time.perf_counter()
        x = super().forward(x, positions, attention, layers)
        if x.shape[0] == self._batch:
            self.layers_s.append(time.perf_counter() - started)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """See `Model`."""
        started = time.perf_counter()
        logits = super().logits(x)
        if x.shape[0] == self._batch:
            self.head_s.append(time.perf_counter() - started)
        return logits


def measure_limits() -> Limits:
    """The speed of reading memory, and of a large product in bf16: the best of a few tries. Takes a few seconds."""
    words = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    read_s = _best(words.sum)
    left, right = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE).bfloat16() for _ in range(2))
    product_s = _best(lambda: left @ right)
    return Limits(READ_BYTES / read_s, 2 * PRODUCT_SIZE**3 / product_s)


def measure_steps(
    model: Model, loads: Sequence[tuple[int, int]], new_tokens: int, report: Callable[[], None]
) -> list[StepParts]:
    """Splits decode steps into their parts. Blocks.

    Args:
        model: on a CPU, where a call returns when its work is done.
        loads: batch and context tokens of each.
        new_tokens: timed steps of each.
        report: called after each.
    """
    measured = []
    for batch, context in loads:
        measured.append(_measure(model, batch, context, new_tokens))
        report()
    return measured


def _measure(model: Model, batch: int, context: int, new_tokens: int) -> StepParts:
    short, long = TimedModel(model, batch), TimedModel(model, batch)
    measure_contexts(short, DENSE, [LEAST_CONTEXT], batch, new_tokens, repeats=1)
    step = measure_contexts(long, DENSE, [context], batch, new_tokens, repeats=1)[0]
    without, layers, head = (
        statistics.median(seconds) * 1e3 for seconds in (short.layers_s, long.layers_s, long.head_s)
    )
    shape = model.spec.shape
    weights = layer_weights(shape)
    head_weights = shape.vocab_size * shape.hidden_size
    return StepParts(
        batch,
        context,
        (
            Part(LAYERS, without, weights * shape.dtype_bytes, 2 * weights * batch),
            Part(
                ATTENTION,
                layers - without,
                batch * context * shape.kv_bytes_per_token,
                4 * batch * context * shape.num_heads * shape.head_dim * shape.num_layers,
            ),
            Part(HEAD, head, head_weights * shape.dtype_bytes, 2 * head_weights * batch),
            Part(REST, step.decode_ms_per_token - layers - head, 0, 0),
        ),
    )


def layer_weights(shape: ModelShape) -> int:
    """Entries of the matrices of all layers."""
    attention = shape.hidden_size * shape.head_dim * 2 * (shape.num_heads + shape.num_kv_heads)
    return shape.num_layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)


def _best(work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(TRIES):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
