"""The runner of Llama-shaped models on CUDA devices, by Triton and cuBLAS. Knows nothing of caches' bookkeeping.

It gives what `llama` gives, within rounding: residuals stay in fp32 between layers, everything else is rounded where
`llama` rounds. A layer is four matrix products and half a dozen kernels, for all sequences and heads at once. Steps in
which every sequence decodes one token from what is on the device are recorded and replayed (`cuda_graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvservice.kernels.cpu import StepSequence
from kvservice.kernels.triton.checks import check_device
from kvservice.kernels.triton.gating import silu_mul
from kvservice.kernels.triton.norm import add_rms_norm
from kvservice.kernels.triton.operands import ArenaLayer, Queries
from kvservice.kernels.triton.paged import PREFILL_ROWS, DecodeSpace, decode, prefill, programs_for
from kvservice.kernels.triton.rope import HeadNorms, Rotation, rotate_and_store
from kvservice.kernels.triton.staged import attend_staged, stage
from kvservice.kernels.triton.tables import StepTables, step_numbers, table_numbers, tiles_of
from kvservice.models.base import LayerWeights, ModelSpec, ModelWeights
from kvservice.models.cuda_graphs import StepGraphs, capture
from kvservice.models.llama import rope_angles
from kvservice.recall.distant import TILE_TOKENS, staging_blocks
from kvservice.types import GROUP_TOKENS

STAGED_GROUPS = 2 * TILE_TOKENS // GROUP_TOKENS
"""Groups of one layer that are on the device at a time while queries attend to all tokens: both tiles of the ring."""

LEAST_ROWS = 256
"""Rows that buffers are made for at first, so that a growing batch doesn't make them again and again."""


class StepAttention(Protocol):
    """What the runner asks of a step's attention; `BatchAttention` has it."""

    @property
    def cells(self) -> Tensor:
        """The arena, `[blocks, 16, d]`."""

    @property
    def selects_by_torch(self) -> bool:
        """Whether sequences recall by what `near` doesn't describe."""

    def near(self) -> Sequence[StepSequence]:
        """What each sequence attends to."""

    def add_recalled(self, layer: int, q: Tensor, out: Tensor, lse: Tensor, *, by_keys: bool = False) -> None:
        """Merges what sequences recall into `out` `[n, h, d]`, given its log-sum-exp `[n, h]`."""


@dataclass(frozen=True, slots=True)
class _Layer:
    norm1: Tensor
    qkv: Tensor
    o: Tensor
    norm2: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None
    o_bias: Tensor | None
    head_norms: HeadNorms | None

    @property
    def num_bytes(self) -> int:
        tensors = [self.norm1, self.qkv, self.o, self.norm2, self.gate_up, self.down]
        tensors += [bias for bias in (self.qkv_bias, self.o_bias) if bias is not None]
        if self.head_norms is not None:
            tensors += [self.head_norms.query, self.head_norms.key]
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True, slots=True)
class _Buffers:
    """What a step of n rows works in. The memory outlasts the step."""

    positions: Tensor
    numbers: Tensor
    entry: Tensor
    x: Tensor
    normed: Tensor
    qkv: Tensor
    queries: Queries
    added: Tensor
    gate_up: Tensor
    gated: Tensor

    def rows(self, n: int) -> _Buffers:
        """The same for the first n rows."""
        queries = self.queries
        return _Buffers(
            positions=self.positions[:n],
            numbers=self.numbers[: table_numbers(n)],
            entry=self.entry[:n],
            x=self.x[:n],
            normed=self.normed[:n],
            qkv=self.qkv[:n],
            queries=Queries(queries.q[:n], queries.scale, queries.out[:n], queries.lse[:n]),
            added=self.added[:n],
            gate_up=self.gate_up[:n],
            gated=self.gated[:n],
        )


@dataclass(frozen=True, slots=True)
class _Far:
    """Groups in host memory that some sequences attend to, a stage at a time.

    Attributes:
        stages: the addresses of each stage's groups, int64, and the spans of each sequence in it, `[sequences, 2]`.
        tiles: of those sequences.
    """

    stages: list[tuple[Tensor, Tensor]]
    tiles: Tensor


class CudaLlama:
    """Runs new tokens through all layers.

    Args:
        spec: the model's figures.
        weights: taken over; `weights.layers` is read once. fp32 or bf16.
        device: a CUDA device; a CPU where Triton's interpreter runs the kernels.

    Raises:
        ValueError: the kernels don't run on `device`.
    """

    def __init__(self, spec: ModelSpec, weights: ModelWeights, device: torch.device) -> None:
        check_device(device)
        shape = spec.shape
        self.spec = spec
        self.device = device
        self.is_deterministic = False
        self._embed = weights.embed.to(device)
        self._norm = weights.norm.to(device, torch.float32)
        self._layers = [_place(layer, spec, device) for layer in weights.layers]
        self._lm_head = self._embed if spec.tie_embeddings else weights.lm_head.to(device)
        angles = rope_angles(spec).to(device)
        self._rotation = Rotation(angles.cos(), angles.sin())
        heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
        self._space = DecodeSpace(*heads, device, programs_for(device))
        self._graphs = StepGraphs(self._record)
        self._arena: Tensor | None = None
        self._buffers: _Buffers | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, keys and values."""
        return self._embed.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights on the device; tied embeddings count once."""
        head = 0 if self.spec.tie_embeddings else self._lm_head.nbytes
        return self._embed.nbytes + head + self._norm.nbytes + sum(layer.num_bytes for layer in self._layers)

    @property
    def recorded_sizes(self) -> tuple[int, ...]:
        """Rows of the decode steps that are recorded."""
        return self._graphs.recorded

    def embed(self, token_ids: Tensor) -> Tensor:
        """See `Model`. The residual stream is fp32."""
        return F.embedding(token_ids, self._embed).float()

    def forward(self, x: Tensor, positions: Tensor, attention: StepAttention, layers: range | None = None) -> Tensor:
        """See `Model`."""
        num_rows = x.shape[0]
        sequences = attention.near()
        is_plain = len(sequences) == num_rows and not _recalls(sequences, attention) and all(map(_is_near, sequences))
        size = self._graphs.size_for(num_rows) if is_plain and layers is None else None
        buffers = self._buffers_for(attention.cells, size or num_rows)
        buffers.entry[:num_rows] = x
        buffers.positions[:num_rows] = positions
        # What the last step left in the other rows may be no position of this model: zero is.
        buffers.entry[num_rows:] = 0
        buffers.positions[num_rows:] = 0
        buffers.numbers.copy_(step_numbers(sequences, size or num_rows))
        if size is not None:
            self._graphs.replay(size)
        else:
            span = range(len(self._layers)) if layers is None else layers
            self._run(buffers, span, self._mixed_attention(buffers, sequences, attention))
            if self.device.type == "cuda" and not all(map(_is_near, sequences)):
                # Once the step is over, groups in host memory may be overwritten at any time.
                torch.cuda.current_stream(self.device).synchronize()
        return buffers.x[:num_rows]

    def logits(self, x: Tensor) -> Tensor:
        """See `Model`."""
        normed = torch.empty_like(x, dtype=self.dtype)
        add_rms_norm(x, None, self._norm, self.spec.norm_eps, normed)
        return F.linear(normed, self._lm_head).float()

    # -- one step ----------------------------------------------------------------------------------------------------

    def _run(self, buffers: _Buffers, layers: range, attend: Callable[[int, ArenaLayer], None]) -> None:
        """Takes `buffers.entry` through layers, to `buffers.x`. `attend` fills `queries.out`."""
        assert self._arena is not None
        b, q = buffers, buffers.queries
        tables = StepTables.over(b.numbers)
        eps, num_kv = self.spec.norm_eps, self.spec.shape.num_kv_heads
        # A copy: recording does the work more than once.
        b.x.copy_(b.entry)
        added: Tensor | None = None
        for index in layers:
            layer = self._layers[index]
            kv = ArenaLayer(self._arena, index, num_kv)
            add_rms_norm(b.x, added, layer.norm1, eps, b.normed)
            _product(b.normed, layer.qkv, layer.qkv_bias, b.qkv)
            rotate_and_store(b.qkv, b.positions, self._rotation, layer.head_norms, tables, kv, q.q)
            attend(index, kv)
            _product(q.out.flatten(1), layer.o, layer.o_bias, b.added)
            add_rms_norm(b.x, b.added, layer.norm2, eps, b.normed)
            _product(b.normed, layer.gate_up, None, b.gate_up)
            silu_mul(b.gate_up, b.gated)
            _product(b.gated, layer.down, None, b.added)
            added = b.added
        b.x.add_(b.added)

    def _record(self, size: int) -> Callable[[], None]:
        """A step of `size` sequences that decode one token each from the arena."""
        assert self._buffers is not None
        buffers = self._buffers.rows(size)
        tables = StepTables.over(buffers.numbers)

        def work() -> None:
            layers = range(len(self._layers))
            self._run(buffers, layers, lambda _, kv: decode(buffers.queries, kv, tables, size, self._space))

        return capture(work) if self.device.type == "cuda" else work

    def _mixed_attention(
        self, buffers: _Buffers, sequences: Sequence[StepSequence], attention: StepAttention
    ) -> Callable[[int, ArenaLayer], None]:
        """Attention of a step in which sequences have many queries, or attend to more than the arena."""
        queries, tables = buffers.queries, StepTables.over(buffers.numbers)
        counts = torch.tensor([s.num_queries for s in sequences], dtype=torch.int64)
        num_singles = int((counts == 1).sum())
        tiles = self._tiles(counts, (counts > 1).nonzero()[:, 0])
        far = self._far(counts, sequences)
        recalls = _recalls(sequences, attention)

        def attend(index: int, kv: ArenaLayer) -> None:
            decode(queries, kv, tables, num_singles, self._space)
            prefill(queries, kv, tables, tiles)
            if far is not None:
                staged = self._staging(kv.arena)
                for addresses, spans in far.stages:
                    stage(addresses, index, staged)
                    attend_staged(queries, staged, spans, tables, far.tiles)
            if recalls:
                attention.add_recalled(index, queries.q, queries.out, queries.lse, by_keys=True)

        return attend

    def _far(self, counts: Tensor, sequences: Sequence[StepSequence]) -> _Far | None:
        """The groups of all sequences one after the other, cut into stages wherever a stage is full."""
        groups = [torch.empty(0, dtype=torch.int64) if s.groups is None else s.groups for s in sequences]
        num_groups = torch.tensor([len(addresses) for addresses in groups], dtype=torch.int64)
        which = num_groups.nonzero()[:, 0]
        if not which.numel():
            return None
        addresses = torch.cat(groups).to(self.device)
        last = num_groups.cumsum(0)
        stages = []
        for begin in range(0, addresses.numel(), STAGED_GROUPS):
            first = (last - num_groups - begin).clamp(0, STAGED_GROUPS)
            stop = (last - begin).clamp(0, STAGED_GROUPS)
            spans = torch.stack([first, stop - first], 1) * GROUP_TOKENS
            stages.append((addresses[begin : begin + STAGED_GROUPS], spans.to(self.device)))
        return _Far(stages, self._tiles(counts, which))

    def _tiles(self, counts: Tensor, which: Tensor) -> Tensor:
        shape = self.spec.shape
        return tiles_of(counts, which, shape.num_heads // shape.num_kv_heads, PREFILL_ROWS).to(self.device)

    # -- memory ------------------------------------------------------------------------------------------------------

    def _buffers_for(self, arena: Tensor, num_rows: int) -> _Buffers:
        """Made once for the arena, and again if a step has more rows than any before. Then recorded steps are void."""
        if self._buffers is None or self._arena is not arena or num_rows > self._buffers.x.shape[0]:
            self._arena = arena
            self._buffers = self._allocate(max(num_rows, LEAST_ROWS))
            self._graphs.clear()
        return self._buffers.rows(num_rows)

    def _allocate(self, n: int) -> _Buffers:
        shape, device, dtype = self.spec.shape, self.device, self.dtype
        heads = (n, shape.num_heads, shape.head_dim)
        qkv = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim

        def zeros(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return _Buffers(
            positions=zeros(n, dtype=torch.int64),
            numbers=zeros(table_numbers(n), dtype=torch.int64),
            entry=zeros(n, shape.hidden_size, dtype=torch.float32),
            x=zeros(n, shape.hidden_size, dtype=torch.float32),
            normed=zeros(n, shape.hidden_size),
            qkv=zeros(n, qkv),
            queries=Queries(
                zeros(*heads), shape.head_dim**-0.5, zeros(*heads), zeros(n, shape.num_heads, dtype=torch.float32)
            ),
            added=zeros(n, shape.hidden_size),
            gate_up=zeros(n, 2 * shape.intermediate_size),
            gated=zeros(n, shape.intermediate_size),
        )

    def _staging(self, arena: Tensor) -> Tensor:
        """Room for one stage, `[kv, tokens, K or V, d]`: the arena's staging ring as a whole, which rests meanwhile."""
        shape = self.spec.shape
        return arena[: staging_blocks(shape.num_kv_heads)].view(shape.num_kv_heads, -1, 2, shape.head_dim)


def _recalls(sequences: Sequence[StepSequence], attention: StepAttention) -> bool:
    return attention.selects_by_torch or any(sequence.recall is not None for sequence in sequences)


def _is_near(sequence: StepSequence) -> bool:
    return sequence.groups is None or not len(sequence.groups)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _place(layer: LayerWeights, spec: ModelSpec, device: torch.device) -> _Layer:
    def norm(weight: Tensor) -> Tensor:
        return weight.to(device, torch.float32)

    head_norms = None
    if layer.q_norm is not None and layer.k_norm is not None:
        head_norms = HeadNorms(norm(layer.q_norm), norm(layer.k_norm), spec.norm_eps)
    return _Layer(
        norm1=norm(layer.norm1),
        qkv=layer.qkv.to(device),
        o=layer.o.to(device),
        norm2=norm(layer.norm2),
        gate_up=layer.gate_up.to(device),
        down=layer.down.to(device),
        qkv_bias=None if layer.qkv_bias is None else layer.qkv_bias.to(device),
        o_bias=None if layer.o_bias is None else layer.o_bias.to(device),
        head_norms=head_norms,
    )
