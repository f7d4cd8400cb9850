"""A stand-in for the bus between host memory and device, where both are the same memory. For measuring alone."""

from __future__ import annotations

import time


class HostLink:
    """Lets bytes pass no faster than a link would.

    Nothing passes beside computation: what is carried holds up the step in full. A real link, which overlaps with
    computation, costs at most as much. What is known to be needed layers before is simulated as it overlaps: see
    `engine.overlap`.

    Args:
        bytes_per_s: the link's speed.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s

    def carry(self, num_bytes: int) -> None:
        """Takes the time that so many bytes take."""
        if num_bytes:
            time.sleep(num_bytes / self.bytes_per_s)
