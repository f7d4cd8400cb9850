"""Commands for the state Redis that need no more than a round trip each. Knows nothing of what they mean."""

from __future__ import annotations

import asyncio
from typing import Any

from kvservice.tier.redis import FAULTS, connect, redacted, unavailable

TIMEOUT_S = 5.0

Command = tuple[Any, ...]


class RoundTrips:
    """A connection to the state Redis. Nothing is retried: a write whose answer was lost may have been made.

    Args:
        url: redis, rediss, unix or redis+sentinel URL. It connects when it is first used.
        max_connections: round trips at a time.
        timeout_s: limit of one, connecting included.

    Raises:
        ConfigError: the URL is malformed.
    """

    def __init__(self, url: str, *, max_connections: int, timeout_s: float = TIMEOUT_S) -> None:
        self._redis = connect(url, timeout_s=timeout_s, max_connections=max_connections)
        self._where = redacted(url)
        self._timeout_s = timeout_s

    async def run(self, *commands: Command) -> list[Any]:
        """The answers to `commands`, sent in one round trip. Raises Unavailable when the store can't be reached."""
        try:
            async with asyncio.timeout(self._timeout_s), self._redis.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                answers: list[Any] = await pipeline.execute()
        except FAULTS as error:
            raise unavailable(error, self._where, prefix="state_") from error
        return answers

    async def aclose(self) -> None:
        """Closes connections. Nothing may be called after it."""
        await self._redis.aclose()
