"""Calls in line for room on the workers of one model: whose turn it is to ask. Knows no workers and no calls.

    first ──turn──► asks ──refused──► the next that may pass ──► asks ──► ... ──► first, at the next change of headroom

A call may pass one that is blocked if it needs fewer bytes, and only while the blocked one is patient: after that
nothing passes it any more, and what is freed is left for it. One whose tenant has all that it may have at a time is
passed by all others.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from operator import attrgetter

from kvservice.internal.fair import Turn


@dataclass(slots=True, eq=False)
class Ticket:
    """A place in line: by fair order among tenants, then by arrival."""

    place: Turn
    number: int
    device_bytes: int
    host_bytes: int
    patient_until: float
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    tried_version: int = -1
    """Of the fleet, when it last asked."""
    has_its_share: bool = False
    """It was refused because its tenant has all that it may have at a time: that is in nobody else's way."""

    @property
    def rank(self) -> tuple[float, int]:
        """Lower goes first. It changes as calls of its tenant come and go."""
        return self.place.order, self.number

    def is_smaller(self, other: Ticket) -> bool:
        """Whether it needs less than `other`, and nothing more of."""
        return self.device_bytes < other.device_bytes and self.host_bytes <= other.host_bytes

    def may_pass(self, other: Ticket, now: float) -> bool:
        """Whether it may ask while `other`, which goes first, is blocked."""
        if other.has_its_share and other.place.tenant != self.place.tenant:
            return True
        return self.is_smaller(other) and now < other.patient_until


class Line:
    """Tickets in order. One of them has the turn: the first, or one that passes it."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._tickets: list[Ticket] = []
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._tickets)

    def num_of(self, tenant: bytes) -> int:
        """A tenant's tickets."""
        return sum(ticket.place.tenant == tenant for ticket in self._tickets)

    def join(self, place: Turn, device_bytes: int, host_bytes: int, version: int, now: float) -> Ticket:
        """Takes a place. It has the turn if it is first, or if it may pass all those before it.

        Args:
            place: of the call among those of all tenants.
            device_bytes: that it needs.
            host_bytes: that it needs.
            version: of the fleet when it was refused; -1: it hasn't asked yet.
            now: seconds, of the clock that `hand_on` is told.
        """
        patient_until = now + self._patience_s
        ticket = Ticket(place, next(self._arrivals), device_bytes, host_bytes, patient_until, tried_version=version)
        first = self._tickets[0] if self._tickets else None
        self._tickets.append(ticket)
        self._tickets.sort(key=attrgetter("rank"))
        if self._tickets[0] is not first:
            self._give_turn(self._tickets[0])
        elif version < 0 and self._may_pass(ticket, now):
            self._give_turn(ticket)
        return ticket

    def leave(self, ticket: Ticket, now: float) -> None:
        """Gives a place up. The turn goes on behind it if it passed, else to the first."""
        position = self._tickets.index(ticket)
        del self._tickets[position]
        if ticket.turn.is_set():
            self._give_to_next(position, ticket.tried_version, now)

    def is_first(self, ticket: Ticket) -> bool:
        """Whether nobody is before it."""
        return self._tickets[0] is ticket

    def hand_on(self, ticket: Ticket, now: float) -> None:
        """It was refused: the turn goes to the next that may pass it, or back to the first."""
        if ticket.turn.is_set():
            self._give_to_next(self._tickets.index(ticket) + 1, ticket.tried_version, now)

    def _give_to_next(self, position: int, version: int, now: float) -> None:
        for ticket in self._tickets[position:]:
            if position > 0 and ticket.tried_version < version and self._may_pass(ticket, now):
                self._give_turn(ticket)
                return
        if self._tickets:
            self._give_turn(self._tickets[0])

    def _may_pass(self, ticket: Ticket, now: float) -> bool:
        before = itertools.takewhile(lambda other: other is not ticket, self._tickets)
        return all(ticket.may_pass(other, now) for other in before)

    def _give_turn(self, ticket: Ticket) -> None:
        for other in self._tickets:
            other.turn.clear()
        ticket.turn.set()
