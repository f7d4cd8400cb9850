"""The workers this gateway is connected to. Finds them by their leases in the store; knows nothing of sessions.

A lease brings a connection; the end of the connection, not of the lease, ends it: the store may be away for a while.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from kvservice.errors import KVServiceError, NotFound, Unavailable
from kvservice.gateway.placement import WorkerView
from kvservice.gateway.worker_link import RETRY_AFTER_S, ChannelSecurity, WorkerCall, WorkerLink
from kvservice.internal.v1 import worker_pb2
from kvservice.store.base import StateStore, WorkerRecord
from kvservice.store.tasks import end_tasks
from kvservice.types import ModelInfo, PromptFormat, SessionId, TenantId, TextRole, WorkerId
from kvservice.v1 import admin_pb2, common_pb2

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Freed:
    """What workers let go of a session, and what that took, in bytes times seconds, since its last call's end."""

    device_bytes: int = 0
    host_bytes: int = 0
    device_byte_s: float = 0.0
    host_byte_s: float = 0.0


class Fleet:
    """Holds one link to each worker. `version` grows with every change of the fleet or of a headroom.

    Without `security` the workers are on loopback, without TLS.
    """

    def __init__(
        self, store: StateStore, gateway_id: str, interval_s: float, security: ChannelSecurity | None = None
    ) -> None:
        self.version = 0
        self.failed_looks = 0
        self._store = store
        self._gateway_id = gateway_id
        self._interval_s = interval_s
        self._security = security
        self._links: dict[WorkerId, WorkerLink] = {}
        self._connecting: dict[WorkerId, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._discovery: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to look for workers."""
        self._discovery = asyncio.create_task(self._discover(), name="fleet-discovery")

    async def aclose(self) -> None:
        """Ends every connection; what still runs on them is cancelled by the workers."""
        await end_tasks([self._discovery] if self._discovery else [])
        await end_tasks(list(self._connecting.values()))
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(link.aclose() for link in links))

    def views(self) -> list[WorkerView]:
        """The connected workers."""
        return [link.view for link in self._links.values() if not link.closed]

    def models(self) -> dict[str, ModelInfo]:
        """The models of the connected workers, by name."""
        return {view.model.name: view.model for view in sorted(self.views(), key=lambda view: view.worker_id)}

    def model(self, name: str) -> ModelInfo:
        """The model called `name`.

        Raises:
            Unavailable: no worker is connected.
            NotFound: no connected worker has it.
        """
        models = self.models()
        if not models:
            raise Unavailable("no worker is connected; try again", reason="no_worker", retry_after_s=RETRY_AFTER_S)
        if name not in models:
            raise NotFound(f"unknown model {name!r}: known are {', '.join(models)}", reason="unknown_model")
        return models[name]

    async def submit(self, worker_id: WorkerId, submit: worker_pb2.Submit) -> WorkerCall:
        """See `WorkerLink.submit`."""
        link = self._links.get(worker_id)
        if link is None:
            raise Unavailable(f"worker {worker_id} is not connected", retry_after_s=RETRY_AFTER_S)
        return await link.submit(submit)

    async def tokenize(
        self, model: str, text: str, role: TextRole, prompt_format: PromptFormat, *, first: bool
    ) -> list[int]:
        """Token ids of `text`, by the worker of `model` that has the least to do."""
        return await self._ask_any(model, lambda link: link.tokenize(text, role, prompt_format, first=first))

    async def tokenize_chat(
        self, model: str, messages: Sequence[common_pb2.ChatMessage], *, first: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of all messages but the last, and of the last, by the least busy worker of `model`."""
        return await self._ask_any(model, lambda link: link.tokenize_chat(messages, first=first))

    async def release(self, session_id: SessionId, tenant_tag: bytes, *, purge: bool) -> Freed:
        """Drops a session's KV on every worker.

        All are told, because a session that moved may have left KV behind.

        Raises:
            Unavailable: `purge`, and no worker could do it.
        """
        links = [link for link in self._links.values() if not link.closed]
        answers = await asyncio.gather(
            *(link.release(session_id, tenant_tag, purge=purge) for link in links), return_exceptions=True
        )
        released = _that_answered(links, answers)
        if purge and not released:
            raise Unavailable(
                "no worker is connected that could delete the stored bytes; try again, or close without `purge`",
                reason="no_worker",
                retry_after_s=RETRY_AFTER_S,
            )
        return Freed(
            device_bytes=sum(each.freed_device_bytes for each in released),
            host_bytes=sum(each.freed_host_bytes for each in released),
            device_byte_s=sum(each.device_byte_s for each in released),
            host_byte_s=sum(each.host_byte_s for each in released),
        )

    async def stats(self) -> list[admin_pb2.WorkerStats]:
        """Counters of every worker that answers, ordered by id."""
        links = sorted((link for link in self._links.values() if not link.closed), key=lambda link: link.worker_id)
        answers = await asyncio.gather(*(link.stats() for link in links), return_exceptions=True)
        return _that_answered(links, answers)

    async def verify(self, tenant: TenantId, tenant_tag: bytes, session_id: str) -> admin_pb2.VerifyResponse:
        """What is stored of a tenant, by the worker that has the least to do.

        Raises:
            Unavailable: no worker is connected.
            FailedPrecondition: it has no kv Redis.
        """
        views = self.views()
        if not views:
            raise Unavailable("no worker is connected; try again", reason="no_worker", retry_after_s=RETRY_AFTER_S)
        least_busy = min(views, key=lambda view: (view.headroom.running_calls, view.worker_id))
        return await self._link(least_busy.worker_id).verify(tenant, tenant_tag, session_id)

    async def fork(self, worker_id: WorkerId, request: worker_pb2.ForkRequest) -> worker_pb2.ForkResponse:
        """See `WorkerLink.fork`."""
        return await self._link(worker_id).fork(request)

    async def hand_over(
        self, worker_id: WorkerId, session_id: SessionId, timeout_s: float, *, keeps_kv: bool = False
    ) -> bool:
        """See `WorkerLink.hand_over`."""
        return await self._link(worker_id).hand_over(session_id, timeout_s, keeps_kv=keeps_kv)

    async def take_on(self, worker_id: WorkerId, tenant: TenantId, tenant_tag: bytes, session_id: SessionId) -> bool:
        """See `WorkerLink.take_on`."""
        return await self._link(worker_id).take_on(tenant, tenant_tag, session_id)

    async def drain(self, worker_id: WorkerId, grace_s: float) -> int:
        """Drains one worker; gives the number of its running calls."""
        return await self._link(worker_id).drain(grace_s)

    async def changed_since(self, version: int) -> None:
        """Returns once `self.version` is greater than `version`."""
        while self.version <= version:
            await self._changed.wait()

    async def refresh(self) -> None:
        """Looks at the leases once: connects to new workers, forgets those whose connection has ended."""
        for worker_id in [worker_id for worker_id, link in self._links.items() if link.closed]:
            await self._links.pop(worker_id).aclose()
        for record in await self._store.list_workers():
            link = self._links.get(record.worker_id)
            if link is not None and link.record == record:
                continue
            if record.worker_id not in self._connecting:
                task = asyncio.create_task(self._connect(record), name=f"connect-{record.worker_id}")
                self._connecting[record.worker_id] = task
                task.add_done_callback(partial(self._connected, record.worker_id))

    async def _ask_any(self, model: str, question: Callable[[WorkerLink], Awaitable[T]]) -> T:
        """What any worker of a model can answer: by the least busy one, or by another if that is lost meanwhile."""
        self.model(model)
        lost: Unavailable | None = None
        views = [view for view in self.views() if view.model.name == model]
        for view in sorted(views, key=lambda view: (view.headroom.running_calls, view.worker_id)):
            link = self._links.get(view.worker_id)
            if link is None or link.closed:
                continue
            try:
                return await question(link)
            except Unavailable as error:
                lost = error
        raise lost or Unavailable(
            f"no worker with model {model!r} is connected; try again", reason="no_worker", retry_after_s=RETRY_AFTER_S
        )

    def _link(self, worker_id: WorkerId) -> WorkerLink:
        link = self._links.get(worker_id)
        if link is None or link.closed:
            connected = ", ".join(view.worker_id for view in self.views()) or "none"
            raise NotFound(f"unknown worker {worker_id!r}: connected are {connected}", reason="unknown_worker")
        return link

    async def _connect(self, record: WorkerRecord) -> None:
        before = self._links.pop(record.worker_id, None)
        if before is not None:
            # The worker was started again, or moved: what ran on the old connection is lost.
            await before.aclose()
        link = WorkerLink(record, self._gateway_id, self._note_change, self._security)
        try:
            await link.connect()
        except Unavailable as error:
            logger.warning("worker_unreachable", extra={"worker_id": record.worker_id, "why": error.message})
            return
        self._links[record.worker_id] = link
        logger.info("worker_connected", extra={"worker_id": record.worker_id, "address": record.address})
        self._note_change()

    def _connected(self, worker_id: WorkerId, _: asyncio.Task[None]) -> None:
        self._connecting.pop(worker_id, None)

    def _note_change(self) -> None:
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def _discover(self) -> None:
        while True:
            try:
                await self.refresh()
            except Exception:
                # The store may be back at the next look; the connections at hand go on.
                self.failed_looks += 1
                logger.exception("worker_discovery_failed", extra={"failed_looks": self.failed_looks})
            await asyncio.sleep(self._interval_s)


def _that_answered(links: Sequence[WorkerLink], answers: Sequence[T | BaseException]) -> list[T]:
    """The answers, less those of workers that were lost or didn't answer in time."""
    found: list[T] = []
    for link, answer in zip(links, answers, strict=True):
        if isinstance(answer, KVServiceError):
            logger.warning("worker_did_not_answer", extra={"worker_id": link.worker_id, "why": answer.message})
        elif isinstance(answer, BaseException):
            raise answer
        else:
            found.append(answer)
    return found
