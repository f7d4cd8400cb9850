"""Ends background tasks. Knows nothing of what they do."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

_AGAIN_AFTER_S = 0.1


async def end_tasks(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancels tasks and waits until they have ended.

    One cancel isn't enough for a task that may be in a call of the store: `asyncio.wait_for` of Python 3.11, which the
    Redis client uses, loses a cancel that comes together with the reply.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_AFTER_S)
