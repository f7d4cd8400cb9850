"""Speed of the Triton kernels and of the runner made of them, with random weights and KV: no engine, no recall.

A decode step reads all weights and all KV once, so its attention is measured against a plain copy on the same device:
both are bound by memory. Knows nothing of real models' weights, which make no difference to speed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvservice.kernels.cpu import StepSequence
from kvservice.kernels.triton.operands import ArenaLayer, Queries
from kvservice.kernels.triton.paged import DecodeSpace, decode, programs_for
from kvservice.kernels.triton.tables import StepTables, step_numbers
from kvservice.models.base import LayerWeights, ModelSpec, ModelWeights
from kvservice.models.cuda_graphs import capture
from kvservice.models.cuda_llama import CudaLlama
from kvservice.types import BLOCK_TOKENS, SINK_TOKENS, ModelShape

SHAPES = {
    "smollm2-135m": ModelShape(30, 9, 3, 64, 576, 1536, 49_152, max_positions=1),
    "llama-3.1-8b": ModelShape(32, 32, 8, 128, 4096, 14_336, 128_256, max_positions=1),
    "tiny": ModelShape(2, 4, 2, 16, 64, 96, 128, max_positions=1),
}
"""Shapes by name. They get as many positions as are measured."""

_SPARE_BYTES = 2 << 30
"""Left free on a device, for buffers and what libraries take."""

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class KernelLoad:
    """What is measured.

    Attributes:
        contexts: tokens that each sequence holds.
        batches: sequences.
        prefill_tokens: of the chunk whose prefill is timed, at the end of a context.
        repeats: figures are medians over as many runs.
        copy_bytes: of the copy that is timed.
        seed: of weights and KV.
    """

    contexts: Sequence[int]
    batches: Sequence[int]
    prefill_tokens: int
    repeats: int
    copy_bytes: int
    seed: int


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One size of load; medians.

    Attributes:
        context_tokens: that each sequence holds.
        batch: sequences.
        decode_ms_per_token: time of one step of all sequences, logits included.
        output_tokens_per_s: of all sequences together.
        prefill_tokens_per_s: of a chunk at the end of one sequence's context.
        attention_ms: of all layers of a decode step.
        attention_gb_per_s: at which it reads keys and values.
        copy_fraction: that, as a fraction of the bytes that a copy reads and writes in the same time.
    """

    context_tokens: int
    batch: int
    decode_ms_per_token: float
    output_tokens_per_s: float
    prefill_tokens_per_s: float
    attention_ms: float
    attention_gb_per_s: float
    copy_fraction: float


@dataclass(frozen=True, slots=True)
class SkippedSize:
    """A size of load that the device has no memory for."""

    context_tokens: int
    batch: int
    reason: str


def copy_bytes_per_s(num_bytes: int, device: torch.device, repeats: int, clock: Clock = time.perf_counter) -> float:
    """Bytes that a copy of `num_bytes` reads and writes a second."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _median_s(lambda: target.copy_(source), device, repeats, clock)


def measure(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, load: KernelLoad, clock: Clock = time.perf_counter
) -> Iterator[KernelRow | SkippedSize]:
    """A row for each context and batch, with a model of random weights that is made when the first is asked for.

    Args:
        shape: of the model; its positions are taken from `load`.
        dtype: of weights and KV.
        device: one that the kernels run on.
        load: what is measured.
        clock: seconds.
    """
    generator = torch.Generator(device).manual_seed(load.seed)
    shape = replace(shape, max_positions=max(load.contexts) + 1, dtype_bytes=dtype.itemsize)
    model = CudaLlama(_spec(shape), _random_weights(shape, dtype, generator), device)
    copied = copy_bytes_per_s(load.copy_bytes, device, load.repeats, clock)
    for context in load.contexts:
        for batch in load.batches:
            needed = batch * context * shape.kv_bytes_per_token
            free = _free_bytes(device)
            if needed > free:
                yield SkippedSize(context, batch, f"needs {needed:,} bytes of KV, {free:,} are free")
                continue
            held = _Held(shape, dtype, generator, context, batch)
            yield _row(model, held, load, copied, clock)


class _Held:
    """Sequences that hold random KV in blocks in random order. Implements `StepAttention`, for decoding one token."""

    selects_by_torch = False

    def __init__(
        self, shape: ModelShape, dtype: torch.dtype, generator: torch.Generator, context: int, batch: int
    ) -> None:
        columns = -(-(context + 1) // BLOCK_TOKENS)
        num_blocks = batch * shape.num_cells * columns
        device = generator.device
        self.context, self.shape = context, shape
        self.cells = torch.empty(num_blocks, BLOCK_TOKENS, shape.head_dim, dtype=dtype, device=device)
        self.cells.normal_(generator=generator)
        order = torch.randperm(num_blocks, generator=generator, device=device, dtype=torch.int32)
        tables = order.view(batch, shape.num_cells, columns)
        self.decoding = [StepSequence(table, context, 1, row, SINK_TOKENS) for row, table in enumerate(tables)]
        self._now = self.decoding

    def near(self) -> Sequence[StepSequence]:
        return self._now

    def add_recalled(self, layer: int, q: Tensor, out: Tensor, lse: Tensor, *, by_keys: bool = False) -> None:
        raise NotImplementedError("nothing is recalled here")

    def decode(self, model: CudaLlama) -> Tensor:
        """Logits of one token of each sequence."""
        self._now = self.decoding
        tokens = torch.zeros(len(self.decoding), dtype=torch.int64, device=self.cells.device)
        return model.logits(model.forward(model.embed(tokens), torch.full_like(tokens, self.context), self))

    def prefill(self, model: CudaLlama, num_tokens: int) -> Tensor:
        """Reads the last tokens of the first sequence's context."""
        before = self.context - num_tokens
        self._now = [StepSequence(self.decoding[0].table, before, num_tokens, 0, SINK_TOKENS)]
        tokens = torch.zeros(num_tokens, dtype=torch.int64, device=self.cells.device)
        return model.forward(model.embed(tokens), torch.arange(before, self.context, device=self.cells.device), self)


def _row(model: CudaLlama, held: _Held, load: KernelLoad, copied: float, clock: Clock) -> KernelRow:
    device, batch = model.device, len(held.decoding)
    prefill_tokens = min(load.prefill_tokens, held.context)
    prefill_s = _median_s(lambda: held.prefill(model, prefill_tokens), device, load.repeats, clock)
    decode_s = _median_s(lambda: held.decode(model), device, load.repeats, clock)
    attention = _attention(held, device)
    attention_s = _median_s(capture(attention) if device.type == "cuda" else attention, device, load.repeats, clock)
    read_bytes_per_s = batch * held.context * held.shape.kv_bytes_per_token / attention_s
    return KernelRow(
        context_tokens=held.context,
        batch=batch,
        decode_ms_per_token=decode_s * 1e3,
        output_tokens_per_s=batch / decode_s,
        prefill_tokens_per_s=prefill_tokens / prefill_s,
        attention_ms=attention_s * 1e3,
        attention_gb_per_s=read_bytes_per_s / 1e9,
        copy_fraction=read_bytes_per_s / copied,
    )


def _attention(held: _Held, device: torch.device) -> Callable[[], None]:
    """The decode attention of all layers, one after the other: no layer finds its KV in a cache."""
    shape, batch, dtype = held.shape, len(held.decoding), held.cells.dtype
    q = torch.randn(batch, shape.num_heads, shape.head_dim, device=device).to(dtype)
    lse = torch.empty(batch, shape.num_heads, device=device)
    queries = Queries(q, shape.head_dim**-0.5, torch.empty_like(q), lse)
    tables = StepTables.over(step_numbers(held.decoding, batch).to(device))
    space = DecodeSpace(shape.num_heads, shape.num_kv_heads, shape.head_dim, device, programs_for(device))

    def attend() -> None:
        for layer in range(shape.num_layers):
            decode(queries, ArenaLayer(held.cells, layer, shape.num_kv_heads), tables, batch, space)

    return attend


def _median_s(work: Callable[[], object], device: torch.device, repeats: int, clock: Clock) -> float:
    """Seconds of a run; an untimed one comes first."""
    seconds = []
    for _ in range(1 + repeats):
        _finish(device)
        started = clock()
        work()
        _finish(device)
        seconds.append(clock() - started)
    return statistics.median(seconds[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 30
    torch.cuda.empty_cache()
    return max(0, torch.cuda.mem_get_info(device)[0] - _SPARE_BYTES)


def _spec(shape: ModelShape) -> ModelSpec:
    return ModelSpec(
        name="random",
        shape=shape,
        rope_theta=500_000.0,
        norm_eps=1e-5,
        eos_token_ids=frozenset(),
        origin="random weights",
        digest="random",
        tie_embeddings=False,
    )


def _random_weights(shape: ModelShape, dtype: torch.dtype, generator: torch.Generator) -> ModelWeights:
    device = generator.device
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim

    def matrix(out: int, width: int) -> Tensor:
        return torch.empty(out, width, dtype=dtype, device=device).normal_(std=width**-0.5, generator=generator)

    def layers() -> Iterator[LayerWeights]:
        for _ in range(shape.num_layers):
            yield LayerWeights(
                norm1=torch.ones(shape.hidden_size, device=device),
                qkv=matrix(heads, shape.hidden_size),
                o=matrix(shape.hidden_size, shape.num_heads * shape.head_dim),
                norm2=torch.ones(shape.hidden_size, device=device),
                gate_up=matrix(2 * shape.intermediate_size, shape.hidden_size),
                down=matrix(shape.hidden_size, shape.intermediate_size),
            )

    return ModelWeights(
        embed=matrix(shape.vocab_size, shape.hidden_size),
        layers=layers(),
        norm=torch.ones(shape.hidden_size, device=device),
        lm_head=matrix(shape.vocab_size, shape.hidden_size),
    )
