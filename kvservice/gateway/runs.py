"""Calls that are being carried out, each in a task of its own. Knows nothing of what they do.

An RPC listens to a run. When the caller goes away the run is abandoned: it ends at once and cleans up behind itself,
without holding up the RPC's own end. A detached run goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from kvservice.errors import KVServiceError, Unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

DRAIN_RETRY_AFTER_S = 1.0


class _End:
    """The last item of a run's queue."""


class Run(Generic[T]):
    """One call that is being carried out, and the messages it has for its caller."""

    def __init__(self, *, detached: bool) -> None:
        self.detached = detached
        self.cause: KVServiceError | None = None
        """Why it was cancelled, if not because its caller went away."""
        self._messages: asyncio.Queue[T | _End] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._is_cancelled = False
        self._is_cancellable = False

    def emit(self, message: T) -> None:
        """Hands a message to whoever listens."""
        self._messages.put_nowait(message)

    def begin(self, body: Callable[[Run[T]], Awaitable[None]]) -> asyncio.Task[None]:
        """Starts the task."""
        self._task = asyncio.create_task(self._main(body))
        return self._task

    async def messages(self) -> AsyncGenerator[T]:
        """The messages as they come. When it is left before its end, the run is abandoned unless detached.

        Raises:
            Exception: what the run ended with.
        """
        try:
            while not isinstance(message := await self._messages.get(), _End):
                yield message
        finally:
            if not self.detached:
                self.cancel(None)
        if self.cause is not None:
            raise self.cause
        if self._task is not None:
            await self._task

    @contextmanager
    def cancellable(self) -> Iterator[None]:
        """The part of the run that `cancel` interrupts. What is taken before it, and written after it, always is."""
        if self._is_cancelled:
            raise asyncio.CancelledError
        self._is_cancellable = True
        try:
            yield
        finally:
            self._is_cancellable = False

    def cancel(self, cause: KVServiceError | None) -> None:
        """Ends the run, unless its outcome is being written. `cause` is what a listener is told."""
        if self._task is None or self._task.done() or self._is_cancelled:
            return
        self._is_cancelled = True
        self.cause = cause
        if self._is_cancellable:
            self._task.cancel()

    async def _main(self, body: Callable[[Run[T]], Awaitable[None]]) -> None:
        try:
            await body(self)
        finally:
            self._messages.put_nowait(_End())


class Runs:
    """All runs of this gateway. Once it drains, no new ones begin."""

    def __init__(self) -> None:
        self.draining = False
        self._running: dict[asyncio.Task[None], Run[object]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def start(self, body: Callable[[Run[T]], Awaitable[None]], *, detached: bool = False) -> Run[T]:
        """Begins to carry out a call.

        Raises:
            Unavailable: the service drains.
        """
        self.refuse_when_draining()
        run: Run[T] = Run(detached=detached)
        task = run.begin(body)
        self._running[task] = run  # type: ignore[assignment] # only cancelled through this table
        task.add_done_callback(self._ended)
        return run

    def refuse_when_draining(self) -> None:
        """Raises Unavailable when the service takes no new work."""
        if self.draining:
            raise Unavailable(
                "the service is draining; make the call again, at another gateway or after the restart",
                reason="draining",
                retry_after_s=DRAIN_RETRY_AFTER_S,
            )

    async def drain(self, grace_s: float) -> None:
        """Lets running calls end within the grace, then cancels them and waits until they have cleaned up."""
        self.draining = True
        if self._running and grace_s > 0:
            await asyncio.wait(list(self._running), timeout=grace_s)
        for run in list(self._running.values()):
            run.cancel(
                Unavailable(
                    "the service drained while the call ran; make the call again",
                    reason="draining",
                    retry_after_s=DRAIN_RETRY_AFTER_S,
                )
            )
        if self._running:
            await asyncio.wait(list(self._running))

    def _ended(self, task: asyncio.Task[None]) -> None:
        run = self._running.pop(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and run.detached and not isinstance(error, KVServiceError):
            # Nobody may be listening any more.
            logger.error("detached_run_failed", exc_info=error)
