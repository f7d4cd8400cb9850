"""What a worker does for stored KV beside its engine: publish, renew, scrub, verify. Knows nothing of gRPC."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from kvservice.errors import Conflict, NotFound
from kvservice.store.base import StateStore
from kvservice.store.blobs import Blobs
from kvservice.store.ledger import fork_manifest
from kvservice.store.scrub import Scrubber, ScrubReport
from kvservice.store.tasks import end_tasks
from kvservice.store.verify import TenantFindings, verify
from kvservice.types import CallId, FinishedEvent, SessionId, TenantId, WorkerId
from kvservice.worker.publishing import FrameLog, Publisher
from kvservice.worker.resuming import Resumer

logger = logging.getLogger(__name__)

SCRUBBER_LOCK = SessionId("kv-scrubber")
"""No session has such an id."""
LAST_WORDS_S = 2.0
"""What publications that are under way have to end in when the worker stops."""


class ClosableBlobs(Blobs, Protocol):
    """`Blobs` of our own."""

    async def aclose(self) -> None:
        """Closes connections."""


class StoredKv:
    """Owns the publisher, the scrubber and their timers.

    Args:
        worker_id: of this worker.
        store: sessions and the ledger; the caller's.
        blobs: closed with this.
        frames: tells what was written.
        ttl_s: of leases and frames.
        scrub_interval_s: between two rounds of the scrubber.
        resumer: brings sessions back; without it they are computed again.
        sleep: of the timers.
    """

    def __init__(
        self,
        worker_id: WorkerId,
        store: StateStore,
        blobs: ClosableBlobs,
        frames: FrameLog,
        *,
        ttl_s: float,
        scrub_interval_s: float,
        resumer: Resumer | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.publisher = Publisher(worker_id, store, frames, blobs, ttl_s)
        self.resumer = resumer
        self.num_failures = 0
        """Renewals and rounds of the scrubber that failed, since the start."""
        self._worker_id = worker_id
        self._store = store
        self._blobs = blobs
        self._scrubber = Scrubber(store.ledger, blobs, time.monotonic)
        self._ttl_s = ttl_s
        self._scrub_interval_s = scrub_interval_s
        self._sleep = sleep
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def last_scrub(self) -> ScrubReport | None:
        """What this worker's scrubber found in its last whole pass."""
        return self._scrubber.last_pass

    def start(self) -> None:
        """Starts the timers."""
        self._tasks = [
            asyncio.create_task(self._forever(self._ttl_s / 3, self.publisher.renew), name="renew stored kv"),
            asyncio.create_task(self._forever(self._scrub_interval_s, self._scrub), name="scrub stored kv"),
        ]

    async def stop(self) -> None:
        """Ends the timers, publishes what has ended, closes the connections."""
        await end_tasks(self._tasks)
        if self.resumer is not None:
            await self.resumer.stop()
        await self.publisher.stop(LAST_WORDS_S)
        await self._blobs.aclose()

    def ended(self, call_id: CallId, end: FinishedEvent | None) -> None:
        """A call has ended, with its end if it ended well, or was refused. From any thread."""
        if end is None:
            self.publisher.ended(call_id, 0)
            return
        if self.resumer is not None:
            self.resumer.note_finished(end)
        self.publisher.ended(call_id, len(end.appended_tokens), end.reached)

    async def hand_over(self, session_id: SessionId, *, keeps_kv: bool) -> bool:
        """Publishes what is left of a session, and lets it go; whether a manifest has all of it.

        With `keeps_kv` it may come back here soon: then what couldn't be published stays known.
        """
        is_stored = await self.publisher.publish(session_id)
        if not (keeps_kv and self.publisher.is_behind(session_id)):
            await self.publisher.release(session_id)
        return is_stored

    async def fork(
        self,
        tenant: TenantId,
        tenant_tag: bytes,
        session_id: SessionId,
        fork_id: SessionId,
        num_tokens: int,
        *,
        is_document: bool = False,
    ) -> bool:
        """Publishes a manifest for a fork, which names the frames of the session. Whether there was something to name.

        With `is_document` the fork's tokens are a document that the two share.

        Raises:
            Unavailable: the state store can't be reached.
        """
        await self.publisher.share(session_id)
        try:
            await fork_manifest(
                self._store.ledger, tenant, session_id, fork_id, num_tokens, self._ttl_s, is_document=is_document
            )
        except (NotFound, Conflict) as error:
            logger.info("fork_not_stored", extra={"session_id": session_id, "why": error.message})
            return False
        # So that its lease is renewed from now on.
        await self.publisher.acquire(tenant, tenant_tag, fork_id)
        return True

    async def verify(self, tenant: TenantId, tenant_tag: bytes, session_id: str) -> TenantFindings:
        """See `store.verify`; what has ended is published first."""
        await self.publisher.settle()
        return await verify(self._store, self._blobs, tenant, tenant_tag, session_id)

    async def _scrub(self) -> None:
        # One worker of the fleet: the one that holds the lock, for as long as it renews it.
        if await self._store.lock_session(SCRUBBER_LOCK, self._worker_id, 3 * self._scrub_interval_s):
            await self._scrubber.round()

    async def _forever(self, interval_s: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await self._sleep(interval_s)
            try:
                await work()
            except Exception:
                # The servers may be back at the next turn.
                self.num_failures += 1
                logger.exception("upkeep_failed")
