"""What longer contexts cost a decode step: speed alone, far beyond what a model can read.

Documents aren't read: their keys and values are random numbers, and tokens beyond the model's last position are rotated
as the last. The engine, its memory and its kernels do all they otherwise do, so times are those of real decoding over
as much KV, and answers mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvservice.attention.batch import BatchAttention
from kvservice.bench.engine import EngineRow, Load, SkippedRow, measure
from kvservice.bench.wrapped import WrappedModel
from kvservice.config.engine import EngineConfig
from kvservice.engine import Engine
from kvservice.engine.ports import NoWriter
from kvservice.errors import InternalError
from kvservice.models.base import Model
from kvservice.types import RecipeSpec, footprint

SEED = 7


class SyntheticContext(WrappedModel):
    """A model that takes contexts of any length: it reads documents by drawing their KV, and decodes as it always does.

    Args:
        model: decodes.
        max_positions: that it now claims to have.
    """

    def __init__(self, model: Model, max_positions: int) -> None:
        super().__init__(model)
        self._last_position = model.spec.shape.max_positions - 1
        self.spec = replace(model.spec, shape=replace(model.spec.shape, max_positions=max_positions))
        self._generator = torch.Generator().manual_seed(SEED)

    def forward(self, x: Tensor, positions: Tensor, attention: BatchAttention, layers: range | None = None) -> Tensor:
        """See `Model`. A step that reads draws the KV of its tokens, and gives what it got."""
        if x.shape[0] <= attention.num_sequences:
            return self._model.forward(x, positions.clamp(max=self._last_position), attention, layers)
        shape = self.spec.shape
        size = (2, x.shape[0], shape.num_kv_heads, shape.head_dim)
        drawn = torch.randn(size, generator=self._generator).to(self.device, self.dtype)
        for layer in range(shape.num_layers) if layers is None else layers:
            attention.write(layer, drawn[0], drawn[1])
        return x


@dataclass(frozen=True, slots=True)
class ContextRow:
    """One context length.

    Attributes:
        context_tokens: of each sequence.
        batch: sequences.
        decode_ms_per_token: time of a decode step, median.
        marginal_ms_per_1000_tokens: what 1,000 tokens more in each sequence cost a step, from the row before; of the
            first, None.
    """

    context_tokens: int
    batch: int
    decode_ms_per_token: float
    marginal_ms_per_1000_tokens: float | None


def measure_contexts(
    model: Model, recipe: RecipeSpec, contexts: Sequence[int], batch: int, new_tokens: int, repeats: int
) -> list[ContextRow]:
    """Times decode steps at each context length, in memory that is just large enough. Blocks."""
    rows: list[ContextRow] = []
    for context in sorted(contexts):
        load = Load(recipe, context, batch, new_tokens, SEED)
        longest = SyntheticContext(model, context + load.max_new_tokens + 64)
        each = footprint(longest.spec.shape, recipe, context + load.max_new_tokens)
        # Some room more than what is promised, for the workspace and for what is warmed up with.
        engine = Engine(
            longest,
            EngineConfig(
                kv_bytes=(batch + 1) * each.device_bytes + (64 << 20),
                host_bytes=(batch + 1) * each.host_bytes + (64 << 20),
                max_batch=batch,
                step_tokens=1024,
                max_prefills=1,
            ),
            NoWriter(),
        )
        try:
            row = measure(engine, load, repeats)
        finally:
            engine.close()
        if isinstance(row, SkippedRow):
            raise InternalError(f"{context} tokens don't fit into memory that was made for them: {row.reason}")
        rows.append(_after(rows[-1] if rows else None, row))
    return rows


def _after(before: ContextRow | None, row: EngineRow) -> ContextRow:
    marginal = None
    if before is not None:
        more = row.prompt_tokens - before.context_tokens
        marginal = (row.decode_ms_per_token - before.decode_ms_per_token) / more * 1000
    return ContextRow(row.prompt_tokens, row.batch, row.decode_ms_per_token, marginal)
