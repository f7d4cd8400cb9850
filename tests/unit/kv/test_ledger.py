import pytest

from kvservice.errors import InternalError
from kvservice.kv.ledger import Ledger, Owner, Reservation
from kvservice.types import SessionId

A, B = SessionId("a"), SessionId("b")


def test_a_reservation_is_made_whole_or_not_at_all():
    ledger = Ledger(100, 50)
    ledger.reserve(A, Reservation(60, 10))
    assert ledger.shortfall(B, Reservation(50, 45)) == Reservation(10, 5)
    with pytest.raises(InternalError):
        ledger.reserve(B, Reservation(50, 5))
    assert (ledger.device_free_bytes, ledger.host_free_bytes) == (40, 40)


def test_a_reservation_grows_and_shrinks_in_place():
    ledger = Ledger(100, 50)
    ledger.reserve(A, Reservation(60, 10))
    ledger.reserve(A, Reservation(90, 50))
    ledger.reserve(A, Reservation(20, 0))
    assert (ledger.device_free_bytes, ledger.host_free_bytes) == (80, 50)
    assert ledger.release(A) == Reservation(20, 0)
    assert (ledger.device_free_bytes, ledger.host_free_bytes) == (100, 50)


def test_giving_back_more_than_was_taken_is_found_out():
    ledger = Ledger(100, 50)
    ledger.add(Owner.INDEX, 8)
    with pytest.raises(InternalError, match="index gave back more"):
        ledger.add(Owner.INDEX, -9)


def test_what_is_shared_is_credited_once_for_each_further_holder():
    ledger = Ledger(100, 50)
    ledger.reserve(A, Reservation(60, 30))
    for owner, num_bytes in ((Owner.WINDOW, 40), (Owner.HOST, 20)):
        ledger.add(owner, num_bytes)
        ledger.share(owner, num_bytes)
        ledger.share(owner, num_bytes // 2)
    assert (ledger.device_free_bytes, ledger.host_free_bytes) == (100 - 60 + 60, 50 - 30 + 30)
    assert (ledger.used_bytes(Owner.WINDOW), ledger.shared_bytes(Owner.WINDOW)) == (40, 60)


def test_losing_more_holders_than_there_were_is_found_out():
    ledger = Ledger(100, 50)
    ledger.share(Owner.INDEX, 8)
    with pytest.raises(InternalError, match="index lost more holders"):
        ledger.share(Owner.INDEX, -9)


def test_the_first_reservation_of_a_fork_takes_nothing():
    ledger = Ledger(100, 50)
    ledger.reserve(A, Reservation(100, 50))
    ledger.add(Owner.WINDOW, 100)
    ledger.share(Owner.WINDOW, 100)
    ledger.reserve_shared(B, Reservation(100, 0))
    assert ledger.device_free_bytes == 0
    assert ledger.release(B) == Reservation(100, 0)


def test_a_part_that_is_handed_over_changes_nothing_for_others():
    ledger = Ledger(100, 50)
    ledger.reserve(A, Reservation(100, 50))
    ledger.hand_over(A, B, Reservation(30, 5))
    assert (ledger.reservation(A), ledger.reservation(B)) == (Reservation(70, 45), Reservation(30, 5))
    assert (ledger.device_free_bytes, ledger.host_free_bytes) == (0, 0)


def test_while_credit_is_lost_giving_back_is_possible_and_nobody_gets_more():
    ledger = Ledger(100, 50)
    ledger.reserve(A, Reservation(90, 0))
    ledger.add(Owner.WINDOW, 90)
    ledger.share(Owner.WINDOW, 80)
    ledger.reserve(B, Reservation(90, 0))
    ledger.share(Owner.WINDOW, -80)
    assert ledger.device_free_bytes == -80
    assert ledger.shortfall(A, Reservation(90, 0)) == Reservation(80, 0)
    with pytest.raises(InternalError, match="no room"):
        ledger.reserve(A, Reservation(91, 0))
    ledger.reserve(A, Reservation(10, 0))
    assert ledger.device_free_bytes == 0
