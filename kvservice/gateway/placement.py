"""Which worker is asked first. Pure: hints in, ranking out. The worker alone admits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvservice.types import Footprint, Headroom, ModelInfo, RecipeSpec, WorkerId, footprint


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What a call needs of a worker."""

    model: str
    recipe: RecipeSpec
    num_tokens: int
    """The most tokens the sequence grows to."""
    holder: str
    holder_epoch: int
    """Who held the session's KV after its last call; empty: nobody."""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A connected worker, as its last message showed it."""

    worker_id: WorkerId
    epoch: int
    address: str
    model: ModelInfo
    headroom: Headroom

    def holds(self, request: PlacementRequest) -> bool:
        """Whether the session's KV may still be here. A worker that was started again has lost it."""
        return (self.worker_id, self.epoch) == (request.holder, request.holder_epoch)

    def can_ever_fit(self, need: Footprint) -> bool:
        """Whether `need` fits when the sequence is alone."""
        return (
            need.device_bytes <= self.headroom.device_capacity_bytes
            and need.host_bytes <= self.headroom.host_capacity_bytes
        )


def _fits(need: Footprint, device_bytes: int, host_bytes: int) -> bool:
    return need.device_bytes <= device_bytes and need.host_bytes <= host_bytes


def place(request: PlacementRequest, fleet: Sequence[WorkerView]) -> list[WorkerId]:
    """The workers that may serve `request`, best first.

    The worker that holds the session comes first; then those where it fits in free bytes, then those where it fits once
    idle sessions are dropped, then the others; among equals the one with the fewest running calls, then the most free
    bytes. Left out are workers of another model, those that drain, and those where it never fits.
    """

    def rank(worker: WorkerView) -> tuple[bool, bool, bool, int, int, str]:
        headroom = worker.headroom
        need = footprint(worker.model.shape, request.recipe, request.num_tokens)
        fits_free = _fits(need, headroom.device_free_bytes, headroom.host_free_bytes)
        fits_freeable = _fits(need, headroom.device_freeable_bytes, headroom.host_freeable_bytes)
        return (
            not worker.holds(request),
            not fits_free,
            not (fits_free or fits_freeable),
            headroom.running_calls,
            -headroom.device_free_bytes,
            worker.worker_id,
        )

    candidates = [
        worker
        for worker in fleet
        if worker.model.name == request.model
        and not worker.headroom.draining
        and worker.can_ever_fit(footprint(worker.model.shape, request.recipe, request.num_tokens))
    ]
    return [worker.worker_id for worker in sorted(candidates, key=rank)]
