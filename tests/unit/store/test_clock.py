from __future__ import annotations

from kvservice.store.clock import ASK_EVERY_S, MOST_ROUND_TRIP_S, ServerClock

DAY_S = 86_400.0


class Hands:
    """A machine's two clocks, moved by hand."""

    def __init__(self) -> None:
        self.wall, self.steady = 1_000_000.0, 50.0

    def clock(self) -> ServerClock:
        return ServerClock(wall=lambda: self.wall, steady=lambda: self.steady)


def test_machine_s_clock_holds_until_the_server_has_been_asked():
    hands = Hands()
    clock = hands.clock()
    assert clock() == hands.wall
    assert clock.is_due


def test_jump_of_the_machine_s_clock_changes_nothing():
    hands = Hands()
    clock = hands.clock()
    clock.note(2_000_000.0, hands.steady)
    for jump in (2 * DAY_S, -5 * DAY_S):
        hands.wall += jump
        assert clock() == 2_000_000.0
    hands.steady += 3.0
    assert clock() == 2_000_003.0


def test_server_is_asked_again_after_a_while_and_believed():
    hands = Hands()
    clock = hands.clock()
    clock.note(2_000_000.0, hands.steady)
    assert not clock.is_due
    hands.steady += ASK_EVERY_S
    assert clock.is_due
    clock.note(2_000_100.0, hands.steady)
    assert clock() == 2_000_100.0


def test_time_of_an_answer_is_the_middle_of_its_way():
    hands = Hands()
    clock = hands.clock()
    sent_at, hands.steady = hands.steady, hands.steady + 0.4
    clock.note(2_000_000.0, sent_at)
    assert clock() == 2_000_000.2


def test_answer_that_was_long_on_its_way_is_not_believed_over_one_that_was_not():
    hands = Hands()
    clock = hands.clock()
    clock.note(2_000_000.0, hands.steady)
    hands.steady += ASK_EVERY_S
    clock.note(2_100_000.0, hands.steady - 2 * MOST_ROUND_TRIP_S)
    assert clock() == 2_000_000.0 + ASK_EVERY_S
    assert clock.is_due
