"""The runner of Llama-shaped models: torch operations only, few of them. Attention is the caller's.

Knows nothing of caches, sequences or files. It is also the reference of every faster path.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kvservice.models.base import Attend, LayerWeights, ModelSpec, ModelWeights
from kvservice.models.linear import Linear
from kvservice.models.rows import map_rows


@dataclass(frozen=True, slots=True)
class _Layer:
    norm1: Tensor
    qkv: Linear
    o: Linear
    norm2: Tensor
    gate_up: Linear
    down: Linear
    qk_norm: Tensor | None
    """[h + kv, d]: the weights of the query heads' norm, then those of the key heads'."""


class LlamaModel:
    """Runs new tokens through all layers.

    Args:
        spec: the model's figures.
        weights: taken over; `weights.layers` is read once. fp32 or bf16.
        device: where the weights are put and the work is done.
        row_block: computes everything but attention on blocks of so many rows. A token's hidden state and logits are
            then the same bit for bit whatever other tokens are in the step, as long as the device, its libraries and
            the number of threads are the same, and `attend` keeps its side. None: all rows at once, which is faster.
    """

    def __init__(
        self, spec: ModelSpec, weights: ModelWeights, device: torch.device, *, row_block: int | None = None
    ) -> None:
        self.spec = spec
        self.device = device
        self.row_block = row_block
        self.is_deterministic = row_block is not None
        self._silu = F.silu if row_block is None else _silu_by_exp
        self._embed = weights.embed.to(device)
        self._norm = weights.norm.to(device)
        self._layers = [_place(layer, spec, device) for layer in weights.layers]
        # Not packed: packing gains nothing at this width, and a tied head would lie in memory twice.
        self._lm_head = self._embed if spec.tie_embeddings else weights.lm_head.to(device)
        self._cos, self._sin = _rope_tables(spec, self.dtype, device)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, keys, values and hidden states."""
        return self._embed.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights on the device; tied embeddings count once."""
        tensors = [self._embed, self._norm]
        if not self.spec.tie_embeddings:
            tensors.append(self._lm_head)
        linears: list[Linear] = []
        for layer in self._layers:
            tensors += [layer.norm1, layer.norm2]
            if layer.qk_norm is not None:
                tensors.append(layer.qk_norm)
            linears += [layer.qkv, layer.o, layer.gate_up, layer.down]
        return sum(tensor.nbytes for tensor in tensors) + sum(linear.num_bytes for linear in linears)

    def embed(self, token_ids: Tensor) -> Tensor:
        """See `Model`."""
        return self._embed[token_ids]

    def forward(self, x: Tensor, positions: Tensor, attend: Attend, layers: range | None = None) -> Tensor:
        """See `Model`. `attend` is called once for each layer."""
        num_heads = self.spec.shape.num_heads
        cos, sin = self._cos[positions], self._sin[positions]
        for index in range(len(self._layers)) if layers is None else layers:
            layer = self._layers[index]
            qk, v = map_rows(partial(self._before_attention, layer), self.row_block, x, cos, sin)
            out = attend(index, qk[:, :num_heads], qk[:, num_heads:], v)
            (x,) = map_rows(partial(self._after_attention, layer), self.row_block, x, out)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """See `Model`."""
        (logits,) = map_rows(self._head, self.row_block, x)
        return logits

    def _head(self, x: Tensor) -> tuple[Tensor]:
        return (F.linear(self._rms_norm(x, self._norm), self._lm_head).float(),)

    def _before_attention(self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[n, hidden] → rotated queries and keys [n, h + kv, d], values [n, kv, d]."""
        shape = self.spec.shape
        rotated_heads = shape.num_heads + shape.num_kv_heads
        qkv = layer.qkv(self._rms_norm(x, layer.norm1))
        qkv = qkv.view(-1, rotated_heads + shape.num_kv_heads, shape.head_dim)
        qk = qkv[:, :rotated_heads]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (shape.head_dim,), None, self.spec.norm_eps) * layer.qk_norm
        return _rotate(qk, cos.unsqueeze(1), sin.unsqueeze(1)), qkv[:, rotated_heads:]

    def _after_attention(self, layer: _Layer, x: Tensor, out: Tensor) -> tuple[Tensor]:
        """The layer's input [n, hidden] and attention's result [n, h, d] → the next layer's input."""
        x = x + layer.o(out.flatten(1))
        gate, up = torch.chunk(layer.gate_up(self._rms_norm(x, layer.norm2)), 2, dim=-1)
        return (x + layer.down(self._silu(gate) * up),)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.spec.shape.hidden_size,), weight, self.spec.norm_eps)


def _place(layer: LayerWeights, spec: ModelSpec, device: torch.device) -> _Layer:
    qk_norm = None
    if layer.q_norm is not None and layer.k_norm is not None:
        heads = [layer.q_norm] * spec.shape.num_heads + [layer.k_norm] * spec.shape.num_kv_heads
        qk_norm = torch.stack(heads).to(device)
    return _Layer(
        norm1=layer.norm1.to(device),
        qkv=Linear(layer.qkv.to(device), _to(layer.qkv_bias, device)),
        o=Linear(layer.o.to(device), _to(layer.o_bias, device)),
        norm2=layer.norm2.to(device),
        gate_up=Linear(layer.gate_up.to(device)),
        down=Linear(layer.down.to(device)),
        qk_norm=qk_norm,
    )


def _to(bias: Tensor | None, device: torch.device) -> Tensor | None:
    return bias if bias is None else bias.to(device)


def rope_angles(spec: ModelSpec) -> Tensor:
    """How far each position turns each pair of numbers of a head, fp32 [max_positions, d / 2]."""
    half = torch.arange(0, spec.shape.head_dim, 2, dtype=torch.float32)
    inverse_frequency = 1.0 / (spec.rope_theta ** (half / spec.shape.head_dim))
    return torch.outer(torch.arange(spec.shape.max_positions, dtype=torch.float32), inverse_frequency)


def _rope_tables(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """[max_positions, d] each. The first half of the sines is negated, so that `_rotate` need not negate."""
    angles = rope_angles(spec)
    cos, sin = angles.cos(), angles.sin()
    return (
        torch.cat([cos, cos], dim=-1).to(device=device, dtype=dtype),
        torch.cat([-sin, sin], dim=-1).to(device=device, dtype=dtype),
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    swapped = torch.roll(x, x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin)


def _silu_by_exp(x: Tensor) -> Tensor:
    """F.silu in steps whose rounding doesn't depend on where in memory an element lies.

    On a CPU F.silu itself computes what doesn't fill a vector by other code, and several threads may split a row
    anywhere: the last bit of an element then depends on the row's place. exp has one code for all elements, and the
    other steps round correctly.
    """
    exact = x.float()
    return (exact / torch.exp(-exact).add_(1)).to(x.dtype)
