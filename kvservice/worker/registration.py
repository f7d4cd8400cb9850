"""The worker's entry in the store, kept alive by a lease. Knows nothing of engines or gRPC."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from kvservice.errors import KVServiceError
from kvservice.store.base import WorkerRecord
from kvservice.store.tasks import end_tasks
from kvservice.types import WorkerId

logger = logging.getLogger(__name__)

RETRY_S = 1.0
"""After a renewal that failed: the lease is running out."""


class LeaseStore(Protocol):
    """The part of a state store that a worker needs; see `StateStore`."""

    async def next_epoch(self) -> int:
        """A number greater than any it gave before."""

    async def register_worker(self, record: WorkerRecord, ttl_s: float) -> None:
        """Announces a worker for `ttl_s`."""

    async def renew_worker(self, worker_id: WorkerId, epoch: int, ttl_s: float) -> bool:
        """Prolongs the lease; False if it is lost."""

    async def unregister_worker(self, worker_id: WorkerId, epoch: int) -> None:
        """Ends the lease, if it is still this epoch's."""


class Registration:
    """Registers a worker under a fresh epoch and renews its lease until it is stopped.

    A lease that was lost (the store was away for too long, or came back empty) is taken again under a new epoch, so
    that nothing that was told to the old one reaches the new one.
    """

    def __init__(
        self,
        store: LeaseStore,
        worker_id: WorkerId,
        ttl_s: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.epoch = 0
        """The epoch in force; 0 before the first registration."""
        self.num_failures = 0
        """Renewals that the store failed, since the start."""
        self._store = store
        self._worker_id = worker_id
        self._ttl_s = ttl_s
        self._sleep = sleep
        self._address = ""
        self._renewal: asyncio.Task[None] | None = None

    async def start(self, address: str) -> None:
        """Registers the worker at `address`. Raises what the store raises."""
        self._address = address
        await self._register()
        self._renewal = asyncio.create_task(self._renew_forever(), name="worker lease")

    async def stop(self) -> None:
        """Stops renewing and takes the worker out of the store. If that fails the lease ends by itself."""
        if self._renewal is None:
            return
        await end_tasks([self._renewal])
        self._renewal = None
        try:
            await self._store.unregister_worker(self._worker_id, self.epoch)
        except KVServiceError as error:
            logger.warning("unregister_failed", extra={"worker_id": self._worker_id, "error": error.message})

    async def _register(self) -> None:
        self.epoch = await self._store.next_epoch()
        await self._store.register_worker(WorkerRecord(self._worker_id, self._address, self.epoch), self._ttl_s)
        logger.info("worker_registered", extra={"worker_id": self._worker_id, "epoch": self.epoch})

    async def _renew_forever(self) -> None:
        pause_s = self._ttl_s / 3
        while True:
            await self._sleep(pause_s)
            pause_s = self._ttl_s / 3
            try:
                if not await self._store.renew_worker(self._worker_id, self.epoch, self._ttl_s):
                    logger.warning("lease_lost", extra={"worker_id": self._worker_id, "epoch": self.epoch})
                    await self._register()
            except Exception:
                # The worker serves on while the store is away; the next turn tries again.
                self.num_failures += 1
                pause_s = min(pause_s, RETRY_S)
                logger.exception("lease_not_renewed", extra={"worker_id": self._worker_id})
