from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvservice.attention.batch import BatchAttention, prepare
from kvservice.config.recipes import DENSE
from kvservice.kernels import cpu
from kvservice.kv.arena import Arena
from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Ledger
from kvservice.models.cpu_llama import CpuLlama
from kvservice.models.llama import LlamaModel
from kvservice.models.loader import read_model
from kvservice.models.tiny import write_tiny_checkpoint
from kvservice.recall.distant import StagingRing, staging_blocks
from kvservice.recall.memory import SequenceMemory, Store
from kvservice.recall.reach import Reach
from kvservice.tier.host import HostTier
from kvservice.tier.swap import SwapSpace

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
    """One sequence of a model, its keys and values kept whole: by the tests themselves, or in an arena."""

    def __init__(self, model: LlamaModel | CpuLlama) -> None:
        self._model = model
        self._attend = DenseAttend(model.spec.shape.num_layers)
        self._num_tokens = 0
        if isinstance(model, CpuLlama):
            layout = KVLayout.of(model.spec.shape, model.dtype)
            ledger = Ledger(1 << 30, 0)
            staging = staging_blocks(layout.num_kv_heads)
            arena = Arena(layout, staging + 40 * layout.num_cells, staging, ledger, model.device)
            host = HostTier(layout, 0, ledger, pin=False)
            self._ring, self._arena = StagingRing(arena), arena
            self._memory = SequenceMemory(DENSE, Store(arena, host, SwapSpace(arena, host)))

    def feed(self, token_ids: list[int]) -> Tensor:
        """Logits of every new token."""
        positions = torch.arange(self._num_tokens, self._num_tokens + len(token_ids))
        self._num_tokens += len(token_ids)
        x = self._model.embed(torch.tensor(token_ids))
        if not isinstance(self._model, CpuLlama):
            return self._model.logits(self._model.forward(x, positions, self._attend))
        self._memory.state.tokens += token_ids
        rows = prepare(self._memory, 0, len(token_ids), Reach.FULL)
        attention = BatchAttention(self._arena, self._ring, [rows])
        logits = self._model.logits(self._model.forward(x, positions, attention))
        self._memory.commit(len(token_ids), Reach.FULL)
        return logits

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


@pytest.fixture(params=["torch", "kernels"])
def load(request):
    """Loads a folder for each of the runners."""
    if request.param == "kernels" and cpu.isa() == "none":
        pytest.skip("the CPU kernels aren't built, or this machine is too old for them")

    def load(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaModel | CpuLlama:
        spec, weights = read_model(folder, dtype)
        return LlamaModel(spec, weights, CPU) if request.param == "torch" else CpuLlama(spec, weights)

    return load


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "tiny")
