"""How far a query sees, and a record of it for every token computed. Knows nothing of KV."""

from __future__ import annotations

from enum import Enum

from kvservice.types import Reached


class Reach(Enum):
    """What of the distant tokens a query attends to."""

    FULL = "full"
    SELECT = "select"


class ReachLog:
    """With which reach each position was computed, so that KV that was dropped can be computed again likewise."""

    def __init__(self) -> None:
        self.end = 0
        """Positions before it are recorded."""
        self._selected: list[tuple[int, int]] = []

    @classmethod
    def of(cls, reached: Reached) -> ReachLog:
        """The log that `reached` was made of."""
        log = cls()
        log.end, log._selected = reached.num_computed, list(reached.selected)
        return log

    def reached(self, num_tokens: int) -> Reached:
        """The record of the first `num_tokens` positions."""
        return Reached(self.end, tuple(self._selected)).until(num_tokens)

    @property
    def full_prefix(self) -> int:
        """Leading positions that saw everything before them: their KV depends on tokens alone, so it may be shared."""
        return self._selected[0][0] if self._selected else self.end

    def record(self, start: int, stop: int, reach: Reach) -> None:
        """Notes how positions `start` to `stop - 1` were computed. Positions recorded before stay as they are."""
        start = max(start, self.end)
        if start >= stop:
            return
        if reach is Reach.SELECT:
            if self._selected and self._selected[-1][1] == start:
                self._selected[-1] = (self._selected[-1][0], stop)
            else:
                self._selected.append((start, stop))
        self.end = stop

    def at(self, position: int) -> tuple[Reach, int]:
        """The reach of a recorded position, and the end of the run of positions that share it."""
        for start, stop in self._selected:
            if position < start:
                return Reach.FULL, min(start, self.end)
            if position < stop:
                return Reach.SELECT, stop
        return Reach.FULL, self.end

    def truncate(self, num_tokens: int) -> None:
        """Forgets all positions from `num_tokens` on."""
        self.end = min(self.end, num_tokens)
        self._selected = [(start, min(stop, num_tokens)) for start, stop in self._selected if start < num_tokens]

    def fork(self) -> ReachLog:
        """A copy."""
        twin = ReachLog()
        twin.end, twin._selected = self.end, list(self._selected)
        return twin
