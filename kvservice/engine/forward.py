"""One pass of the model over the rows of a step. Knows no calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kvservice.attention.batch import BatchAttention, SequenceRows, prepare
from kvservice.engine.sequences import HeldSequences
from kvservice.models.base import Model
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


class Forward:
    """The model, and the memory that it attends to."""

    def __init__(
        self, model: Model, sequences: HeldSequences, *, deterministic: bool, link: HostLink | None = None
    ) -> None:
        self._model = model
        self._sequences = sequences
        self._deterministic = deterministic
        self._link = link

    def hidden(self, rows: Sequence[SequenceRows]) -> Tensor:
        """What `logits` takes, for each row, `[n, hidden]`; valid until the next call. Writes the rows' KV."""
        tokens: list[int] = []
        positions: list[int] = []
        for row in rows:
            state = row.memory.state
            first = state.num_computed
            tokens += state.tokens[first : first + row.num_queries]
            positions += range(first, first + row.num_queries)
        device = self._model.device
        sequences = self._sequences
        attention = BatchAttention(sequences.arena, sequences.ring, list(rows), deterministic=self._deterministic)
        carried = sum(row.memory.counters.recalled_bytes for row in rows) if self._link else 0
        hidden = self._model.forward(
            self._model.embed(torch.tensor(tokens, device=device)), torch.tensor(positions, device=device), attention
        )
        if self._link:
            carried = sum(row.memory.counters.recalled_bytes for row in rows) - carried
            self._link.carry(carried + sum(row.whole_bytes for row in rows))
        return hidden

    def logits(self, hidden: Tensor, rows: Sequence[SequenceRows]) -> Tensor:
        """The logits after the last token of each of some rows' sequences, fp32 `[len(rows), vocab]`.

        Args:
            hidden: what `hidden` gave.
            rows: of that step.
        """
        last = [row.rows.stop - 1 for row in rows]
        return self._model.logits(hidden if len(last) == len(hidden) else hidden[last])
