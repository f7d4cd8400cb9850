"""Finds a worker that admits a call, or waits for one. Knows nothing of what the call does."""

from __future__ import annotations

import asyncio
import time

from kvservice.errors import BudgetTooSmall, DeadlineExceeded, KVServiceError, Overloaded, Unavailable
from kvservice.gateway.fleet import Fleet
from kvservice.gateway.line import Line, Ticket
from kvservice.gateway.placement import PlacementRequest, WorkerView, has_room, place
from kvservice.gateway.worker_link import RETRY_AFTER_S, WorkerCall
from kvservice.internal.v1 import worker_pb2

MAX_ASKED = 8
"""Workers asked in one round, the best first. A refusal brings fresh headroom, by which the next round goes."""

PATIENCE_SHARE = 0.25
"""Of the longest wait, how long a call that is blocked lets smaller ones pass."""


class Admission:
    """Submits calls to the workers in the order of `place`.

    A call that the workers refuse for now waits in the line of its model: behind those of its priority and of higher
    ones. The first in line asks again whenever a headroom changes. When it is refused, calls that need fewer bytes may
    pass it, for a while: so small calls don't wait for a large one, and a large one isn't overtaken for ever.
    """

    def __init__(self, fleet: Fleet, *, max_waiting: int, max_wait_s: float) -> None:
        self._fleet = fleet
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._lines: dict[str, Line] = {}

    @property
    def waiting(self) -> int:
        """Calls in line."""
        return sum(len(line) for line in self._lines.values())

    async def admit(
        self, request: PlacementRequest, submit: worker_pb2.Submit, deadline: float | None = None
    ) -> WorkerCall:
        """The call, running on a worker. Once it is asked for, its deadline is the caller's to watch.

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
        if request.model not in self._lines:
            version = self._fleet.version
            call = await self._try(request, submit, deadline)
            if call is not None:
                return call
        return await self._wait_in_line(request, submit, deadline, version)

    async def _wait_in_line(
        self, request: PlacementRequest, submit: worker_pb2.Submit, deadline: float | None, version: int
    ) -> WorkerCall:
        if self.waiting >= self._max_waiting:
            raise Overloaded(
                f"{self.waiting} calls wait for room already, as many as may; try again later",
                reason="queue_full",
                retry_after_s=self._max_wait_s,
            )
        patience_s = PATIENCE_SHARE * self._max_wait_s
        line = self._lines.setdefault(request.model, Line(patience_s))
        device_bytes, host_bytes = self._size(request)
        ticket = line.join(submit.priority, device_bytes, host_bytes, version, time.monotonic())
        wait_s = self._max_wait_s if deadline is None else min(self._max_wait_s, deadline - time.monotonic())
        try:
            async with asyncio.timeout(wait_s):
                return await self._take_turns(line, ticket, request, submit, deadline)
        except TimeoutError:
            if wait_s < self._max_wait_s:
                raise _too_late() from None
            raise Overloaded(
                f"no worker had room for {request.num_tokens} tokens under recipe {request.recipe.name} within "
                f"{self._max_wait_s:g} s; try again later",
                retry_after_s=self._max_wait_s,
            ) from None
        finally:
            line.leave(ticket, time.monotonic())
            if not line:
                del self._lines[request.model]

    async def _take_turns(
        self,
        line: Line,
        ticket: Ticket,
        request: PlacementRequest,
        submit: worker_pb2.Submit,
        deadline: float | None,
    ) -> WorkerCall:
        """Asks whenever it has the turn, until a worker takes the call."""
        while True:
            await ticket.turn.wait()
            if line.is_first(ticket):
                await self._fleet.changed_since(ticket.tried_version)
                if not ticket.turn.is_set():
                    continue  # One of a higher priority has come, or one that may pass.
            ticket.tried_version = self._fleet.version
            # Who passes asks only where there seems to be room; the first may have others make room for it.
            if line.is_first(ticket) or has_room(request, self._fleet.views()):
                call = await self._try(request, submit, deadline)
                if call is not None:
                    return call
            line.hand_on(ticket, time.monotonic())

    def _size(self, request: PlacementRequest) -> tuple[int, int]:
        """Device and host bytes of a call, to tell small from large."""
        need = request.need(self._fleet.model(request.model).shape)
        return need.device_bytes, need.host_bytes

    async def _try(
        self, request: PlacementRequest, submit: worker_pb2.Submit, deadline: float | None
    ) -> WorkerCall | None:
        """One round over the ranked workers; None when all refuse for now."""
        if deadline is not None:
            submit.deadline_s = deadline - time.monotonic()
            if submit.deadline_s <= 0.0:
                raise _too_late()
        views = self._fleet.views()
        ranked = place(request, views)
        if not ranked:
            raise _nowhere(request, views)
        refusals: list[KVServiceError] = []
        for worker_id in ranked[:MAX_ASKED]:
            try:
                return await self._fleet.submit(worker_id, submit)
            except (Overloaded, Unavailable, BudgetTooSmall) as error:
                # Unavailable: it drains, or was lost since it was ranked.
                refusals.append(error)
        if any(isinstance(error, Overloaded) for error in refusals):
            return None
        raise refusals[0]


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the call's deadline passed before a worker had room for it")


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
    need = request.need(roomiest.model.shape)
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
