"""A worker in a thread of its own, with an event loop of its own, inside a process that has others.

    Ray Serve's loop ──check · stats──► HostedWorker ──► thread: event loop ──► WorkerServer ──► engine's thread

Knows nothing of Ray, and nothing of what a worker consists of.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from kvservice.errors import Unavailable
from kvservice.types import WorkerStats
from kvservice.worker.server import WorkerServer

logger = logging.getLogger(__name__)

T = TypeVar("T")

OpenWorker = Callable[[], AbstractAsyncContextManager[WorkerServer]]
"""Gives a worker that hasn't been started, and takes it down at the end."""


class HostedWorker:
    """Runs one worker. All methods may be called from any thread."""

    def __init__(self, open_worker: OpenWorker) -> None:
        self._open_worker = open_worker
        self._thread = threading.Thread(target=self._main, name="worker", daemon=True)
        self._started: Future[str] = Future()
        self._ended = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._worker: WorkerServer

    def start(self) -> str:
        """Starts the worker and gives its address once it serves. Blocks. Raises what the worker's start raises."""
        self._thread.start()
        return self._started.result()

    async def stats(self) -> WorkerStats:
        """The worker's counters.

        Raises:
            Unavailable: it has ended.
        """
        return await asyncio.wrap_future(self._worker.stats())

    async def check(self, timeout_s: float) -> None:
        """Raises Unavailable unless the worker's engine advances within `timeout_s`."""
        await self._ask(lambda: self._worker.check(timeout_s))

    def begin_drain(self) -> None:
        """Has the worker take no new calls, hand its sessions over and stop. Returns at once; `drain` waits for it."""
        if self._started.done() and self._started.exception() is None and not self._ended.is_set():
            asyncio.run_coroutine_threadsafe(self._worker.drain(), self._loop)

    def drain(self, timeout_s: float) -> None:
        """Lets running calls end within the worker's grace, and stops it. Blocks. May be called again.

        Args:
            timeout_s: how long to wait for the end; the worker's own grace should be shorter.
        """
        self.begin_drain()
        self._ended.wait(timeout_s)

    async def _ask(self, question: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if self._ended.is_set():
            raise Unavailable("the worker has stopped", reason="stopped")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(question(), self._loop))

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:
            if not self._started.done():
                self._started.set_exception(error)
            else:
                logger.exception("worker_thread_failed")
        finally:
            self._ended.set()

    async def _run(self) -> None:
        async with self._open_worker() as worker:
            await worker.start()
            self._loop, self._worker = asyncio.get_running_loop(), worker
            self._started.set_result(worker.address)
            await worker.wait_stopped()
