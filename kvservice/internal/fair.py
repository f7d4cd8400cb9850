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
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

MOST_IDLE_TENANTS = 1000
"""Tenants without calls are remembered until there are so many, and they owe nothing."""

DEFAULT_WEIGHT = 1.0

HEAD_START = 0.75
"""Of a call. Less than 1, so that of several newcomers the shorter one goes first."""


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A call's place among those of all tenants.

    Attributes:
        tenant: whose it is.
        order: lower goes first. Calls of one tenant are in the order in which they came.
        begin: its virtual beginning.
        seconds: what it is predicted to take.
        weight: its tenant's.
    """

    tenant: Hashable
    order: float
    begin: float
    seconds: float
    weight: float


@dataclass(slots=True)
class _Account:
    """Of one tenant. `paid_until` is the virtual time up to which its calls have used its share."""

    paid_until: float
    turns: list[Turn] = field(default_factory=list)


class FairShares:
    """Orders calls. Each that `join`s must `leave`, whether it was served or not."""

    def __init__(self) -> None:
        self._now = 0.0
        self._last_served = 0.0
        self._accounts: dict[Hashable, _Account] = {}

    def join(self, tenant: Hashable, seconds: float, weight: float = DEFAULT_WEIGHT) -> Turn:
        """A call came.

        Args:
            tenant: whose.
            seconds: that it is predicted to take, at least 0.
            weight: above 0; a tenant of weight 2 gets twice what one of weight 1 gets.
        """
        length = seconds / weight
        earliest = self._now - HEAD_START * min(length, self._last_served)
        account = self._accounts.setdefault(tenant, _Account(earliest))
        # Who has calls isn't idle, however late they are.
        begin = account.paid_until if account.turns else max(account.paid_until, earliest)
        account.paid_until = begin + length
        order = max([account.paid_until, *(turn.order for turn in account.turns[-1:])])
        turn = Turn(tenant, order, begin, seconds, weight)
        account.turns.append(turn)
        return turn

    def serve(self, turn: Turn) -> None:
        """Something is done for a call now: time isn't before its beginning."""
        self._last_served = turn.seconds / turn.weight
        self._now = max(self._now, turn.begin)

    def leave(self, turn: Turn, seconds: float) -> None:
        """A call has ended, or was given up.

        Args:
            turn: its place.
            seconds: what it took, in the measure of its prediction; 0 if nothing was done for it.
        """
        # All who had calls until now had a part of the time that it took.
        weights = sum(account.turns[-1].weight for account in self._accounts.values() if account.turns)
        self._now += seconds / weights
        account = self._accounts[turn.tenant]
        account.turns.remove(turn)
        account.paid_until += (seconds - turn.seconds) / turn.weight
        if len(self._accounts) > MOST_IDLE_TENANTS:
            self._forget_idle()

    def _forget_idle(self) -> None:
        self._accounts = {
            tenant: account
            for tenant, account in self._accounts.items()
            if account.turns or account.paid_until > self._now - self._last_served
        }


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
