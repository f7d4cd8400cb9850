"""When each call is read, among those of all tenants: fair shares of the seconds that it is predicted to take.

Knows no bytes and no schedules. The policy itself is `internal.fair`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvservice.engine.meters import Meters
from kvservice.internal.fair import FairShares, Price, Turn, expected_answer_tokens
from kvservice.types import EngineCall

SELECT_READS = 4
"""A token that chooses what it recalls takes as long as so many that don't, over 6,000 tokens."""


@dataclass(frozen=True, slots=True)
class Fare:
    """What a call is predicted to take, and its place by that.

    Attributes:
        turn: its place.
        price: of its tokens, when it came.
        num_read: tokens that are to be read.
        num_selecting: of these the last ones, which choose what they recall.
        read_s: what reading takes, at the speed of late steps; 0 if that isn't known.
    """

    turn: Turn
    price: Price
    num_read: int
    num_selecting: int
    read_s: float


class Turns:
    """Places of all calls of an engine. Who joins leaves."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters
        self._shares = FairShares()

    def join(self, call: EngineCall, num_read: int, num_selecting: int = 0) -> Fare:
        """A call came, with so many tokens to read, of which the last ones choose what they recall."""
        meters = self._meters
        price = Price.of(meters.read_alone_tokens_per_s, meters.decode_tokens_per_s)
        answers = expected_answer_tokens(call.sampling.max_new_tokens, call.sampling.n) if call.sampling else 0
        turn = self._shares.join(
            call.tenant_tag,
            price.seconds(_reads(num_read, num_selecting), answers),
            call.terms.weight,
            priority=call.priority,
        )
        speed = meters.prefill_tokens_per_s
        return Fare(turn, price, num_read, num_selecting, num_read / speed if speed else 0.0)

    def serve(self, fare: Fare) -> None:
        """Tokens of a call are to be read now."""
        self._shares.serve(fare.turn)

    def count(self, fare: Fare, *, num_read: int = 0, num_selecting: int = 0, num_answered: int = 0) -> None:
        """Tokens of a call were read, or generated."""
        fare.turn.count(fare.price.seconds(_reads(num_read, num_selecting), num_answered))

    def leave(self, fare: Fare, *, num_unread: int, num_answered: int) -> None:
        """A call has ended, and wasn't read to its end, or answered as predicted."""
        num_read = max(0, fare.num_read - num_unread)
        num_selecting = max(0, fare.num_selecting - num_unread)
        self._shares.leave(fare.turn, fare.price.seconds(_reads(num_read, num_selecting), num_answered))


def _reads(num_read: int, num_selecting: int) -> int:
    """Tokens that are read, those that choose counted as several."""
    return num_read + (SELECT_READS - 1) * num_selecting
