"""What the next step computes. A pure function of the sequences that are ready."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from kvservice.engine.running import RunningSequence
from kvservice.recall.reach import Reach


class Scheduled(NamedTuple):
    """One sequence's share of a step.

    Attributes:
        num_tokens: how many of its tokens are computed.
        reach: what they attend to.
        completes: then all its tokens are.
    """

    sequence: RunningSequence
    num_tokens: int
    reach: Reach
    completes: bool

    @property
    def samples(self) -> bool:
        """Whether the step gives its next token."""
        return self.completes and self.sequence.row is not None


def schedule(
    ready: Iterable[RunningSequence], max_prefills: int, prefill_tokens: Callable[[int], int]
) -> list[Scheduled]:
    """Every decoding sequence gets one token; the first prefills share what `prefill_tokens` allows.

    Args:
        ready: sequences on the device, those that go first before the others.
        max_prefills: sequences that may be in prefill at a time.
        prefill_tokens: given the number of decoding sequences, the prefill tokens of the step, over all sequences; 0
            while offloading can't keep up. Asked only if there is any prefill.
    """
    plan, prefills = [], []
    for sequence in ready:
        num_pending = sequence.num_pending
        if num_pending == 1 and sequence.generated:
            plan.append(Scheduled(sequence, 1, sequence.next_reach()[0], completes=True))
        elif num_pending:
            prefills.append(sequence)
    budget = prefill_tokens(len(plan)) if prefills else 0
    for sequence in prefills[:max_prefills]:
        if budget == 0:
            break
        reach, most = sequence.next_reach()
        count = min(most, budget)
        plan.append(Scheduled(sequence, count, reach, completes=count == sequence.num_pending))
        budget -= count
    return plan
