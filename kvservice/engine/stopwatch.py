"""Where the time of steps goes. Knows names and seconds."""

from __future__ import annotations

import time
from collections import defaultdict


class Stopwatch:
    """Adds up the seconds between laps by the name of what was done.

    Attributes:
        seconds: since the start, by name.
        steps: laps' rounds.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.steps = 0
        self._last = time.perf_counter()

    def start(self) -> None:
        """Begins a step: what was before isn't counted."""
        self.steps += 1
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Counts the time since the last lap as `name`'s."""
        now = time.perf_counter()
        self.seconds[name] += now - self._last
        self._last = now
