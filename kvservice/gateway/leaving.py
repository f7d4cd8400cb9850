"""A session is to go on at another worker than the one that holds it: what comes first. Knows nothing of queues.

    holder ── publishes what is left, lets go ──► manifest ──► another worker acquires, and brings the session back

Without it the last turn may be in the holder's memory alone: then it would be computed again. That is what becomes of
it still, and is counted, where the holder doesn't answer in time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from kvservice.errors import KVServiceError
from kvservice.gateway.fleet import Fleet
from kvservice.gateway.placement import PlacementRequest, WorkerView
from kvservice.internal.v1 import worker_pb2
from kvservice.types import SessionId, WorkerId

logger = logging.getLogger(__name__)

HAND_OVER_S = 5.0
"""What a holder has to publish a turn, when its session is wanted elsewhere: most have published it before."""


@dataclass(slots=True)
class Leaving:
    """Whether a call's session has been let go by who holds it. For one call, which holds the session's lock."""

    request: PlacementRequest
    submit: worker_pb2.Submit
    is_left: bool = False
    """Another worker than the holder may have acquired the session."""

    async def prepare(self, fleet: Fleet, worker: WorkerView, left_s: float) -> None:
        """Before `worker` is asked to take the call: has the holder hand the session over, if that is another.

        Once for the call: whoever is asked after that, nothing is written of the session before one takes the call.

        Args:
            fleet: the workers.
            worker: who is to be asked.
            left_s: how long the call may wait.
        """
        if not self.is_left and not worker.holds(self.request):
            self.is_left = True
            holder = next((view for view in fleet.views() if view.holds(self.request)), None)
            if holder is not None and self.submit.base_token_ids:
                session_id = SessionId(self.submit.session_id)
                await hand_over(fleet, holder.worker_id, session_id, min(HAND_OVER_S, max(0.0, left_s)), keeps_kv=True)
        self.submit.was_elsewhere = self.is_left


async def hand_over(
    fleet: Fleet, worker_id: WorkerId, session_id: SessionId, timeout_s: float, *, keeps_kv: bool
) -> None:
    """Has a worker publish what is left of a session, and let it go. One that can't isn't waited for any longer."""
    try:
        await fleet.hand_over(worker_id, session_id, timeout_s, keeps_kv=keeps_kv)
    except KVServiceError as error:
        # It can't publish any more once the session has been acquired elsewhere.
        logger.warning("not_handed_over", extra={"worker_id": worker_id, "why": error.message})
