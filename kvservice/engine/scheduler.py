"""What the next step computes. A pure function of the sequences that are ready."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvservice.engine.running import RunningSequence
from kvservice.recall.reach import Reach


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One sequence's share of a step."""

    sequence: RunningSequence
    num_tokens: int
    reach: Reach


def schedule(ready: Iterable[RunningSequence], max_prefills: int, prefill_tokens: int) -> list[Scheduled]:
    """Every decoding sequence gets one token; the first prefills share `prefill_tokens` among them.

    Args:
        ready: sequences on the device, those that go first before the others.
        max_prefills: sequences that may be in prefill at a time.
        prefill_tokens: prefill tokens of the step, over all sequences; 0 while offloading can't keep up.
    """
    plan, prefills = [], []
    for sequence in ready:
        if sequence.is_decoding:
            plan.append(Scheduled(sequence, 1, sequence.next_reach()[0]))
        elif sequence.num_pending:
            prefills.append(sequence)
    for sequence in prefills[:max_prefills]:
        if prefill_tokens == 0:
            break
        reach, most = sequence.next_reach()
        count = min(most, prefill_tokens)
        plan.append(Scheduled(sequence, count, reach))
        prefill_tokens -= count
    return plan
