"""The decoder layers of a Llama-shaped model."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvservice.kernels.cpu.library import KvLayer, KvPart, KvStep
from kvservice.kernels.cpu.linear import PackedLinear
from kvservice.kernels.cpu.runtime import HEAD_DIM_STEP, address_of, check, loaded
from kvservice.kernels.cpu.step import Step


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
            addresses = [address_of(norm) for norm in norms]
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
        kernels = loaded()
        self._layer_pre, self._layer_post = kernels.kv_layer_pre, kernels.kv_layer_post
        self._attend, self._attend_parts, self._recall = kernels.kv_attend, kernels.kv_attend_parts, kernels.kv_recall
        self._layers = kernels.kv_layers

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
        check(out, self.dtype, tuple(step.q.shape), "out")
        check(lse, torch.float32, tuple(step.lse.shape), "lse")
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
