"""How many bytes a sequence needs to grow. Knows no ledger and no other sequences."""

from __future__ import annotations

from dataclasses import dataclass

from kvservice.kv.ledger import Reservation
from kvservice.recall.memory import SequenceMemory
from kvservice.types import ModelShape, RecipeSpec, footprint, further_answer


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

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape

    def alone(self, recipe: RecipeSpec, wish: Wish) -> Reservation:
        """What a sequence takes, with its answers, that shares with nobody else."""
        own = footprint(self._shape, recipe, wish.num_tokens, wish.num_tokens)
        return self._with_answers(Reservation(own.device_bytes, own.host_bytes), recipe, wish)

    def of(self, memory: SequenceMemory, wish: Wish) -> Reservation:
        """What a sequence that is there takes, with its answers."""
        kept = memory.num_computed if wish.num_kept is None else wish.num_kept
        alone = footprint(self._shape, memory.recipe, wish.num_tokens, _num_unread(memory, wish, kept))
        lost = memory.shared_bytes_lost(kept)
        own = Reservation(alone.device_bytes + lost[0], alone.host_bytes + lost[1])
        needed = self._with_answers(own, memory.recipe, wish)
        # It never shrinks under what it holds now, or will when it is back; then it is in both places for a moment.
        held = max(memory.device_bytes, memory.returning_bytes)
        return Reservation(max(needed.device_bytes, held), max(needed.host_bytes, memory.host_bytes))

    def _with_answers(self, needed: Reservation, recipe: RecipeSpec, wish: Wish) -> Reservation:
        if wish.answers == 0:
            return needed
        each = further_answer(self._shape, recipe, wish.prompt_end, wish.num_tokens)
        return Reservation(
            needed.device_bytes + wish.answers * each.device_bytes, needed.host_bytes + wish.answers * each.host_bytes
        )


def _num_unread(memory: SequenceMemory, wish: Wish, kept: int) -> int:
    """Tokens that are held beside what a sequence that drops tokens may keep, until all is read; or none."""
    if memory.held is None or kept >= wish.prompt_end:
        return 0
    return wish.num_tokens - kept + (memory.held.num_surplus if kept else 0)
