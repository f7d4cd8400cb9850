"""What the next step computes. A pure function of the sequences that are ready."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvservice.engine.running import RunningSequence
from kvservice.recall.reach import Reach


@dataclass(frozen=True, slots=True)
class Scheduled:
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


def schedule(ready: Iterable[RunningSequence], max_prefills: int, prefill_tokens: int) -> list[Scheduled]:
    """Every decoding sequence gets one token; the first prefills share `prefill_tokens` among them.

    Args:
        ready: sequences on the device, those that go first before the others.
        max_prefills: sequences that may be in prefill at a time.
        prefill_tokens: prefill tokens of the step, over all sequences; 0 while offloading can't keep up.
    """
    plan, prefills = [], []
    for sequence in ready:
        num_pending = sequence.num_pending
        if num_pending == 1 and sequence.generated:
            plan.append(Scheduled(sequence, 1, sequence.next_reach()[0], completes=True))
        elif num_pending:
            prefills.append(sequence)
    for sequence in prefills[:max_prefills]:
        if prefill_tokens == 0:
            break
        reach, most = sequence.next_reach()
        count = min(most, prefill_tokens)
        plan.append(Scheduled(sequence, count, reach, completes=count == sequence.num_pending))
        prefill_tokens -= count
    return plan
