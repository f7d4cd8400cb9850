"""The runner of Llama-shaped models: torch operations only, few of them. Attention is the caller's.

Knows nothing of caches, sequences or files. It is also the reference of every faster path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvservice.models.base import Attend, LayerWeights, ModelSpec, ModelWeights
from kvservice.models.linear import Linear


@dataclass(frozen=True, slots=True)
class _Layer:
    norm1: Tensor
    qkv: Linear
    o: Linear
    norm2: Tensor
    gate_up: Linear
    down: Linear


class LlamaModel:
    """Runs new tokens through all layers.

    Args:
        spec: the model's figures.
        weights: taken over; `weights.layers` is read once. fp32 or bf16.
        device: where the weights are put and the work is done.
    """

    def __init__(self, spec: ModelSpec, weights: ModelWeights, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self._embed = weights.embed.to(device)
        self._norm = weights.norm.to(device)
        self._layers = [_place(layer, device) for layer in weights.layers]
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
            linears += [layer.qkv, layer.o, layer.gate_up, layer.down]
        return sum(t.numel() * t.element_size() for t in tensors) + sum(linear.num_bytes for linear in linears)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The hidden states of the new tokens after the final norm.

        Args:
            token_ids: [n] int64, the new tokens of all sequences one after the other.
            positions: [n] int64, each token's place in its own sequence, below `max_positions`.
            attend: called once for each layer.

        Returns:
            [n, hidden].
        """
        shape, eps = self.spec.shape, self.spec.norm_eps
        num_tokens = token_ids.shape[0]
        rotated_heads = shape.num_heads + shape.num_kv_heads
        cos = self._cos[positions].unsqueeze(1)
        sin = self._sin[positions].unsqueeze(1)
        x = self._embed[token_ids]
        for index, layer in enumerate(self._layers):
            normed = F.rms_norm(x, (shape.hidden_size,), layer.norm1, eps)
            qkv = layer.qkv(normed).view(num_tokens, rotated_heads + shape.num_kv_heads, shape.head_dim)
            qk = _rotate(qkv[:, :rotated_heads], cos, sin)
            out = attend(index, qk[:, : shape.num_heads], qk[:, shape.num_heads :], qkv[:, rotated_heads:])
            x = x + layer.o(out.reshape(num_tokens, shape.num_heads * shape.head_dim))
            normed = F.rms_norm(x, (shape.hidden_size,), layer.norm2, eps)
            gate, up = torch.chunk(layer.gate_up(normed), 2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        return F.rms_norm(x, (shape.hidden_size,), self._norm, eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[r, hidden] → [r, vocab] in fp32. Pass only the rows whose next token is wanted."""
        return F.linear(hidden, self._lm_head).float()


def _place(layer: LayerWeights, device: torch.device) -> _Layer:
    return _Layer(
        norm1=layer.norm1.to(device),
        qkv=Linear(layer.qkv.to(device)),
        o=Linear(layer.o.to(device)),
        norm2=layer.norm2.to(device),
        gate_up=Linear(layer.gate_up.to(device)),
        down=Linear(layer.down.to(device)),
    )


def _rope_tables(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """[max_positions, d] each. The first half of the sines is negated, so that `_rotate` need not negate."""
    half = torch.arange(0, spec.shape.head_dim, 2, dtype=torch.float32)
    inverse_frequency = 1.0 / (spec.rope_theta ** (half / spec.shape.head_dim))
    angles = torch.outer(torch.arange(spec.shape.max_positions, dtype=torch.float32), inverse_frequency)
    cos, sin = angles.cos(), angles.sin()
    return (
        torch.cat([cos, cos], dim=-1).to(device=device, dtype=dtype),
        torch.cat([-sin, sin], dim=-1).to(device=device, dtype=dtype),
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    swapped = torch.roll(x, x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin)
