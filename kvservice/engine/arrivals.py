"""KV that comes from the tier below while its call waits: takes it as it comes. Knows no models and no tiers.

    sinks: come, or are computed ──► distant groups: indexed as they come ──► near groups, window ──► question

What doesn't come is computed behind what did. Where layers share distant keys, groups lack those of the others: they
can't be near again, so what is computed behind them begins with an empty window.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvservice.engine.running import RunningSequence
from kvservice.engine.sequences import HeldSequences
from kvservice.recall.parking import Place
from kvservice.types import GROUP_TOKENS, SINK_TOKENS, RecipeSpec, RestoredKv, RestoredWindow

GROUPS_BESIDE_OTHERS = 16
"""What is taken for a sequence between two steps that others wait for: some milliseconds."""


class Arrivals:
    """Adopts KV for sequences that wait for it.

    Args:
        sequences: where it belongs.
        deterministic: what can't be gone on from bit for bit isn't gone on from.
    """

    def __init__(self, sequences: HeldSequences, *, deterministic: bool) -> None:
        self._sequences = sequences
        self._deterministic = deterministic
        self._awaited: RestoredKv | None = None

    def adopt(self, ready: Sequence[RunningSequence]) -> list[RunningSequence]:
        """Takes what has come for sequences that have room.

        Returns:
            Those of `ready` that can be computed now.
        """
        self._awaited = None
        others_wait = any(sequence.restored is None for sequence in ready)
        computable = []
        for sequence in ready:
            restored = sequence.restored
            if restored is not None and not self._take(sequence, restored, others_wait=others_wait):
                self._awaited = self._awaited or restored
            else:
                computable.append(sequence)
        return computable

    def wait(self, timeout_s: float) -> bool:
        """Waits until something more may have come, at most `timeout_s`; False if nobody waits for it. Blocks."""
        if self._awaited is None:
            return False
        self._awaited.wait(timeout_s)
        return True

    def _take(self, sequence: RunningSequence, restored: RestoredKv, *, others_wait: bool) -> bool:
        """Whether the sequence can be computed now."""
        memory = sequence.memory
        if memory.place is not Place.DEVICE:
            return False
        # In this order: what had come when it was done is all there is.
        is_done, window = restored.is_done, restored.window
        if memory.num_computed < SINK_TOKENS:
            if restored.awaits_window:
                return False
            if window is None or memory.num_computed:
                # Nobody has the sinks: they are computed first, and what has come takes its place behind them.
                return True
            memory.adopt(self._sequences.window_of(window)[:, :, :SINK_TOKENS])
        groups = self._usable(sequence, restored, window if is_done else None)
        if others_wait and len(groups) > memory.num_adopted + GROUPS_BESIDE_OTHERS:
            groups, is_done = groups[: memory.num_adopted + GROUPS_BESIDE_OTHERS], False
        end = SINK_TOKENS + len(groups) * GROUP_TOKENS
        whole = _fitting(window, end, memory.recipe) if is_done else None
        memory.adopt_groups(groups, whole.stop if whole else end)
        if is_done:
            memory.adopt_rest(groups, self._sequences.window_of(whole)[:, :, SINK_TOKENS:] if whole else None)
            sequence.restored = None
        return is_done

    def _usable(self, sequence: RunningSequence, restored: RestoredKv, window: RestoredWindow | None) -> Tensor:
        """The groups that have come and can be gone on from; `window` once all has come, if there is one."""
        recipe = sequence.memory.recipe
        groups = self._sequences.groups_of(restored, recipe)
        if not sequence.memory.shared:
            return groups
        # What is near at the end of the session must come with its window, or be computed.
        groups = groups[: recipe.distant_groups(len(sequence.call.base_tokens))]
        leads_up = _fitting(window, SINK_TOKENS + len(groups) * GROUP_TOKENS, recipe) is not None
        return groups if leads_up or not self._deterministic else groups[:0]


def _fitting(window: RestoredWindow | None, end: int, recipe: RecipeSpec) -> RestoredWindow | None:
    """The window, if groups came up to where it begins, and enough of them for what is distant behind it."""
    if window is None or window.start != end or recipe.window_start(window.stop) > end:
        return None
    return window
