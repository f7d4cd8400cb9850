"""How many bytes a sequence needs to grow. Knows no ledger and no other sequences."""

from __future__ import annotations

from dataclasses import dataclass

from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Reservation
from kvservice.recall.memory import SequenceMemory
from kvservice.types import BLOCK_TOKENS, Distant, ModelShape, RecipeSpec, footprint, group_bytes, lasting_index_blocks


@dataclass(frozen=True, slots=True)
class Wish:
    """What a sequence is to grow to.

    Attributes:
        num_tokens: the most tokens.
        answers: further answers that will be forked from it.
        prompt_end: tokens that it will have when they are.
        num_kept: of the tokens that it has now, the leading ones that it goes on from; None: all.
    """

    num_tokens: int
    answers: int = 0
    prompt_end: int = 0
    num_kept: int | None = None


class Demand:
    """The arithmetic of wishes, for one model."""

    def __init__(self, shape: ModelShape, layout: KVLayout) -> None:
        self._shape = shape
        self._layout = layout

    def alone(self, recipe: RecipeSpec, wish: Wish) -> Reservation:
        """What a sequence takes, with its answers, that shares with nobody else."""
        own = footprint(self._shape, recipe, wish.num_tokens)
        return self._with_answers(Reservation(own.device_bytes, own.host_bytes), recipe, wish)

    def of(self, memory: SequenceMemory, wish: Wish) -> Reservation:
        """What a sequence that is there takes, with its answers."""
        alone = footprint(self._shape, memory.recipe, wish.num_tokens)
        lost = memory.shared_bytes_lost(memory.num_computed if wish.num_kept is None else wish.num_kept)
        own = Reservation(alone.device_bytes + lost[0], alone.host_bytes + lost[1])
        needed = self._with_answers(own, memory.recipe, wish)
        # It never shrinks under what it holds now, or will when it is back; then it is in both places for a moment.
        held = max(memory.device_bytes, memory.returning_bytes)
        return Reservation(max(needed.device_bytes, held), max(needed.host_bytes, memory.host_bytes))

    def _with_answers(self, needed: Reservation, recipe: RecipeSpec, wish: Wish) -> Reservation:
        if wish.answers == 0:
            return needed
        device, host = self._private_bytes(recipe, wish.prompt_end, wish.num_tokens)
        return Reservation(needed.device_bytes + wish.answers * device, needed.host_bytes + wish.answers * host)

    def _private_bytes(self, recipe: RecipeSpec, shared_tokens: int, num_tokens: int) -> tuple[int, int]:
        """Device and host bytes that a fork at `shared_tokens` tokens takes for itself on its way to `num_tokens`."""
        whole = footprint(self._shape, recipe, num_tokens)
        column_bytes = self._layout.num_cells * self._layout.block_bytes
        if recipe.distant is Distant.RESIDENT:
            return whole.device_bytes - shared_tokens // BLOCK_TOKENS * column_bytes, 0
        groups = recipe.distant_groups(shared_tokens)
        index = lasting_index_blocks(self._shape, recipe, groups) * self._layout.block_bytes
        sinks = column_bytes if shared_tokens >= BLOCK_TOKENS else 0
        return whole.device_bytes - index - sinks, whole.host_bytes - groups * group_bytes(self._shape, recipe)
