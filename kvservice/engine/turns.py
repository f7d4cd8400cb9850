"""When each call is read, among those of all tenants: fair shares of the seconds that it is predicted to take.

Knows no bytes and no schedules. The policy itself is `internal.fair`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvservice.engine.meters import Meters
from kvservice.internal.fair import FairShares, Price, Turn, expected_answer_tokens
from kvservice.types import EngineCall


@dataclass(frozen=True, slots=True)
class Fare:
    """What a call is predicted to take, and its place by that.

    Attributes:
        turn: its place.
        price: of its tokens, when it came.
        num_read: tokens that are to be read.
        read_s: what reading takes, at the speed of late steps; 0 if that isn't known.
    """

    turn: Turn
    price: Price
    num_read: int
    read_s: float


class Turns:
    """Places of all calls of an engine. Who joins leaves."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters
        self._shares = FairShares()

    def join(self, call: EngineCall, num_read: int) -> Fare:
        """A call came, with so many tokens to read."""
        meters = self._meters
        price = Price.of(meters.read_alone_tokens_per_s, meters.decode_tokens_per_s)
        answers = expected_answer_tokens(call.sampling.max_new_tokens, call.sampling.n) if call.sampling else 0
        turn = self._shares.join(call.tenant_tag, price.seconds(num_read, answers), call.terms.weight)
        speed = meters.prefill_tokens_per_s
        return Fare(turn, price, num_read, num_read / speed if speed else 0.0)

    def serve(self, fare: Fare) -> None:
        """Tokens of a call are read now."""
        self._shares.serve(fare.turn)

    def leave(self, fare: Fare, *, num_unread: int, num_answered: int) -> None:
        """A call has ended, and wasn't read to its end, or answered as predicted."""
        num_read = max(0, fare.num_read - num_unread)
        self._shares.leave(fare.turn, fare.price.seconds(num_read, num_answered))
