from __future__ import annotations

from kvservice.gateway.line import Line
from kvservice.internal.fair import FairShares

LARGE, SMALL = (100, 0), (10, 0)


class OneTenant:
    """Places of its calls."""

    def __init__(self) -> None:
        self._shares = FairShares()

    def __call__(self, priority=0, tenant=b"ann"):
        return self._shares.join(tenant, 1.0, priority=priority)


def turn_of(*tickets) -> list[bool]:
    return [ticket.turn.is_set() for ticket in tickets]


def test_the_turn_goes_from_a_blocked_large_call_to_small_ones_and_back() -> None:
    line, place = Line(patience_s=5.0), OneTenant()
    large = line.join(place(), *LARGE, version=1, now=0.0)
    small = line.join(place(), *SMALL, version=-1, now=1.0)
    assert turn_of(large, small) == [False, True]
    small.tried_version = 1
    line.hand_on(small, 1.0)
    assert turn_of(large, small) == [True, False]
    large.tried_version = 2
    line.hand_on(large, 2.0)
    assert turn_of(large, small) == [False, True]


def test_nothing_passes_a_call_that_has_waited_long_or_that_needs_no_more() -> None:
    line, place = Line(patience_s=5.0), OneTenant()
    large = line.join(place(), *LARGE, version=1, now=0.0)
    alike = line.join(place(), *LARGE, version=-1, now=1.0)
    small = line.join(place(), *SMALL, version=-1, now=5.0)
    large.tried_version = 2
    line.hand_on(large, 5.0)
    assert turn_of(large, alike, small) == [True, False, False]


def test_who_passes_hands_the_turn_on_behind_it_and_a_higher_priority_takes_it() -> None:
    line, place = Line(patience_s=5.0), OneTenant()
    large = line.join(place(), *LARGE, version=1, now=0.0)
    first, second = (line.join(place(), *SMALL, version=-1, now=1.0) for _ in range(2))
    large.tried_version = 2
    line.hand_on(large, 1.0)
    first.tried_version = 2
    line.leave(first, 1.0)
    # As small as the first, so it passes the large one too.
    assert turn_of(large, second) == [False, True]
    urgent = line.join(place(5), *LARGE, version=-1, now=1.0)
    assert line.is_first(urgent)
    assert turn_of(urgent, large, second) == [True, False, False]
    line.leave(urgent, 1.0)
    line.leave(second, 1.0)
    assert turn_of(large) == [True]
    line.leave(large, 1.0)
    assert len(line) == 0


def test_the_line_follows_places_that_have_moved_and_the_first_has_the_turn() -> None:
    line, place = Line(patience_s=5.0), OneTenant()
    ann = line.join(place(), *LARGE, version=1, now=0.0)
    bob = line.join(place(tenant=b"bob"), *LARGE, version=1, now=0.0)
    assert turn_of(ann, bob) == [True, False]
    urgent = line.join(place(1), *LARGE, version=-1, now=0.0)
    # Hers moves back behind his, and the urgent one takes its place: that isn't before his.
    assert line.is_first(bob)
    assert turn_of(ann, bob, urgent) == [False, True, False]
    line.leave(bob, 0.0)
    assert turn_of(ann, urgent) == [False, True]
