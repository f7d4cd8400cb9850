"""A model whose layers can be differentiated, with changes to their matrices that are trained. Knows no texts.

Computes what `LlamaModel` computes, in operations that autograd knows. Weights themselves never change: what is
trained lies beside them, in fp32, and is made bf16 where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kvservice.models.adapter import LowRank, MatrixChange
from kvservice.models.base import LayerWeights, ModelSpec, ModelWeights
from kvservice.models.llama import rope_angles
from kvservice.training.attention import Distant, SharedAttention

LayerChanges = Mapping[str, MatrixChange]
"""By the names of a layer's matrices: see `kvservice.models.adapter.MATRICES`."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What a text's tokens are after the model.

    Attributes:
        out: `[n, hidden]`, after the last layer and the norm.
        states: after each layer, if they were asked for.
    """

    out: Tensor
    states: Sequence[Tensor] = ()


class Network:
    """A model, whole texts at a time.

    Args:
        spec: the model's figures.
        weights: taken over; kept as they are.
        device: where they are put.
    """

    def __init__(self, spec: ModelSpec, weights: ModelWeights, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self.embed = weights.embed.to(device)
        self.head = self.embed if spec.tie_embeddings else weights.lm_head.to(device)
        self.layers = [_place(layer, device) for layer in weights.layers]
        self._norm = weights.norm.to(device)
        angles = rope_angles(spec).to(device)
        dtype = self.embed.dtype
        self._cos = torch.cat([angles.cos()] * 2, -1).to(dtype).unsqueeze(1)
        self._sin = torch.cat([-angles.sin(), angles.sin()], -1).to(dtype).unsqueeze(1)

    def run(
        self,
        token_ids: Tensor,
        attention: SharedAttention,
        changes: Mapping[int, LayerChanges],
        *,
        recompute: bool = False,
        keep_states: bool = False,
    ) -> Pass:
        """Takes one text through all layers.

        Args:
            token_ids: int64 `[n]`.
            attention: how tokens attend to one another.
            changes: of layers' matrices; those that aren't named stay as they are.
            recompute: keeps no more than each layer's input for the backward pass, which runs layers again.
            keep_states: whether layers' outputs are wanted.
        """
        x = self.embed[token_ids.to(self.device)]
        distant: Distant | None = None
        states = []
        for index in range(len(self.layers)):
            mine = changes.get(index, {})
            if recompute and torch.is_grad_enabled():
                x, distant = checkpoint(self._layer, index, x, attention, distant, mine, use_reentrant=False)
            else:
                x, distant = self._layer(index, x, attention, distant, mine)
            if keep_states:
                states.append(x)
        return Pass(self._rms_norm(x, self._norm), states)

    def _layer(
        self, index: int, x: Tensor, attention: SharedAttention, distant: Distant | None, changes: LayerChanges
    ) -> tuple[Tensor, Distant | None]:
        layer, shape = self.layers[index], self.spec.shape
        count, rotated = x.shape[0], shape.num_heads + shape.num_kv_heads
        qkv = _product(self._rms_norm(x, layer.norm1), layer.qkv, layer.qkv_bias, changes.get("qkv"))
        heads = qkv.view(count, -1, shape.head_dim)
        q, k, v = heads[:, : shape.num_heads], heads[:, shape.num_heads : rotated], heads[:, rotated:]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = F.rms_norm(q, (shape.head_dim,), layer.q_norm, self.spec.norm_eps)
            k = F.rms_norm(k, (shape.head_dim,), layer.k_norm, self.spec.norm_eps)
        out, distant = attention(index, self._rotate(q), self._rotate(k), v, distant)
        x = x + _product(out.flatten(1), layer.o, layer.o_bias, changes.get("o"))
        gate_up = _product(self._rms_norm(x, layer.norm2), layer.gate_up, None, changes.get("gate_up"))
        gate, up = gate_up.chunk(2, dim=-1)
        return x + _product(F.silu(gate) * up, layer.down, None, changes.get("down")), distant

    def _rotate(self, x: Tensor) -> Tensor:
        cos, sin = self._cos[: x.shape[0]], self._sin[: x.shape[0]]
        return torch.addcmul(x * cos, torch.roll(x, x.shape[-1] // 2, dims=-1), sin)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.spec.norm_eps)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, change: MatrixChange | None) -> Tensor:
    if change is None:
        return F.linear(x, weight, bias)
    if isinstance(change, LowRank):
        return F.linear(x, weight, bias) + F.linear(F.linear(x, change.a.to(x.dtype)), change.b.to(x.dtype))
    # Rounded as the served weights will be.
    return F.linear(x, (weight.float() + change).to(x.dtype), bias)


def _place(layer: LayerWeights, device: torch.device) -> LayerWeights:
    def to(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None else tensor.to(device)

    return LayerWeights(
        norm1=layer.norm1.to(device),
        qkv=layer.qkv.to(device),
        o=layer.o.to(device),
        norm2=layer.norm2.to(device),
        gate_up=layer.gate_up.to(device),
        down=layer.down.to(device),
        qkv_bias=to(layer.qkv_bias),
        o_bias=to(layer.o_bias),
        q_norm=to(layer.q_norm),
        k_norm=to(layer.k_norm),
    )
