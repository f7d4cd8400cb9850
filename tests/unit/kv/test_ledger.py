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
