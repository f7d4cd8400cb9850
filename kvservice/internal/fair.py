"""Whose call is next when several tenants ask for more than there is: weighted fair queueing of predicted seconds.

Every call gets an order when it comes, its virtual finish: when it would end if all tenants that have calls were
served at once, each by its weight. Who has the least goes first, whole calls at a time, and may be put before one that
is being served. Pure: knows no tokens, no bytes, no clock, and no tenant but by a name.

    virtual time  ──┬────────┬────────┬────────┬──►
    flood           │ call 1 │ call 2 │ call 3 │ ...      each begins where the one before it ends
    newcomer     ◄──┤ call 1 │                            begins now, less a head start of a part of a call

A tenant that was idle begins at the virtual time of its return: what it didn't use is gone. The head start makes its
first call go before what is being served of others, not only before what comes after that. It is three quarters of the
call, or of the one last served if that is shorter, and isn't given while the tenant's earlier calls are unpaid.

A tenant's turns follow one another, those of a higher priority first. One that is put in before others moves them back
by its own length, and begins where what was served of them ends: priorities say in what order a tenant's share is used,
and never make it larger.
"""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

MOST_IDLE_TENANTS = 1000
"""Tenants without calls are remembered until there are so many, and they owe nothing."""

DEFAULT_WEIGHT = 1.0

HEAD_START = 0.75
"""Of a call. Less than 1, so that of several newcomers the shorter one goes first."""

LEAST_S = 1e-3
"""Every call counts so much, that of a token that is read."""

MOST_SERVED = 0.99
"""Of a call: one that is put before it ends before it, however little of it is left."""


@dataclass(slots=True, eq=False)
class Turn:
    """A call's place among those of all tenants. It moves when one of its tenant's before it comes or ends.

    Attributes:
        tenant: whose it is.
        order: lower goes first; of those that are alike who came first does. Calls of one tenant are in the order of
            their priorities, and then in that in which they came.
        begin: its virtual beginning.
        seconds: what it is predicted to take.
        weight: its tenant's.
        priority: among its tenant's.
        served: of its seconds, those that it has had.
    """

    tenant: Hashable
    order: float
    begin: float
    seconds: float
    weight: float
    priority: int = 0
    served: float = 0.0

    def count(self, seconds: float) -> None:
        """It has had so much more of its seconds."""
        self.served = min(MOST_SERVED * self.seconds, self.served + seconds)


@dataclass(slots=True)
class _Account:
    """Of one tenant. `paid_until` is the virtual time up to which its calls used its share. `turns` are in order."""

    paid_until: float
    turns: list[Turn] = field(default_factory=list)


class FairShares:
    """Orders calls. Each that `join`s must `leave`, whether it was served or not."""

    def __init__(self) -> None:
        self._now = 0.0
        self._last_served = 0.0
        self._accounts: dict[Hashable, _Account] = {}

    def join(self, tenant: Hashable, seconds: float, weight: float = DEFAULT_WEIGHT, *, priority: int = 0) -> Turn:
        """A call came. Turns of the same tenant that have a lower priority move back.

        Args:
            tenant: whose.
            seconds: that it is predicted to take, at least 0.
            weight: above 0; a tenant of weight 2 gets twice what one of weight 1 gets.
            priority: among the tenant's own.
        """
        seconds = max(LEAST_S, seconds)
        length = seconds / weight
        earliest = self._now - HEAD_START * min(length, self._last_served)
        account = self._accounts.setdefault(tenant, _Account(earliest))
        turns = account.turns
        position = bisect.bisect_right(turns, -priority, key=lambda turn: -turn.priority)
        if position < len(turns):
            # What the next one has been served isn't there a second time.
            begin = turns[position].begin + turns[position].served / turns[position].weight
        else:
            # Who has calls isn't idle, however late they are.
            begin = account.paid_until if turns else max(account.paid_until, earliest)
        order = max([begin + length, *(turn.order for turn in turns[max(0, position - 1) : position])])
        turn = Turn(tenant, order, begin, seconds, weight, priority)
        account.paid_until = begin + length if position == len(turns) else account.paid_until + length
        _move(turns[position:], length)
        turns.insert(position, turn)
        return turn

    def serve(self, turn: Turn) -> None:
        """Something is done for a call now: time isn't before its beginning."""
        self._last_served = turn.seconds / turn.weight
        self._now = max(self._now, turn.begin)

    def leave(self, turn: Turn, seconds: float) -> None:
        """A call has ended, or was given up. Its tenant's turns behind it move as far as the prediction was wrong.

        Args:
            turn: its place.
            seconds: what it took, in the measure of its prediction; 0 if nothing was done for it.
        """
        # All who had calls until now had a part of the time that it took.
        weights = sum(account.turns[-1].weight for account in self._accounts.values() if account.turns)
        self._now += seconds / weights
        account = self._accounts[turn.tenant]
        position = account.turns.index(turn)
        del account.turns[position]
        surplus = (seconds - turn.seconds) / turn.weight
        account.paid_until += surplus
        _move(account.turns[position:], surplus)
        if len(self._accounts) > MOST_IDLE_TENANTS:
            self._forget_idle()

    def _forget_idle(self) -> None:
        self._accounts = {
            tenant: account
            for tenant, account in self._accounts.items()
            if account.turns or account.paid_until > self._now - self._last_served
        }


def _move(turns: Iterable[Turn], length: float) -> None:
    """Later by so much virtual time, or earlier."""
    for turn in turns:
        turn.begin += length
        turn.order += length


READ_S = 1e-3
"""What a token counts that is read. Seconds of a machine that reads 1,000 tokens a second: shares don't depend on how
fast it is, and would be wrong if calls were counted by speeds that change from one to the next."""

UNMEASURED_ANSWER_READS = 10.0
MOST_ANSWER_READS = 100.0
"""Tokens that are read in the time of one that is generated: while that hasn't been measured, and at most."""


@dataclass(frozen=True, slots=True)
class Price:
    """What a token of an answer counts, against one that is read."""

    answer_reads: float

    @classmethod
    def of(cls, prefill_tokens_per_s: float, decode_tokens_per_s: float) -> Price:
        """From measured speeds, each by itself; 0: not measured."""
        if not prefill_tokens_per_s or not decode_tokens_per_s:
            return cls(UNMEASURED_ANSWER_READS)
        return cls(min(MOST_ANSWER_READS, max(1.0, prefill_tokens_per_s / decode_tokens_per_s)))

    def seconds(self, num_read: float, num_answered: int) -> float:
        """Of a call that reads so many tokens, and generates so many."""
        return READ_S * (num_read + self.answer_reads * num_answered)


EXPECTED_ANSWER_TOKENS = 64
"""Of an answer that may be longer: most end long before their limit. What it took is put right at its end."""


MOST_PER_FREE = 7
"""Places that a tenant may take for each one that is free: whoever comes next finds room, and tenants that want all
there is come to equal numbers."""


def leaves_room(own: int, wanted: int, free: int) -> bool:
    """Whether a tenant may take so many more places, of those that are free, beside its own."""
    return own + wanted <= MOST_PER_FREE * free


LATE_MARGIN = 2.0
"""A prediction may be wrong by so much: speeds that were measured beside decoding are slower than others."""


def cannot_meet(seconds: float, left_s: float) -> bool:
    """Whether what is predicted to take `seconds` surely isn't done in the time that is left."""
    return seconds > LATE_MARGIN * left_s


def expected_answer_tokens(max_new_tokens: int, answers: int) -> int:
    """Tokens that a call is predicted to generate."""
    return min(max_new_tokens, EXPECTED_ANSWER_TOKENS) * answers
