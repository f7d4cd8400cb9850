"""What the next step computes. Pure functions of the sequences that are ready."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from operator import attrgetter
from typing import NamedTuple

from kvservice.engine.running import RunningSequence
from kvservice.recall.reach import Reach

SELECT_COST = 8
"""A token that chooses what it recalls counts as so many that don't. It takes three or four times as long over 6,000
tokens; counting it higher keeps steps short, so that of several questions the first are answered sooner."""


QUESTION_TOKENS = 64
"""A sequence with no more to read needn't be paced: soon it decodes along with the others, at little cost."""

QUESTIONS_COST = 48 * SELECT_COST
"""Of a step beside decoding. Of questions that come together, two or so are read in it."""


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

    @property
    def decodes(self) -> bool:
        """Whether it goes on from a token of its own."""
        return self.num_tokens == 1 and bool(self.sequence.generated)

    @property
    def cost(self) -> int:
        """How many tokens of a document take about as long."""
        return self.num_tokens * token_cost(self.reach)

    @property
    def streamed_bytes(self) -> int:
        """Host KV that is read for it, all layers together, whatever its tokens choose."""
        return self.sequence.memory.distant.num_bytes if self.reach is Reach.FULL else 0


def token_cost(reach: Reach) -> int:
    """What a token that is read counts."""
    return SELECT_COST if reach is Reach.SELECT else 1


def sort_out(ready: Iterable[RunningSequence]) -> tuple[list[Scheduled], list[RunningSequence]]:
    """Those that decode, a token each, and those that have tokens to read first."""
    decodes, reading = [], []
    for sequence in ready:
        num_pending = sequence.num_pending
        if num_pending == 1 and sequence.generated:
            decodes.append(Scheduled(sequence, 1, sequence.next_reach()[0], completes=True))
        elif num_pending:
            reading.append(sequence)
    return decodes, reading


def hold_back(decodes: list[Scheduled], most_bytes: int) -> tuple[list[Scheduled], list[Scheduled]]:
    """Those that decode in one step, and those that would keep them waiting: they read too much host KV.

    Args:
        decodes: all that decode.
        most_bytes: host KV that may be read in a step for the sake of some of them. Where all read such, all wait for
            each other.
    """
    streaming = [item for item in decodes if item.streamed_bytes]
    if len(streaming) == len(decodes) or sum(item.streamed_bytes for item in streaming) <= most_bytes:
        return decodes, []
    return [item for item in decodes if not item.streamed_bytes], streaming


def share_questions(reading: Iterable[RunningSequence], num_tokens: int) -> list[Scheduled]:
    """What of short questions is read in a step in which others decode: each tenant's shortest, then its next.

    Args:
        reading: those that may take part, those that go first before the others.
        num_tokens: at most.
    """
    by_tenant: dict[bytes, list[RunningSequence]] = {}
    for each in reading:
        if each.num_pending <= QUESTION_TOKENS:
            by_tenant.setdefault(each.tenant, []).append(each)
    # The tenant that goes first has the first of each round: however short others' questions are, it isn't passed by.
    rounds = zip_longest(*(sorted(each, key=attrgetter("num_pending")) for each in by_tenant.values()))
    short = [sequence for each in rounds for sequence in each if sequence is not None]
    plan: list[Scheduled] = []
    left = QUESTIONS_COST
    for sequence in short:
        reach, _ = sequence.next_reach()
        cost = _take(sequence, min(left, num_tokens * token_cost(reach)), plan)
        left -= cost
        num_tokens -= cost // token_cost(reach)
    return plan


def passing_cost(questions: Iterable[Scheduled], reading: Iterable[RunningSequence]) -> int:
    """What those questions cost that are read before another tenant's turn.

    Args:
        questions: of `reading`, what is read of them beside decoding.
        reading: in fair order.
    """
    costs = {id(item.sequence): item.cost for item in questions}
    waiting: set[bytes] = set()
    cost = 0
    for sequence in reading:
        if id(sequence) not in costs:
            waiting.add(sequence.tenant)
        elif waiting - {sequence.tenant}:
            cost += costs[id(sequence)]
    return cost


def share_prefill(reading: Sequence[RunningSequence], budget: int) -> list[Scheduled]:
    """Shares prefill tokens among sequences.

    A question need not wait for its tenant's document before it: those of the first one's tenant that have less to read
    may take half of the budget, the shortest first. The first has the rest, and what it leaves is for those behind it,
    in order. Between tenants the order has seen to that.

    Args:
        reading: those that may take part, those that go first before the others.
        budget: the plan's cost, if the sequences have so much to read.
    """
    if not reading or budget <= 0:
        return []
    first = reading[0]
    short = sorted(
        (each for each in reading if each.tenant == first.tenant and each.num_pending < first.num_pending),
        key=lambda each: each.num_pending,
    )
    plan: list[Scheduled] = []
    left = budget // 2
    for sequence in short:
        left -= _take(sequence, left, plan)
    left += budget - budget // 2
    taken = {id(item.sequence) for item in plan}
    for sequence in reading:
        if id(sequence) not in taken:
            left -= _take(sequence, left, plan)
    return plan


def _take(sequence: RunningSequence, budget: int, plan: list[Scheduled]) -> int:
    """Puts a sequence's share on the plan, and returns what it costs."""
    reach, most = sequence.next_reach()
    count = min(most, budget // token_cost(reach))
    if not count:
        return 0
    plan.append(Scheduled(sequence, count, reach, completes=count == sequence.num_pending))
    return plan[-1].cost
