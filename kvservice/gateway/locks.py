"""One call at a time may change a session. Knows nothing of what the call does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvservice.errors import Conflict, KVServiceError
from kvservice.store.base import StateStore
from kvservice.store.tasks import end_tasks
from kvservice.types import SessionId

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 0.5


@asynccontextmanager
async def hold_session(store: StateStore, session_id: SessionId, owner: str, ttl_s: float) -> AsyncIterator[None]:
    """Holds the right to change a session for the time of the block, renewing it as long as that takes.

    Should it be lost all the same (the store was away for longer than `ttl_s`), then the write at the end of the call
    fails: it names the version it started from.

    Raises:
        Conflict: another call has it.
    """
    if not await store.lock_session(session_id, owner, ttl_s):
        raise Conflict(
            f"another call is changing session {session_id}; try again once it has ended",
            reason="session_busy",
            retry_after_s=RETRY_AFTER_S,
        )
    renewal = asyncio.create_task(_renew(store, session_id, owner, ttl_s))
    try:
        yield
    finally:
        await end_tasks([renewal])
        try:
            await store.unlock_session(session_id, owner)
        except KVServiceError as error:
            # What the call has done is done; the lock lapses by itself.
            logger.warning("lock_not_given_back", extra={"session_id": session_id, "why": error.message})


async def _renew(store: StateStore, session_id: SessionId, owner: str, ttl_s: float) -> None:
    while True:
        await asyncio.sleep(ttl_s / 3)
        try:
            held = await store.lock_session(session_id, owner, ttl_s)
        except KVServiceError as error:
            logger.warning("lock_not_renewed", extra={"session_id": session_id, "why": error.message})
            continue
        if not held:
            logger.warning("lock_lost", extra={"session_id": session_id})
            return
