"""CPU kernels in C++: packed linears, the halves of a decoder layer, attention over paged and contiguous KV.

This side checks tensors and hands their addresses over; it knows nothing of models, memory or scheduling. `isa()` is
"none" where the library isn't built or the machine is too old for it: then use torch.

A row's result depends on that row alone, bit for bit: not on how many rows a step has, on their order, or on the
number of threads; and where a `Step` is uniform, not on how a sequence's tokens were split into steps either. It does
depend on the instruction set.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvservice.kernels.cpu.library import (
    ISAS,
    KvDraw,
    KvLayer,
    KvLinear,
    KvPart,
    KvRecall,
    KvSequence,
    KvSharing,
    KvStep,
    library,
)

__all__ = [
    "ISAS",
    "DecoderLayers",
    "Draw",
    "LayerTensors",
    "PackedLinear",
    "Part",
    "Step",
    "StepRecall",
    "StepSequence",
    "StepSharing",
    "draw_tokens",
    "empty_bytes",
    "encode_keys",
    "highest",
    "isa",
    "limit_isa",
    "merge",
    "num_threads",
    "set_threads",
    "set_waiting",
]

HEAD_DIM_STEP = 8
"""A head's numbers must be a multiple of it."""

_DTYPES = {torch.bfloat16: 0, torch.float32: 1}


def isa() -> str:
    """The instruction set in use, one of `ISAS`; "none" where the kernels can't be used."""
    loaded = library()
    return "none" if loaded is None else loaded.kv_isa().decode()


def limit_isa(most: str) -> None:
    """Uses instruction sets up to `most` of `ISAS` from now on, for tests and tables. Packed matrices stay valid."""
    if most not in ISAS:
        raise ValueError(f"instruction set {most!r}: must be one of {', '.join(ISAS)}")
    if (loaded := library()) is not None:
        loaded.kv_limit_isa(most.encode())


def num_threads() -> int:
    """Threads that each call runs on, the caller's included."""
    return int(_loaded().kv_num_threads())


def set_threads(num_threads: int) -> None:
    """Sets the number of threads, from 1 on. Blocks until the running call ends."""
    if num_threads < 1:
        raise ValueError(f"num_threads={num_threads}: must be at least 1")
    _loaded().kv_set_threads(num_threads)


def set_waiting(spin_turns: int, yield_turns: int) -> None:
    """How long idle threads wait for the next call before they sleep: turns of spinning, then of yielding."""
    _loaded().kv_set_waiting(spin_turns, yield_turns)


def empty_bytes(num_bytes: int) -> Tensor:
    """Uninitialised memory, uint8 `[num_bytes]`, from a 64-byte border, or in 2 MiB pages where that is worth it.

    Attention over blocks that lie anywhere in an arena of such pages took 15 to 40 % less time.
    """
    huge_page = 2 << 20
    alignment = 64 if num_bytes < huge_page else huge_page
    memory = torch.empty(num_bytes + alignment, dtype=torch.uint8)
    start = -memory.data_ptr() % alignment
    aligned = memory[start : start + num_bytes]
    if alignment == huge_page:
        _loaded().kv_advise_huge(aligned.data_ptr(), num_bytes)
    return aligned


def _loaded() -> ctypes.CDLL:
    loaded = library()
    if loaded is None or isa() == "none":
        raise RuntimeError("the CPU kernels can't be used here: build them with `make kernels`, or use torch")
    return loaded


def _check(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> Tensor:
    if tensor.dtype is not dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        found = f"{tensor.dtype} {tuple(tensor.shape)}{'' if tensor.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"{name} is {found}: must be {dtype} {shape}, contiguous")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}: must be on the CPU")
    return tensor


class PackedLinear:
    """A [out, in] matrix in the kernels' own order, with its products.

    Args:
        weight: `[out, in]`, bf16 or fp32; not kept. Of a gated pair `[2 * out, in]`: gate rows, then up rows.
        bias: `[out]`, or None.
        is_gated: the product is `silu(gate) * up`.

    Attributes:
        num_bytes: of the packed weights.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, is_gated: bool = False) -> None:
        if weight.dtype not in _DTYPES:
            raise ValueError(f"weights are {weight.dtype}: must be torch.bfloat16 or torch.float32")
        if is_gated and bias is not None:
            raise ValueError("a gated pair takes no bias")
        rows, self.in_features = weight.shape
        self.out_features = rows // 2 if is_gated else rows
        self.dtype = weight.dtype
        weight = _check(weight.contiguous(), self.dtype, (rows, self.in_features), "weight")
        loaded, sizes = _loaded(), (self.out_features, self.in_features, _DTYPES[self.dtype], int(is_gated))
        self.num_bytes = int(loaded.kv_packed_bytes(*sizes))
        # Each row of 64 bytes is read as one vector or tile row, which is fastest when none crosses a cache line.
        self._packed = empty_bytes(self.num_bytes)
        loaded.kv_pack(weight.data_ptr(), *sizes, self._packed.data_ptr())
        self._bias = None if bias is None else bias.float().contiguous()
        self.record = KvLinear(
            packed=self._packed.data_ptr(),
            bias=_address(self._bias),
            in_features=self.in_features,
            out_features=self.out_features,
            dtype=_DTYPES[self.dtype],
            is_gated=int(is_gated),
        )

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """`[n, in]` in the weights' dtype to `[n, out]` in `out_dtype` (x's if None)."""
        _check(x, self.dtype, (x.shape[0], self.in_features), "x")
        out = torch.empty(x.shape[0], self.out_features, dtype=out_dtype or x.dtype)
        _loaded().kv_linear(
            ctypes.byref(self.record),
            x.data_ptr(),
            self.in_features,
            x.shape[0],
            out.data_ptr(),
            self.out_features,
            _DTYPES[out.dtype],
        )
        return out

    def of_normed(self, x: Tensor, norm: Tensor, eps: float, rows: Tensor) -> Tensor:
        """The product of some normed rows, in fp32: the head of a model.

        Args:
            x: fp32 `[n, in]`.
            norm: fp32 `[in]`.
            eps: of the norm.
            rows: int64 `[r]`, which rows of x.

        Returns:
            fp32 `[r, out]`.
        """
        _check(x, torch.float32, (x.shape[0], self.in_features), "x")
        _check(norm, torch.float32, (self.in_features,), "norm")
        _check(rows, torch.int64, (rows.shape[0],), "rows")
        out = torch.empty(rows.shape[0], self.out_features)
        _loaded().kv_norm_linear(
            ctypes.byref(self.record),
            norm.data_ptr(),
            eps,
            x.data_ptr(),
            rows.data_ptr(),
            rows.shape[0],
            out.data_ptr(),
        )
        return out


class LayerTensors(Protocol):
    """One decoder layer's weights, as `models.base.LayerWeights` has them."""

    @property
    def norm1(self) -> Tensor:
        """`[hidden]`."""

    @property
    def qkv(self) -> Tensor:
        """`[(h + 2 kv) * d, hidden]`: query heads, key heads, value heads."""

    @property
    def o(self) -> Tensor:
        """`[hidden, h * d]`."""

    @property
    def norm2(self) -> Tensor:
        """`[hidden]`."""

    @property
    def gate_up(self) -> Tensor:
        """`[2 * intermediate, hidden]`: gate rows, then up rows."""

    @property
    def down(self) -> Tensor:
        """`[hidden, intermediate]`."""

    @property
    def qkv_bias(self) -> Tensor | None:
        """`[(h + 2 kv) * d]`."""

    @property
    def o_bias(self) -> Tensor | None:
        """`[hidden]`."""

    @property
    def q_norm(self) -> Tensor | None:
        """`[d]`, for every query head; there if and only if `k_norm` is."""

    @property
    def k_norm(self) -> Tensor | None:
        """`[d]`."""


@dataclass(frozen=True, slots=True)
class StepRecall:
    """What a sequence's queries recall from.

    Attributes:
        codes: int32 `[layers * kv, columns]`, arena blocks of its low-bit keys, as `methods.key_index` lays them out;
            where keys are shared, a row for each (layer, KV head) that has some.
        params: likewise, of their quantisers.
        bits: of a number's code: 1, 2, 4 or 8.
        groups: int64 `[n]`, the addresses of all distant groups, as in `StepSequence`.
        budget: tokens that a query recalls in a KV head, a multiple of 16.
        slots: int32 `[cells, budget / 16]`, arena blocks of its recall slots; None where it has several queries.
        resident: int32 `[layers, kv, 2, budget]`, what is in the slots, as `recall.residency` has it; changed. None
            if and only if `slots` is.
        counters: int64 `[3]`, added to: tokens looked up in slots, tokens found there, bytes fetched from host memory.
    """

    codes: Tensor
    params: Tensor
    bits: int
    groups: Tensor
    budget: int
    slots: Tensor | None
    resident: Tensor | None
    counters: Tensor


CELL_FIELDS = 5


@dataclass(frozen=True, slots=True)
class StepSharing:
    """How a sequence shares distant keys between layers. Anchors write what their followers read in later layers.

    Its buffers belong to the tokens of the step, and stay while those are on their way through the layers.

    Attributes:
        cells: int64 `[layers * kv, 5]`, where each (layer, KV head) finds distant KV: the layer whose keys they are;
            the row of those in the tables of the index; the rows of `head_dim` numbers of token 0's key and of its
            value in a group; whether others use its keys. A token's rows lie two after those of the token before.
        until_slide: queries before the window slides; it does so again after each 64 more. What a query's own window
            doesn't hold is distant to it.
        far_queries: `[queries, h, d]`, what followers score distant tokens by; None: by their own queries.
        chosen: int32 `[queries, kv, budget]`, the tokens that were recalled; there if and only if some are.
        key_slots: int32 `[kv, budget]`, the slots of their keys; there if and only if there are slots.
        fetched: int64 `[1]`, added to: bytes that followers fetched into slots.
    """

    cells: Tensor
    until_slide: int
    fetched: Tensor
    far_queries: Tensor | None = None
    chosen: Tensor | None = None
    key_slots: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepSequence:
    """One sequence's share of a step.

    Attributes:
        table: int32 `[cells, columns]`, arena blocks; may be a view whose rows lie further apart. Covers the step's
            tokens too.
        num_resident: its tokens in the arena before the step.
        num_queries: its tokens of the step.
        first_row: of its tokens among the step's rows. Sequences follow one another in order.
        window_start: position of its 17th token in the arena.
        groups: int64 `[n]`, the addresses of all groups of 64 tokens between sinks and window, if the queries see them:
            `[layers, kv, 64, K or V, d]` each, in the dtype of the arena, or as `sharing` has it. None: they see sinks
            and window.
        recall: from what they recall besides, if they do; then `groups` is None.
        sharing: how layers share distant keys, if they do.
    """

    table: Tensor
    num_resident: int
    num_queries: int
    first_row: int
    window_start: int
    groups: Tensor | None = None
    recall: StepRecall | None = None
    sharing: StepSharing | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Keys and values of one sequence outside the arena, which all its queries see.

    Attributes:
        keys: `[kv, t, d]`, any strides but d contiguous.
        values: as `keys`, with the same strides.
        num_queries: rows of its queries.
        first_row: the first of them among the step's rows.
    """

    keys: Tensor
    values: Tensor
    num_queries: int
    first_row: int


class Step:
    """Buffers and figures that all layers of a step share, made once for steps of up to `max_rows` rows.

    Args:
        layers: whose steps these are.
        max_rows: most rows of a step.
        arena: `[blocks, 16, d]`, the memory of keys and values.
        cos: fp32 `[max_positions, rotary_dim / 2]`.
        sin: as cos. Number i of a head rotates with number `i + rotary_dim / 2`.
        scale: of the scores.
        uniform: a row's bits don't depend on how many queries its sequence has in the step either. Slower where they
            are few.

    Attributes:
        x: fp32 `[rows, hidden]`, the residual stream: put the embeddings here after `begin`.
        q: `[rows, h, d]`, rotated queries of the layer in work.
        attended: `[rows, h, d]`, what `attend` gave.
        lse: fp32 `[rows, h]`, its log-sum-exp.
    """

    def __init__(
        self,
        layers: DecoderLayers,
        max_rows: int,
        arena: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: float,
        *,
        uniform: bool = False,
    ) -> None:
        heads = (max_rows, layers.num_heads, layers.head_dim)
        _check(arena, layers.dtype, (arena.shape[0], 16, layers.head_dim), "arena")
        _check(cos, torch.float32, (cos.shape[0], cos.shape[1]), "cos")
        _check(sin, torch.float32, tuple(cos.shape), "sin")
        if scale <= 0:
            raise ValueError(f"scale={scale}: must be above 0")
        if 2 * cos.shape[1] > layers.head_dim:
            raise ValueError(f"cos turns {2 * cos.shape[1]} numbers of a head: it has {layers.head_dim}")
        self._max_positions = cos.shape[0]
        self.max_rows = max_rows
        self._buffers = (
            torch.empty(max_rows, layers.hidden_size),
            torch.empty(heads, dtype=layers.dtype),
            torch.empty(heads, dtype=layers.dtype),
            torch.empty(heads[:2]),
        )
        self._kept: list[object] = [arena, cos, sin]
        self._num_layers = layers.num_layers
        self._num_cells = 2 * layers.num_layers * layers.num_kv_heads
        self.record = KvStep(
            x=self._buffers[0].data_ptr(),
            q=self._buffers[1].data_ptr(),
            attended=self._buffers[2].data_ptr(),
            lse=self._buffers[3].data_ptr(),
            arena=arena.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            scale=scale,
            rotary_dim=2 * cos.shape[1],
            is_uniform=int(uniform),
        )
        self._set_rows(0)

    def begin(self, positions: Tensor, sequences: Sequence[StepSequence]) -> None:
        """Starts a step.

        Args:
            positions: int64 `[rows]`.
            sequences: of the rows, in order, leaving none out. Their tables may not move before the step's end.
        """
        rows = positions.shape[0]
        if rows > self.max_rows:
            raise ValueError(f"a step of {rows} rows: at most {self.max_rows}")
        _check(positions, torch.int64, (rows,), "positions")
        if rows and (int(positions.min()) < 0 or int(positions.max()) >= self._max_positions):
            raise ValueError(f"positions up to {int(positions.max())}: must lie in [0, {self._max_positions})")
        records = (KvSequence * len(sequences))(*[self._sequence_record(sequence) for sequence in sequences])
        if [s.first_row for s in sequences] + [rows] != _starts([s.num_queries for s in sequences]):
            raise ValueError(f"sequences don't make up the step's {rows} rows in order")
        self._kept[3:] = [positions, records, list(sequences)]
        self.record.sequences = records
        self.record.num_sequences = len(sequences)
        self.record.positions = positions.data_ptr()
        self._set_rows(rows)

    def _set_rows(self, rows: int) -> None:
        self.record.rows = rows
        self.x, self.q, self.attended, self.lse = (buffer[:rows] for buffer in self._buffers)

    def _sequence_record(self, sequence: StepSequence) -> KvSequence:
        table = sequence.table
        columns = -(-(sequence.num_resident + sequence.num_queries) // 16)
        if table.dtype is not torch.int32 or table.shape[0] != self._num_cells or table.shape[1] < columns:
            wanted = f"torch.int32 ({self._num_cells}, {columns} or more)"
            raise ValueError(f"table is {table.dtype} {tuple(table.shape)}: must be {wanted}")
        if table.stride(1) != 1 and columns > 1:
            raise ValueError(f"table has strides {table.stride()}: the second must be 1")
        recall = None if sequence.recall is None else ctypes.pointer(self._recall_record(sequence.recall, sequence))
        sharing = None if sequence.sharing is None else ctypes.pointer(self._sharing_record(sequence.sharing, sequence))
        return KvSequence(
            table=table.data_ptr(),
            table_stride=table.stride(0),
            num_resident=sequence.num_resident,
            num_queries=sequence.num_queries,
            first_row=sequence.first_row,
            window_start=sequence.window_start,
            groups=None if sequence.groups is None else sequence.groups.data_ptr(),
            num_groups=0 if sequence.groups is None else sequence.groups.numel(),
            recall=recall,
            sharing=sharing,
        )

    def _sharing_record(self, sharing: StepSharing, sequence: StepSequence) -> KvSharing:
        _, heads, dim = self.q.shape
        rows, queries, recall = self._num_cells // 2, sequence.num_queries, sequence.recall
        num_kv = rows // self._num_layers
        _check(sharing.cells, torch.int64, (rows, CELL_FIELDS), "cells")
        _check(sharing.fetched, torch.int64, (1,), "fetched")
        if sharing.until_slide < 1:
            raise ValueError(f"until_slide={sharing.until_slide}: the first query sees the sequence's own window")
        if recall is not None and queries > sharing.until_slide:
            raise ValueError(
                f"{queries} queries can't recall as if all saw one window: it slides after {sharing.until_slide}"
            )
        if (sharing.chosen is None) != (recall is None):
            raise ValueError("chosen tokens are kept if and only if the sequence recalls some")
        if (sharing.key_slots is None) != (recall is None or recall.slots is None):
            raise ValueError("slots of keys are kept if and only if there are slots")
        if sharing.far_queries is not None:
            _check(sharing.far_queries, self.q.dtype, (queries, heads, dim), "far_queries")
        if recall is not None and sharing.chosen is not None:
            _check(sharing.chosen, torch.int32, (queries, num_kv, recall.budget), "chosen")
        if recall is not None and sharing.key_slots is not None:
            _check(sharing.key_slots, torch.int32, (num_kv, recall.budget), "key_slots")
        return KvSharing(
            cells=sharing.cells.data_ptr(),
            far_queries=_address(sharing.far_queries),
            chosen=_address(sharing.chosen),
            key_slots=_address(sharing.key_slots),
            fetched=sharing.fetched.data_ptr(),
            until_slide=sharing.until_slide,
        )

    def _recall_record(self, recall: StepRecall, sequence: StepSequence) -> KvRecall:
        if recall.bits not in (1, 2, 4, 8):
            raise ValueError(f"keys of {recall.bits} bits: must be 1, 2, 4 or 8")
        if recall.budget < 16 or recall.budget % 16:
            raise ValueError(f"a budget of {recall.budget} tokens: must be a multiple of 16 from 16 on")
        if sequence.groups is not None:
            raise ValueError("a sequence that sees all its groups recalls nothing")
        has_slots = recall.slots is not None
        if has_slots != (recall.resident is not None) or (has_slots and sequence.num_queries > 1):
            raise ValueError("recall slots take the tokens of one query, and note what they hold")
        rows = self._num_cells // 2
        if sequence.sharing is not None:
            rows = int(sequence.sharing.cells[:, 1].max()) + 1
        for name, table in (("codes", recall.codes), ("params", recall.params)):
            if table.dtype is not torch.int32 or table.shape[0] != rows or table.stride(1) != 1:
                raise ValueError(f"{name} is {table.dtype} {tuple(table.shape)}: must be torch.int32 ({rows}, n)")
        if recall.slots is not None and recall.resident is not None:
            _check(recall.slots, torch.int32, (self._num_cells, recall.budget // 16), "slots")
            _check(recall.resident, torch.int32, (*recall.resident.shape[:2], 2, recall.budget), "resident")
        _check(recall.counters, torch.int64, (3,), "counters")
        _check(recall.groups, torch.int64, (recall.groups.numel(),), "groups")
        return KvRecall(
            codes=recall.codes.data_ptr(),
            codes_stride=recall.codes.stride(0),
            params=recall.params.data_ptr(),
            params_stride=recall.params.stride(0),
            groups=recall.groups.data_ptr(),
            slots=_address(recall.slots),
            slots_stride=0 if recall.slots is None else recall.slots.stride(0),
            resident=_address(recall.resident),
            counters=recall.counters.data_ptr(),
            num_groups=recall.groups.numel(),
            bits=recall.bits,
            budget=recall.budget,
        )


class DecoderLayers:
    """All decoder layers of a Llama-shaped model, packed.

    Args:
        layers: read once; not kept.
        num_heads: query heads.
        num_kv_heads: key heads, and value heads.
        head_dim: numbers of a head, a multiple of 8 up to 1,024.
        eps: of the norms.

    Attributes:
        num_bytes: of all packed weights and norms.
    """

    def __init__(
        self, layers: Iterable[LayerTensors], num_heads: int, num_kv_heads: int, head_dim: int, eps: float
    ) -> None:
        if head_dim % HEAD_DIM_STEP or not HEAD_DIM_STEP <= head_dim <= 1024:
            raise ValueError(f"head_dim={head_dim}: must be a multiple of 8 up to 1,024")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self._linears: list[tuple[PackedLinear, ...]] = []
        self._norms: list[tuple[Tensor | None, ...]] = []
        records = []
        for layer in layers:
            linears = (
                PackedLinear(layer.qkv, layer.qkv_bias),
                PackedLinear(layer.o, layer.o_bias),
                PackedLinear(layer.gate_up, is_gated=True),
                PackedLinear(layer.down),
            )
            norms = tuple(
                None if norm is None else norm.float().contiguous()
                for norm in (layer.norm1, layer.norm2, layer.q_norm, layer.k_norm)
            )
            self._linears.append(linears)
            self._norms.append(norms)
            addresses = [_address(norm) for norm in norms]
            packed = [linear.record for linear in linears]
            records.append(KvLayer(*packed, *addresses, eps, num_heads, num_kv_heads, head_dim))
        self.num_layers = len(records)
        self.hidden_size = self._linears[0][0].in_features
        self.dtype = self._linears[0][0].dtype
        self.num_bytes = sum(linear.num_bytes for linears in self._linears for linear in linears) + sum(
            4 * norm.numel() for norms in self._norms for norm in norms if norm is not None
        )
        self._records = (KvLayer * self.num_layers)(*records)
        self._pointers = [ctypes.pointer(record) for record in self._records]
        loaded = _loaded()
        self._layer_pre, self._layer_post = loaded.kv_layer_pre, loaded.kv_layer_post
        self._attend, self._attend_parts, self._recall = loaded.kv_attend, loaded.kv_attend_parts, loaded.kv_recall
        self._layers = loaded.kv_layers

    def pre(self, layer: int, step: Step) -> None:
        """From `step.x` to the layer's queries in `step.q`, and its keys and values in the arena."""
        self._layer_pre(self._pointers[layer], layer, ctypes.byref(step.record))

    def attend(self, layer: int, step: Step) -> None:
        """Attention of `step.q` over the sequences' tokens in the arena, causal, to `step.attended`, `step.lse`."""
        self._attend(self._pointers[layer], layer, ctypes.byref(step.record))

    def recall(self, layer: int, step: Step) -> None:
        """Adds to `step.attended` and `step.lse` what the sequences that recall from an index of keys recall."""
        self._recall(self._pointers[layer], layer, ctypes.byref(step.record))

    def attend_parts(self, parts: Sequence[Part], step: Step, out: Tensor, lse: Tensor) -> None:
        """Attention of `step.q` over one part of each of some sequences.

        Args:
            parts: at most one for each row.
            step: the step.
            out: as `step.attended`; rows of no part stay as they are.
            lse: fp32, as `step.lse`; minus infinity where a part is empty.
        """
        _check(out, self.dtype, tuple(step.q.shape), "out")
        _check(lse, torch.float32, tuple(step.lse.shape), "lse")
        records = (KvPart * len(parts))(*[self._part_record(part) for part in parts])
        record = KvStep.from_buffer_copy(step.record)
        record.attended, record.lse = out.data_ptr(), lse.data_ptr()
        self._attend_parts(self._pointers[0], records, len(parts), ctypes.byref(record))

    def post(self, layer: int, step: Step) -> None:
        """From `step.attended` through the layer's rest, added to `step.x`."""
        self._layer_post(self._pointers[layer], ctypes.byref(step.record))

    def run(self, step: Step, layers: range) -> None:
        """A span of layers, one after the other."""
        if layers.step != 1 or not 0 <= layers.start <= layers.stop <= self.num_layers:
            raise ValueError(f"layers={layers}: must be a span of {self.num_layers}")
        self._layers(self._records, layers.start, layers.stop, ctypes.byref(step.record))

    def _part_record(self, part: Part) -> KvPart:
        keys, values = part.keys, part.values
        shape = (self.num_kv_heads, keys.shape[1], self.head_dim)
        for tensor in (keys, values):
            if tuple(tensor.shape) != shape or tensor.dtype is not self.dtype or tensor.stride(2) != 1:
                raise ValueError(
                    f"a part of {tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}: must be "
                    f"{self.dtype} {shape}, contiguous in the last"
                )
        if keys.stride() != values.stride():
            raise ValueError(f"keys have strides {keys.stride()}, values {values.stride()}: must be the same")
        return KvPart(
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            head_stride=keys.stride(0),
            token_stride=keys.stride(1),
            num_tokens=keys.shape[1],
            num_queries=part.num_queries,
            first_row=part.first_row,
        )


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """Merges partial attention over disjoint tokens into the first, `outs[0]` and `lses[0]`.

    Args:
        outs: `[..., d]` each. Whatever stands in rows that saw nothing is ignored.
        lses: fp32 `[...]` each; minus infinity in rows that saw nothing.
    """
    first = outs[0]
    for out, lse in zip(outs, lses, strict=True):
        _check(out, first.dtype, tuple(first.shape), "out")
        _check(lse, torch.float32, tuple(first.shape[:-1]), "lse")
    count = len(outs)
    _loaded().kv_merge(
        (ctypes.c_void_p * count)(*[out.data_ptr() for out in outs]),
        (ctypes.c_void_p * count)(*[lse.data_ptr() for lse in lses]),
        count,
        lses[0].numel(),
        first.shape[-1],
        _DTYPES[first.dtype],
    )


def encode_keys(keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Low-bit codes of keys, bit for bit those of `methods.key_index`, which says how they lie.

    Args:
        keys: `[n, 64, d]`, bf16 or fp32, d a multiple of 8.
        bits: 1, 2, 4 or 8.

    Returns:
        Codes, uint8 `[n, 64 * d * bits / 8]`, and params, `[n, 2, d]` in the keys' dtype.
    """
    count, tokens, dim = keys.shape
    if tokens != 64 or dim % HEAD_DIM_STEP or bits not in (1, 2, 4, 8) or keys.dtype not in _DTYPES:
        raise ValueError(f"{bits} bits of keys {keys.dtype} {tuple(keys.shape)}: must be 1, 2, 4 or 8 of [n, 64, 8 i]")
    keys = keys.contiguous()
    codes = torch.empty(count, tokens * dim * bits // 8, dtype=torch.uint8)
    params = keys.new_empty(count, 2, dim)
    _loaded().kv_encode_keys(
        keys.data_ptr(), count, dim, bits, _DTYPES[keys.dtype], codes.data_ptr(), params.data_ptr()
    )
    return codes, params


def highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit of each row, and the first token that has it.

    Args:
        logits: fp32 `[n, vocab]`, contiguous in the last.

    Returns:
        fp32 and int64 `[n]`. A row with a NaN gives NaN, and any token.
    """
    rows, vocab = _logits_shape(logits)
    values, tokens = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    _loaded().kv_highest(logits.data_ptr(), logits.stride(0), rows, vocab, values.data_ptr(), tokens.data_ptr())
    return values, tokens


@dataclass(frozen=True, slots=True)
class Draw:
    """How a row's token is drawn.

    Attributes:
        draw: below 2^53: how far into the weights of what stays, in the order of token ids.
        temperature: above 0.
        top_k: so many of the likeliest stay; 0: all.
        typical_p: the most typical ones that have this share of all weight stay; from 1 on: all.
        top_p: the likeliest ones that have this share stay; from 1 on: all.
        min_p: those stay that have this share of the likeliest one's weight; 0: all.
    """

    draw: int
    temperature: float
    top_k: int = 0
    typical_p: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0


def draw_tokens(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Draws a token for each row.

    Args:
        logits: fp32 `[n, vocab]`, contiguous in the last; no NaN, and a finite one in each row.
        draws: one for each row.

    Returns:
        int64 `[n]`.
    """
    rows, vocab = _logits_shape(logits)
    if len(draws) != rows:
        raise ValueError(f"{len(draws)} draws: must be one for each of {rows} rows")
    for each in draws:
        if not 0 <= each.draw < 1 << 53 or each.temperature <= 0 or each.top_k < 0:
            raise ValueError(f"{each}: draw must be in [0, 2^53), temperature above 0, top_k at least 0")
    records = (KvDraw * rows)(
        *[KvDraw(each.draw, each.typical_p, each.top_p, each.min_p, each.temperature, each.top_k) for each in draws]
    )
    tokens = torch.empty(rows, dtype=torch.int64)
    _loaded().kv_draw(logits.data_ptr(), logits.stride(0), records, rows, vocab, tokens.data_ptr())
    return tokens


def _logits_shape(logits: Tensor) -> tuple[int, int]:
    rows, vocab = logits.shape
    if logits.dtype is not torch.float32 or vocab < 1 or (vocab > 1 and logits.stride(1) != 1):
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}: must be fp32 [n, vocab], contiguous")
    return rows, vocab


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _starts(counts: list[int]) -> list[int]:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts
