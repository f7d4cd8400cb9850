"""Finds a worker that admits a call, or waits for one. Knows nothing of what the call does."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import time
from dataclasses import dataclass, field

from kvservice.errors import BudgetTooSmall, DeadlineExceeded, KVServiceError, Overloaded, Unavailable
from kvservice.gateway.fleet import Fleet
from kvservice.gateway.placement import PlacementRequest, WorkerView, place
from kvservice.gateway.worker_link import RETRY_AFTER_S, WorkerCall
from kvservice.internal.v1 import worker_pb2
from kvservice.types import footprint


@dataclass(order=True, slots=True)
class _Ticket:
    """A place in line: by priority, then by arrival."""

    rank: tuple[int, int]
    is_first: asyncio.Event = field(default_factory=asyncio.Event, compare=False)


class Admission:
    """Submits calls to the workers in the order of `place`.

    A call that every worker refuses for now waits in line. Only the first in line tries again, whenever a headroom
    changes; a new call takes its place in the line if there is one: behind those of its priority and of higher ones. So
    a large call isn't overtaken for ever by small ones of its priority, at the price that they wait behind it.
    """

    def __init__(self, fleet: Fleet, *, max_waiting: int, max_wait_s: float) -> None:
        self._fleet = fleet
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._line: list[_Ticket] = []
        self._arrivals = itertools.count()

    @property
    def waiting(self) -> int:
        """Calls in line."""
        return len(self._line)

    async def admit(
        self, request: PlacementRequest, submit: worker_pb2.Submit, deadline: float | None = None
    ) -> WorkerCall:
        """The call, running on a worker. It isn't given up here at its deadline: that is the caller's to watch.

        Args:
            request: where it may go.
            submit: what the worker is told; the time that it has left is filled in.
            deadline: in seconds of `time.monotonic`.

        Raises:
            DeadlineExceeded: the deadline passed before a worker was asked.
            BudgetTooSmall: it fits on no worker even alone.
            Overloaded: no room within the longest wait, or too many calls in line already.
            Unavailable: no worker of the model is connected, or all of them drain.
            KVServiceError: what a worker refused it with for good.
        """
        version = -1
        if not self._line:
            version = self._fleet.version
            call = await self._try(request, submit, deadline)
            if call is not None:
                return call
        return await self._wait_in_line(request, submit, deadline, version)

    async def _wait_in_line(
        self, request: PlacementRequest, submit: worker_pb2.Submit, deadline: float | None, tried_version: int
    ) -> WorkerCall:
        if self.waiting >= self._max_waiting:
            raise Overloaded(
                f"{self.waiting} calls wait for room already, as many as may; try again later",
                reason="queue_full",
                retry_after_s=self._max_wait_s,
            )
        ticket = _Ticket((-submit.priority, next(self._arrivals)))
        bisect.insort(self._line, ticket)
        self._show_first()
        try:
            async with asyncio.timeout(self._max_wait_s):
                while True:
                    await ticket.is_first.wait()
                    await self._fleet.changed_since(tried_version)
                    if not ticket.is_first.is_set():
                        continue  # One of a higher priority has come.
                    tried_version = self._fleet.version
                    call = await self._try(request, submit, deadline)
                    if call is not None:
                        return call
        except TimeoutError:
            raise Overloaded(
                f"no worker had room for {request.num_tokens} tokens under recipe {request.recipe.name} within "
                f"{self._max_wait_s:g} s; try again later",
                retry_after_s=self._max_wait_s,
            ) from None
        finally:
            self._line.remove(ticket)
            self._show_first()

    def _show_first(self) -> None:
        for ticket in self._line[1:]:
            ticket.is_first.clear()
        if self._line:
            self._line[0].is_first.set()

    async def _try(
        self, request: PlacementRequest, submit: worker_pb2.Submit, deadline: float | None
    ) -> WorkerCall | None:
        """One round over the ranked workers; None when all refuse for now."""
        if deadline is not None:
            submit.deadline_s = deadline - time.monotonic()
            if submit.deadline_s <= 0.0:
                raise DeadlineExceeded("the call's deadline passed before a worker had room for it")
        views = self._fleet.views()
        ranked = place(request, views)
        if not ranked:
            raise _nowhere(request, views)
        refusals: list[KVServiceError] = []
        for worker_id in ranked:
            try:
                return await self._fleet.submit(worker_id, submit)
            except (Overloaded, Unavailable, BudgetTooSmall) as error:
                # Unavailable: it drains, or was lost since it was ranked.
                refusals.append(error)
        if any(isinstance(error, Overloaded) for error in refusals):
            return None
        raise refusals[0]


def _nowhere(request: PlacementRequest, views: list[WorkerView]) -> KVServiceError:
    """Why `place` found no worker at all."""
    of_model = [view for view in views if view.model.name == request.model]
    if not of_model:
        return Unavailable(
            f"no worker with model {request.model!r} is connected; try again",
            reason="no_worker",
            retry_after_s=RETRY_AFTER_S,
        )
    roomiest = max(of_model, key=lambda view: (view.headroom.device_capacity_bytes, view.headroom.host_capacity_bytes))
    need = footprint(roomiest.model.shape, request.recipe, request.num_tokens)
    if any(view.can_ever_fit(need) for view in of_model):
        return Unavailable(
            f"every worker with model {request.model!r} is draining; try again",
            reason="draining",
            retry_after_s=RETRY_AFTER_S,
        )
    have = roomiest.headroom
    return BudgetTooSmall(
        f"{request.num_tokens} tokens under recipe {request.recipe.name} need {need.device_bytes} device bytes and "
        f"{need.host_bytes} host bytes; the roomiest worker has {have.device_capacity_bytes} and "
        f"{have.host_capacity_bytes}. Send fewer tokens, choose a recipe that keeps less on the device, or start the "
        "workers with a larger --kv-bytes or --host-bytes",
        metadata={
            "needed_device_bytes": str(need.device_bytes),
            "available_device_bytes": str(have.device_capacity_bytes),
            "needed_host_bytes": str(need.host_bytes),
            "available_host_bytes": str(have.host_capacity_bytes),
        },
    )
