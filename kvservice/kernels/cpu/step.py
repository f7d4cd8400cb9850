"""What the layers of a step share: its rows, what its sequences attend to, and buffers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvservice.kernels.cpu.library import KvRecall, KvSequence, KvSharing, KvStep
from kvservice.kernels.cpu.runtime import address_of, check

if TYPE_CHECKING:
    from kvservice.kernels.cpu.layers import DecoderLayers


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
        check(arena, layers.dtype, (arena.shape[0], 16, layers.head_dim), "arena")
        check(cos, torch.float32, (cos.shape[0], cos.shape[1]), "cos")
        check(sin, torch.float32, tuple(cos.shape), "sin")
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
        check(positions, torch.int64, (rows,), "positions")
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
        check(sharing.cells, torch.int64, (rows, CELL_FIELDS), "cells")
        check(sharing.fetched, torch.int64, (1,), "fetched")
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
            check(sharing.far_queries, self.q.dtype, (queries, heads, dim), "far_queries")
        if recall is not None and sharing.chosen is not None:
            check(sharing.chosen, torch.int32, (queries, num_kv, recall.budget), "chosen")
        if recall is not None and sharing.key_slots is not None:
            check(sharing.key_slots, torch.int32, (num_kv, recall.budget), "key_slots")
        return KvSharing(
            cells=sharing.cells.data_ptr(),
            far_queries=address_of(sharing.far_queries),
            chosen=address_of(sharing.chosen),
            key_slots=address_of(sharing.key_slots),
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
            check(recall.slots, torch.int32, (self._num_cells, recall.budget // 16), "slots")
            check(recall.resident, torch.int32, (*recall.resident.shape[:2], 2, recall.budget), "resident")
        check(recall.counters, torch.int64, (3,), "counters")
        check(recall.groups, torch.int64, (recall.groups.numel(),), "groups")
        return KvRecall(
            codes=recall.codes.data_ptr(),
            codes_stride=recall.codes.stride(0),
            params=recall.params.data_ptr(),
            params_stride=recall.params.stride(0),
            groups=recall.groups.data_ptr(),
            slots=address_of(recall.slots),
            slots_stride=0 if recall.slots is None else recall.slots.stride(0),
            resident=address_of(recall.resident),
            counters=recall.counters.data_ptr(),
            num_groups=recall.groups.numel(),
            bits=recall.bits,
            budget=recall.budget,
        )


def _starts(counts: list[int]) -> list[int]:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts
