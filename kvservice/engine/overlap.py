"""What a link brings of followers' values while other layers compute. For measuring alone, as the link itself is.

What a follower recalls its anchor chose, layers before: from then on its values can be on their way. The link serves
layers in their order. Where something isn't there when a layer needs it, the step waits, as it would.

    layer 3, anchor     ──choose──┤ asks for layers 4, 5, ...
    layer 4, follower   ··········├─────arrives─────┤
                                                  needs it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from kvservice.attention.batch import SequenceRows
from kvservice.recall.sharing import SharedCells


class FetchOverlap:
    """The fetches of one pass of rows through layers. A `RecallTimer`.

    Args:
        rows: of the sequences.
        bytes_per_s: the link's speed.
        clock: seconds, monotonic.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        rows: Sequence[SequenceRows],
        bytes_per_s: float,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._memories = [row.memory for row in rows]
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._begun_at = self._needed_at = self._free_at = clock()
        self._chosen_at: dict[int, float] = {}
        self._seen = [self._fetched(number) for number in range(len(rows))]

    def begins(self, layer: int) -> None:  # noqa: ARG002 -- they come in order
        """A layer is about to recall."""
        self._needed_at = self._clock()

    def ends(self, layer: int) -> None:
        """It has; what it fetched, the counters say."""
        now = self._chosen_at[layer] = self._clock()
        for number, memory in enumerate(self._memories):
            seen, fetched = self._seen[number], self._fetched(number)
            self._seen[number] = fetched
            of_all, of_followers = (after - before for before, after in zip(seen, fetched, strict=True))
            if memory.shared is not None and of_followers:
                start = max(self._asked_at(memory.shared, layer), self._free_at)
                self._free_at = start + of_followers / self._bytes_per_s
                in_time = int(max(0.0, self._needed_at - start) * self._bytes_per_s)
                memory.counters.arrived_bytes += min(of_followers, in_time)
            if of_all > of_followers:
                start = max(self._needed_at, self._free_at)
                self._free_at = start + (of_all - of_followers) / self._bytes_per_s
        if self._free_at > now:
            self._sleep(self._free_at - now)

    def _asked_at(self, shared: SharedCells, layer: int) -> float:
        """When the last of a layer's anchors had chosen; tokens may have passed it in an earlier step."""
        anchors = shared.groups.key_layers[layer][~shared.owns[layer]].tolist()
        return max(self._chosen_at.get(anchor, self._begun_at) for anchor in anchors)

    def _fetched(self, number: int) -> tuple[int, int]:
        counters = self._memories[number].counters
        return counters.recalled_bytes, counters.follower_bytes
