"""The runner of Llama-shaped models on CPUs, by the C++ kernels. Knows nothing of caches' bookkeeping or files.

It gives what `llama` gives, within rounding: residuals stay in fp32 between layers, everything else is rounded where
`llama` rounds. A row's bits depend on that row alone, and, unless it is made deterministic, on whether its sequence has
few queries in the step or many.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvservice.attention.batch import BatchAttention
from kvservice.kernels.cpu import DecoderLayers, PackedLinear, Step
from kvservice.models.base import ModelSpec, ModelWeights
from kvservice.models.llama import rope_angles


class CpuLlama:
    """Runs new tokens through all layers, in a few calls of the kernels a layer.

    Args:
        spec: the model's figures.
        weights: packed; `weights.layers` is read once. fp32 or bf16.
        deterministic: few queries are attended for as many are, which is slower.
    """

    def __init__(self, spec: ModelSpec, weights: ModelWeights, *, deterministic: bool = False) -> None:
        shape = spec.shape
        self.spec = spec
        self.device = torch.device("cpu")
        self.dtype = weights.embed.dtype
        self.is_deterministic = deterministic
        self._embed = weights.embed
        self._norm = weights.norm.float()
        self._layers = DecoderLayers(weights.layers, shape.num_heads, shape.num_kv_heads, shape.head_dim, spec.norm_eps)
        self._lm_head = PackedLinear(weights.lm_head)
        angles = rope_angles(spec)
        self._cos, self._sin = angles.cos(), angles.sin()
        self._step: Step | None = None
        self._arena: Tensor | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights; the head is packed apart from the embeddings, also where they are tied."""
        return self._layers.num_bytes + self._lm_head.num_bytes + self._embed.nbytes + self._norm.nbytes

    def embed(self, token_ids: Tensor) -> Tensor:
        """See `Model`. The residual stream is fp32."""
        return F.embedding(token_ids, self._embed).float()

    def forward(self, x: Tensor, positions: Tensor, attention: BatchAttention, layers: range | None = None) -> Tensor:
        """See `Model`."""
        if layers is None:
            layers = range(self._layers.num_layers)
        step = self._step_for(attention.cells, x.shape[0])
        step.begin(positions, attention.near(shared_heads=self.spec.shape.num_heads))
        step.x.copy_(x)
        timer, needs_torch = attention.timer, attention.selects_by_torch
        if not needs_torch and timer is None:
            self._layers.run(step, layers)
            return step.x
        for layer in layers:
            self._layers.pre(layer, step)
            self._layers.attend(layer, step)
            if timer:
                timer.begins(layer)
            self._layers.recall(layer, step)
            if needs_torch:
                attention.add_recalled(layer, step.q, step.attended, step.lse)
            if timer:
                timer.ends(layer)
            self._layers.post(layer, step)
        return step.x

    def logits(self, x: Tensor) -> Tensor:
        """See `Model`."""
        return self._lm_head.of_normed(x.contiguous(), self._norm, self.spec.norm_eps, torch.arange(x.shape[0]))

    def _step_for(self, arena: Tensor, num_rows: int) -> Step:
        """The buffers of a step: made once for the arena, and again if a step has more rows than any before."""
        if self._step is None or self._arena is not arena or num_rows > self._step.max_rows:
            max_rows = max(num_rows, 64)
            scale = self.spec.shape.head_dim**-0.5
            self._step = Step(self._layers, max_rows, arena, self._cos, self._sin, scale, uniform=self.is_deterministic)
            self._arena = arena
        return self._step
