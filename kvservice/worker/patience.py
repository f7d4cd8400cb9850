"""How long to wait for stored KV before computing it, and what not to ask for again. Pure; knows no reader.

Nobody knows beforehand whether a tier will answer. Who waits for it as long as computing takes, and computes then, has
lost at most as much again; who waits longer may lose anything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from kvservice.types import SessionId

MOST_S = 10.0
LEAST_S = 1.0
"""A healthy tier that is busy for a moment isn't given up."""
COMPUTE_SHARE = 2.0
"""Of the time that computing is predicted to take, what a request is left with: predictions are rough."""
LASTING = frozenset({"absent", "checksum", "version", "fingerprint"})
"""Reasons of misses that the same frames will have again."""
MAX_KNOWN = 4096


def fetch_timeout_s(left_s: float | None, compute_s: float | None) -> float:
    """What a fetch may take.

    Args:
        left_s: of the request's time; None: it has no deadline.
        compute_s: what computing the same would take; None: that isn't known yet.
    """
    timeout_s = MOST_S if compute_s is None else min(MOST_S, max(LEAST_S, compute_s))
    if left_s is None:
        return timeout_s
    spare_s = left_s / 2 if compute_s is None else left_s - COMPUTE_SHARE * compute_s
    return max(0.0, min(timeout_s, spare_s))


class KnownMissing:
    """How much of a session's stored KV is there, where a fetch has found the rest to be gone.

    It holds for one version of the manifest: whoever writes the frames again publishes another.
    """

    def __init__(self) -> None:
        self._groups: OrderedDict[SessionId, tuple[int, int, int]] = OrderedDict()

    def note(self, session_id: SessionId, epoch: int, version: int, num_groups: int, misses: Mapping[str, int]) -> None:
        """A fetch brought `num_groups`, and missed frames behind them for these reasons."""
        self._groups.pop(session_id, None)
        # One that only came too late may come in time another day.
        if misses and LASTING.issuperset(misses):
            self._groups[session_id] = (epoch, version, num_groups)
            if len(self._groups) > MAX_KNOWN:
                self._groups.popitem(last=False)

    def groups(self, session_id: SessionId, epoch: int, version: int) -> int | None:
        """The groups that are there; None if all may be."""
        known = self._groups.get(session_id)
        return known[2] if known is not None and known[:2] == (epoch, version) else None
