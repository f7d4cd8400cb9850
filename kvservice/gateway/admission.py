"""Finds a worker that admits a call, or waits for one. Knows nothing of what the call does."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from kvservice.errors import (
    TENANT_ANSWERS,
    BudgetTooSmall,
    DeadlineExceeded,
    KVServiceError,
    Overloaded,
    Unavailable,
    hopeless,
)
from kvservice.gateway.fleet import Fleet
from kvservice.gateway.leaving import Leaving
from kvservice.gateway.line import Line, Ticket
from kvservice.gateway.placement import Estimate, PlacementRequest, WorkerView, estimate, has_room, ranked
from kvservice.gateway.worker_link import RETRY_AFTER_S, WorkerCall
from kvservice.internal.fair import DEFAULT_WEIGHT, LATE_MARGIN, FairShares, Turn, cannot_meet, leaves_room
from kvservice.internal.v1 import worker_pb2

MAX_ASKED = 8
"""Workers asked in one round, the best first. A refusal brings fresh headroom, by which the next round goes."""

PATIENCE_SHARE = 0.25
"""Of the longest wait, how long a call that is blocked lets smaller ones pass."""


class Admission:
    """Submits calls to the workers in the order of `place`.

    A call that the workers refuse for now waits in the line of its model, in fair order among tenants and by priority
    among its own's (`internal.fair`), so that nobody waits for all that another tenant has sent. The
    first in line asks again whenever a headroom changes. When it is refused, calls that need fewer bytes may pass it,
    for a while: so small calls don't wait for a large one, and a large one isn't overtaken for ever.
    """

    def __init__(self, fleet: Fleet, *, max_waiting: int, max_wait_s: float) -> None:
        self._fleet = fleet
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._lines: dict[str, Line] = {}
        self._shares: defaultdict[str, FairShares] = defaultdict(FairShares)
        """By model: workers of one don't serve another."""
        self.failed_over = 0
        """Calls that were given to another worker, since theirs was lost before its first token."""

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
            DeadlineExceeded: the deadline passed before a worker was asked, or can't be met any more.
            BudgetTooSmall: it fits on no worker even alone.
            Overloaded: no room within the longest wait, or too many calls in line already.
            Unavailable: no worker of the model is connected, or all of them drain.
            KVServiceError: what a worker refused it with for good.
        """
        if deadline is not None and deadline <= time.monotonic():
            raise _too_late()
        candidates = ranked(request, self._fleet.views())
        expected = estimate(request, candidates[0]) if candidates else Estimate()
        if deadline is not None and cannot_meet(expected.read_s, deadline - time.monotonic()):
            raise hopeless(expected.read_s, deadline - time.monotonic())
        shares = self._shares[request.model]
        weight = submit.weight or DEFAULT_WEIGHT
        turn = shares.join(submit.tenant_tag, expected.seconds, weight, priority=submit.priority)
        used_s = 0.0
        try:
            asker = _Asker(request, submit, deadline, expected, Leaving(request, submit))
            call = await self._admit(asker, turn, candidates)
            shares.serve(turn)
            used_s = expected.seconds
        finally:
            shares.leave(turn, used_s)
        return call

    async def _admit(self, asker: _Asker, turn: Turn, candidates: Sequence[WorkerView]) -> WorkerCall:
        model, version, has_its_share = asker.request.model, -1, False
        if model not in self._lines:
            version = self._fleet.version
            call, has_its_share = await self._try(asker, candidates)
            if call is not None:
                return call
        self._check_line(asker.submit.tenant_tag)
        line = self._lines.setdefault(model, Line(PATIENCE_SHARE * self._max_wait_s))
        need = asker.request.need(self._fleet.model(model).shape)
        ticket = line.join(turn, need.device_bytes, need.host_bytes, version, time.monotonic())
        ticket.has_its_share = has_its_share
        wait_s = min(self._max_wait_s, asker.left_s(time.monotonic()))
        try:
            async with asyncio.timeout(wait_s):
                return await self._take_turns(line, ticket, asker)
        except TimeoutError:
            if wait_s < self._max_wait_s:
                raise asker.too_late(time.monotonic()) from None
            raise Overloaded(
                f"no worker had room for {asker.request.num_tokens} tokens under recipe {asker.request.recipe.name} "
                f"within {self._max_wait_s:g} s; try again later",
                retry_after_s=self._max_wait_s,
            ) from None
        finally:
            line.leave(ticket, time.monotonic())
            if not line:
                del self._lines[model]

    def _check_line(self, tenant_tag: bytes) -> None:
        """Refuses a call when the lines are full, or as full as its tenant alone may make them."""
        free = self._max_waiting - self.waiting
        own = sum(line.num_of(tenant_tag) for line in self._lines.values())
        if not free or not leaves_room(own, 1, free):
            raise Overloaded(
                f"{self.waiting} calls wait for room already, {own} of them this tenant's, as many as may; try again "
                "later",
                reason="queue_full",
                retry_after_s=self._max_wait_s,
            )

    async def _take_turns(self, line: Line, ticket: Ticket, asker: _Asker) -> WorkerCall:
        """Asks whenever it has the turn, until a worker takes the call."""
        while True:
            await ticket.turn.wait()
            if line.is_first(ticket):
                await self._fleet.changed_since(ticket.tried_version)
                if not ticket.turn.is_set():
                    continue  # One that goes first has come, or one that may pass.
            ticket.tried_version = self._fleet.version
            # Who passes asks only where there seems to be room; the first may have others make room for it.
            if line.is_first(ticket) or has_room(asker.request, self._fleet.views()):
                call, ticket.has_its_share = await self._try(asker, ranked(asker.request, self._fleet.views()))
                if call is not None:
                    return call
            line.hand_on(ticket, time.monotonic())

    async def _try(self, asker: _Asker, candidates: Sequence[WorkerView]) -> tuple[WorkerCall | None, bool]:
        """One round over the workers, as they are ranked now.

        Returns:
            The call; None when all refuse for now. And whether they do because its tenant has all that it may have.
        """
        request, submit = asker.request, asker.submit
        if not candidates:
            raise _nowhere(request, self._fleet.views())
        refusals: list[KVServiceError] = []
        for worker in candidates[:MAX_ASKED]:
            try:
                await asker.leaving.prepare(self._fleet, worker, asker.left_s(time.monotonic()))
                asker.tell_time()
                return await self._fleet.submit(worker.worker_id, submit), False
            except (Overloaded, Unavailable, BudgetTooSmall) as error:
                # Unavailable: it drains, or was lost since it was ranked.
                refusals.append(error)
        for_now = [error.reason for error in refusals if isinstance(error, Overloaded)]
        if for_now:
            return None, all(reason == TENANT_ANSWERS for reason in for_now)
        raise refusals[0]


@dataclass(frozen=True, slots=True)
class _Asker:
    """A call that asks workers to take it. Its deadline is in seconds of `time.monotonic`."""

    request: PlacementRequest
    submit: worker_pb2.Submit
    deadline: float | None
    expected: Estimate
    leaving: Leaving

    def tell_time(self) -> None:
        """Fills in how long the call has left, if it has a deadline. Raises DeadlineExceeded if that has passed."""
        if self.deadline is not None:
            self.submit.deadline_s = self.deadline - time.monotonic()
            if self.submit.deadline_s <= 0.0:
                raise _too_late()

    def left_s(self, now: float) -> float:
        """How long it may wait until its deadline can't be met any more."""
        return math.inf if self.deadline is None else self.deadline - now - self.expected.read_s / LATE_MARGIN

    def too_late(self, now: float) -> DeadlineExceeded:
        """What it is told then."""
        if self.deadline is None or not self.expected.read_s:
            return _too_late()
        return hopeless(self.expected.read_s, self.deadline - now)


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
