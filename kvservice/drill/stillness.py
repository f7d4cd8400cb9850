"""Whether the machine stood still while something was measured: if so, what was found says nothing of the service.

A machine that is suspended, or whose cores are all somebody else's, is late for everything. This task should wake every
tenth of a second; how late it is when it does is how long nobody got to run.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import TracebackType
from typing import Self

from kvservice.drill.outcomes import FaultReport

logger = logging.getLogger(__name__)

TRIES = 3
"""Of what a machine that stood still has spoilt."""
TICK_S = 0.1
MOST_LATE_S = 2.0
"""Keepalives and patience are longer than this; two such pauses aren't."""


class Stillness:
    """Use as `async with Stillness() as still:`, on an event loop that nothing else blocks."""

    def __init__(self) -> None:
        self.late_s = 0.0
        """The longest pause so far, in seconds."""
        self._ticking: asyncio.Task[None] | None = None

    @property
    def is_long(self) -> bool:
        """Whether what was found in this time is to be found again."""
        return self.late_s > MOST_LATE_S

    async def __aenter__(self) -> Self:
        self._ticking = asyncio.create_task(self._tick())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            self.late_s = max(self.late_s, loop.time() - due)


async def found_in_peace(find: Callable[[], Awaitable[FaultReport]]) -> FaultReport:
    """What is found, found again if it isn't as it must be and the machine stood still meanwhile."""
    for tries_left in reversed(range(TRIES)):
        async with Stillness() as still:
            found = replace(await find(), paused_s=still.late_s)
        if found.passed or not still.is_long or not tries_left:
            return found
        logger.warning("machine_stood_still", extra={"fault": found.name, "paused_s": still.late_s})
    raise AssertionError("the last try returns")
