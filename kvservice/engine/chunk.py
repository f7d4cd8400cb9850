"""Tokens on their way through the layers, a span a step, beside others that pass all. Knows no models.

What would keep decoding sequences waiting goes so: prefill, and decoding that reads all of a long context's host KV.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from kvservice.engine.forward import Pass
from kvservice.engine.running import RunningSequence
from kvservice.engine.scheduler import Scheduled
from kvservice.recall.parking import Place


@dataclass(slots=True)
class Chunk:
    """The next tokens of some sequences, not yet committed.

    Attributes:
        items: the sequences' shares.
        passing: how far they have come; None before the first layer.
    """

    items: Sequence[Scheduled]
    passing: Pass | None = None

    @property
    def num_tokens(self) -> int:
        """Of all its sequences."""
        return sum(item.num_tokens for item in self.items)

    @property
    def cost(self) -> int:
        """How many tokens of a document take about as long."""
        return sum(item.cost for item in self.items)

    @property
    def streamed_bytes(self) -> int:
        """Host KV that is read for it, all layers together."""
        return sum(item.streamed_bytes for item in self.items)

    @property
    def is_through(self) -> bool:
        """Whether it has passed all layers."""
        return self.passing is not None and self.passing.is_through

    def is_intact(self, ready: Container[RunningSequence]) -> bool:
        """Whether it can go on: nothing happened to its sequences since the last step, and they may be computed.

        A sequence that has gone, made room or gone back takes the chunk with it: the others' tokens are read again.
        """
        if any(item.sequence not in ready for item in self.items):
            return False
        return self.passing is None or all(
            row.memory.place is Place.DEVICE and row.is_prepared for row in self.passing.rows
        )
