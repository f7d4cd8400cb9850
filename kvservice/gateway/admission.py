"""Finds a worker that admits a call, or waits for one. Knows nothing of what the call does."""

from __future__ import annotations

import asyncio

from kvservice.errors import BudgetTooSmall, KVServiceError, Overloaded, Unavailable
from kvservice.gateway.fleet import Fleet
from kvservice.gateway.placement import PlacementRequest, WorkerView, place
from kvservice.gateway.worker_link import RETRY_AFTER_S, WorkerCall
from kvservice.internal.v1 import worker_pb2
from kvservice.types import footprint


class Admission:
    """Submits calls to the workers in the order of `place`.

    A call that every worker refuses for now waits in line. Only the first in line tries again, whenever a headroom
    changes; a new call goes to the end of the line if there is one. So a large call isn't overtaken for ever by small
    ones, at the price that small ones wait behind it.
    """

    def __init__(self, fleet: Fleet, *, max_waiting: int, max_wait_s: float) -> None:
        self.waiting = 0
        self._fleet = fleet
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._first_in_line = asyncio.Lock()

    async def admit(self, request: PlacementRequest, submit: worker_pb2.Submit) -> WorkerCall:
        """The call, running on a worker. The caller's deadline is the caller's to watch.

        Raises:
            BudgetTooSmall: it fits on no worker even alone.
            Overloaded: no room within the longest wait, or too many calls in line already.
            Unavailable: no worker of the model is connected, or all of them drain.
            KVServiceError: what a worker refused it with for good.
        """
        if self.waiting == 0:
            version = self._fleet.version
            call = await self._try(request, submit)
            if call is not None:
                return call
        else:
            version = -1
        return await self._wait_in_line(request, submit, version)

    async def _wait_in_line(
        self, request: PlacementRequest, submit: worker_pb2.Submit, tried_version: int
    ) -> WorkerCall:
        if self.waiting >= self._max_waiting:
            raise Overloaded(
                f"{self.waiting} calls wait for room already, as many as may; try again later",
                reason="queue_full",
                retry_after_s=self._max_wait_s,
            )
        self.waiting += 1
        try:
            async with asyncio.timeout(self._max_wait_s), self._first_in_line:
                while True:
                    await self._fleet.changed_since(tried_version)
                    tried_version = self._fleet.version
                    call = await self._try(request, submit)
                    if call is not None:
                        return call
        except TimeoutError:
            raise Overloaded(
                f"no worker had room for {request.num_tokens} tokens under recipe {request.recipe.name} within "
                f"{self._max_wait_s:g} s; try again later",
                retry_after_s=self._max_wait_s,
            ) from None
        finally:
            self.waiting -= 1

    async def _try(self, request: PlacementRequest, submit: worker_pb2.Submit) -> WorkerCall | None:
        """One round over the ranked workers; None when all refuse for now."""
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
