"""A model around another: what a measurement changes of a model, it overrides."""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.attention.batch import BatchAttention
from kvservice.models.base import Model


class WrappedModel:
    """Does what `model` does."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.spec = model.spec
        self.device = model.device
        self.is_deterministic = model.is_deterministic

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, keys and values."""
        return self._model.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights on the device."""
        return self._model.weight_bytes

    def embed(self, token_ids: Tensor) -> Tensor:
        """See `Model`."""
        return self._model.embed(token_ids)

    def forward(self, x: Tensor, positions: Tensor, attention: BatchAttention, layers: range | None = None) -> Tensor:
        """See `Model`."""
        return self._model.forward(x, positions, attention, layers)

    def logits(self, x: Tensor) -> Tensor:
        """See `Model`."""
        return self._model.logits(x)
