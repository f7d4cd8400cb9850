"""The time by which sessions and leases expire: a server's, the same for all processes. Knows no server.

A process whose machine's clock jumps would expire what others still use, or write records that are over at once. So
time is asked of the server that keeps the records, and carried on between by a clock that never jumps.
"""

from __future__ import annotations

import time
from collections.abc import Callable

ASK_EVERY_S = 5.0
MOST_ROUND_TRIP_S = 0.5
"""Of an answer that took longer nobody can say well enough when it was given."""


class ServerClock:
    """Unix seconds as a server tells them; the machine's own until one has been asked. For one event loop.

    Args:
        wall: the machine's clock, which may jump.
        steady: seconds since any moment, which never do.
    """

    def __init__(self, *, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self.steady = steady
        self._wall = wall
        self._ahead_s: float | None = None
        """Of the server to `steady`."""
        self._asked_at: float | None = None

    def __call__(self) -> float:
        """Now."""
        return self._wall() if self._ahead_s is None else self.steady() + self._ahead_s

    @property
    def is_due(self) -> bool:
        """Whether the server should be asked again."""
        return self._asked_at is None or self.steady() - self._asked_at >= ASK_EVERY_S

    def note(self, told_s: float, sent_at: float) -> None:
        """The server has just answered `told_s` to what was sent at `sent_at`, by `steady`."""
        now = self.steady()
        if self._ahead_s is None or now - sent_at <= MOST_ROUND_TRIP_S:
            self._ahead_s = told_s - (sent_at + now) / 2
            self._asked_at = now
