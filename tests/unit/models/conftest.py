from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvservice.models.llama import LlamaModel
from kvservice.models.tiny import write_tiny_checkpoint

CPU = torch.device("cpu")


class DenseAttend:
    """Attention of one sequence over all of its keys and values: the plainest Attend."""

    def __init__(self, num_layers: int) -> None:
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = self._keys[layer] = _extend(self._keys[layer], k)
        values = self._values[layer] = _extend(self._values[layer], v)
        num_new, num_all = q.shape[0], keys.shape[0]
        visible = torch.ones(num_new, num_all, dtype=torch.bool).tril(num_all - num_new)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), attn_mask=visible, enable_gqa=True
        )
        return out.transpose(0, 1)


def _extend(held: Tensor | None, new: Tensor) -> Tensor:
    return new.clone() if held is None else torch.cat([held, new])


class Sequence:
    """One sequence of a model, its keys and values kept whole."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._attend = DenseAttend(model.spec.shape.num_layers)
        self._num_tokens = 0

    def feed(self, token_ids: list[int]) -> Tensor:
        """Logits of every new token."""
        positions = torch.arange(self._num_tokens, self._num_tokens + len(token_ids))
        self._num_tokens += len(token_ids)
        return self._model.logits(self._model.forward(torch.tensor(token_ids), positions, self._attend))

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        logits, out = self.feed(prompt), []
        while True:
            out.append(int(logits[-1].argmax()))
            if len(out) == num_tokens:
                return out
            logits = self.feed(out[-1:])


@pytest.fixture
def sequence() -> Callable[[LlamaModel], Sequence]:
    return Sequence


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "tiny")
