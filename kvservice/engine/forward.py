"""Passes of the model over rows of sequences. Knows no calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvservice.attention.batch import BatchAttention, SequenceRows, prepare
from kvservice.engine.overlap import FetchOverlap
from kvservice.engine.sequences import HeldSequences
from kvservice.models.base import Model
from kvservice.models.llama import rope_angles
from kvservice.recall.memory import SequenceMemory
from kvservice.recall.reach import Reach
from kvservice.tier.link import HostLink


def plan_rows(shares: Iterable[tuple[SequenceMemory, int, Reach]]) -> list[SequenceRows]:
    """Makes room for each sequence's next tokens, and gives it rows of the step, one sequence after the other.

    Args:
        shares: sequences, how many tokens of each, and what they attend to.
    """
    rows: list[SequenceRows] = []
    for memory, num_tokens, reach in shares:
        rows.append(prepare(memory, rows[-1].rows.stop if rows else 0, num_tokens, reach))
    return rows


@dataclass(slots=True)
class Pass:
    """Rows on their way through the layers.

    Attributes:
        rows: of each sequence.
        token_ids: of the rows, int64 `[n]`.
        positions: int64 `[n]`.
        num_layers: of the model.
        x: the rows' residual stream before layer `next_layer`, `[n, hidden]`; None before the first.
    """

    rows: Sequence[SequenceRows]
    token_ids: Tensor
    positions: Tensor
    num_layers: int
    x: Tensor | None = None
    next_layer: int = 0

    @property
    def is_through(self) -> bool:
        """Whether all layers are behind it."""
        return self.next_layer == self.num_layers


class Forward:
    """The model, and the memory that it attends to."""

    def __init__(
        self, model: Model, sequences: HeldSequences, *, deterministic: bool, link: HostLink | None = None
    ) -> None:
        self._model = model
        self._sequences = sequences
        self._deterministic = deterministic
        self._link = link
        self._num_layers = model.spec.shape.num_layers
        self._turns: Tensor | None = None

    def begin(self, rows: Sequence[SequenceRows]) -> Pass:
        """Rows before the first layer."""
        tokens: list[int] = []
        positions: list[int] = []
        for row in rows:
            tokens += row.memory.state.tokens[row.first : row.first + row.num_queries]
            positions += range(row.first, row.first + row.num_queries)
        device = self._model.device
        return Pass(rows, torch.tensor(tokens, device=device), torch.tensor(positions, device=device), self._num_layers)

    def advance(self, passing: Pass, num_layers: int | None = None) -> None:
        """Takes rows through layers, writing their KV there.

        Args:
            passing: what `begin` gave.
            num_layers: at most so many; None: all that are left, and then its residual stream is valid until the next
                call.
        """
        stop = self._num_layers if num_layers is None else min(self._num_layers, passing.next_layer + num_layers)
        layers, rows = range(passing.next_layer, stop), passing.rows
        arena, ring = self._sequences.arena, self._sequences.ring
        overlap = self._overlap(rows)
        attention = BatchAttention(
            arena,
            ring,
            list(rows),
            deterministic=self._deterministic,
            timer=overlap,
            turns=self._turns_for(rows),
        )
        carried = sum(row.memory.counters.recalled_bytes for row in rows) if self._link else 0
        is_whole = len(layers) == self._num_layers
        entry = self._model.embed(passing.token_ids) if passing.x is None else passing.x
        try:
            x = self._model.forward(entry, passing.positions, attention, None if is_whole else layers)
        finally:
            attention.close()
        if self._link:
            # Where fetches overlap with computation, the step has waited for them already.
            carried = 0 if overlap else sum(row.memory.counters.recalled_bytes for row in rows) - carried
            whole = sum(row.whole_bytes for row in rows) * len(layers) // self._num_layers
            self._link.carry(carried + whole)
        passing.next_layer = stop
        passing.x = x if num_layers is None else x.clone()

    def wait(self) -> None:
        """Until what was begun is done, so that its time can be told from that of what follows."""
        if self._model.device.type == "cuda":
            torch.cuda.current_stream(self._model.device).synchronize()

    def _turns_for(self, rows: Sequence[SequenceRows]) -> Tensor | None:
        """Cosines and sines of every position, made when a sequence first turns its keys: of long contexts many."""
        if self._turns is None and any(row.memory.held is not None and row.memory.held.turns_keys for row in rows):
            angles = rope_angles(self._model.spec).to(self._model.device)
            self._turns = torch.stack([angles.cos(), angles.sin()])
        return self._turns

    def _overlap(self, rows: Sequence[SequenceRows]) -> FetchOverlap | None:
        if self._link is None or not any(row.anchors is not None and row.selects for row in rows):
            return None
        return FetchOverlap(rows, self._link.bytes_per_s)

    def logits(self, passing: Pass, which: Sequence[int]) -> Tensor:
        """The logits after the last token of some sequences, fp32 `[len(which), vocab]`.

        Args:
            passing: is through.
            which: places of the sequences in `passing.rows`.
        """
        last = [passing.rows[i].rows.stop - 1 for i in which]
        x = passing.x
        assert x is not None
        return self._model.logits(x if len(last) == len(x) else x[last])
