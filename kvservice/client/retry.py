"""When a failed call is made again, and after how long. Knows nothing of gRPC."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from kvservice.errors import Conflict, KVServiceError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how patiently. `sleep` and `rng` are parameters for tests."""

    max_attempts: int = 9
    """Over about 12 s: longer than a session stays locked after the gateway that changed it was lost."""
    first_delay_s: float = 0.1
    max_delay_s: float = 5.0
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    rng: random.Random = field(default_factory=random.Random)


class Attempts:
    """The attempts of one call."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._failed = 0
        self._was_cut = False

    async def pause(self, error: KVServiceError) -> None:
        """Waits before the next attempt; raises `error` when there is none to be made."""
        self._failed += 1
        if not self._may_pass(error) or self._failed >= self._policy.max_attempts:
            raise error
        # After a cut the first attempt may still hold the session for a moment.
        self._was_cut = self._was_cut or error.status == "UNAVAILABLE"
        # Doubling, with jitter, so that callers who failed together don't come back together.
        longest = min(self._policy.max_delay_s, self._policy.first_delay_s * 2.0 ** (self._failed - 1))
        delay_s = longest * self._policy.rng.uniform(0.5, 1.0)
        if error.retry_after_s is not None:
            delay_s = max(delay_s, min(error.retry_after_s, self._policy.max_delay_s))
        await self._policy.sleep(delay_s)

    def _may_pass(self, error: KVServiceError) -> bool:
        if isinstance(error, Conflict):
            return error.reason == "request_in_flight" or (self._was_cut and error.reason == "session_busy")
        return error.retryable
