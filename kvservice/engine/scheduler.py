"""What the next step computes. A pure function of the running calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvservice.engine.running import RunningCall


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One sequence's share of a step."""

    running: RunningCall
    num_tokens: int


def schedule(
    running: Iterable[RunningCall], chunk_tokens: int, max_prefills: int, *, may_prefill: bool
) -> list[Scheduled]:
    """Every decoding sequence gets one token; the oldest prefills share `chunk_tokens` among them.

    Args:
        running: in order of admission.
        chunk_tokens: prefill tokens of one step, over all sequences.
        max_prefills: sequences that may be in prefill at a time.
        may_prefill: False while offloading can't keep up.
    """
    calls = list(running)
    plan = [Scheduled(call, 1) for call in calls if not call.in_prefill]
    budget = chunk_tokens if may_prefill else 0
    for call in [call for call in calls if call.in_prefill][:max_prefills]:
        if budget == 0:
            break
        count = call.next_tokens(budget)
        plan.append(Scheduled(call, count))
        budget -= count
    return plan
