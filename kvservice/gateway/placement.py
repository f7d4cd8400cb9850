"""Which worker is asked first. Pure: hints in, ranking out. The worker alone admits."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvservice.internal.fair import Price, expected_answer_tokens
from kvservice.types import Footprint, Headroom, ModelInfo, ModelShape, RecipeSpec, WorkerId, footprint, further_answer

UNMEASURED_TOKENS_PER_S = 1000.0
"""Taken for a worker's prefill while no worker of the fleet has measured its own."""

DISPLACED_SHARE = 0.5
"""Of the KV that a call displaces, what is taken to be asked for again, and so computed again."""

CALL_SHARE = 0.05
"""By how much each running call is taken to slow down a prefill beside it."""


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
    base_tokens: int = 0
    """Of the session before the call. Where its KV is, they need not be computed."""
    given_tokens: int = 0
    """Base, document and prompt: what must have KV before the first token of an answer."""
    answers: int = 1
    """Answers that go on from the given tokens."""
    stored_tokens: int = 0
    """Leading tokens whose KV the kv Redis has."""
    prefixes: Mapping[int, int] = field(default_factory=dict)
    """Lengths of the call's leading tokens by their names, see `internal.prefixes`."""

    def need(self, shape: ModelShape) -> Footprint:
        """The most bytes that the call takes on a worker that holds nothing it could share."""
        first = footprint(shape, self.recipe, self.num_tokens)
        if self.answers == 1:
            return first
        each = further_answer(shape, self.recipe, self.given_tokens, self.num_tokens)
        further = self.answers - 1
        return Footprint(
            window_bytes=first.window_bytes + further * each.window_bytes,
            index_bytes=first.index_bytes + further * each.index_bytes,
            slot_bytes=first.slot_bytes + further * each.slot_bytes,
            host_bytes=first.host_bytes + further * each.host_bytes,
        )


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

    def held_tokens(self, request: PlacementRequest) -> int:
        """How many leading tokens of the call have their KV here: of its session, or of another one."""
        own = request.base_tokens if self.holds(request) else 0
        names = request.prefixes.keys() & self.headroom.load.prefixes if request.prefixes else ()
        return min(request.given_tokens, max(own, max((request.prefixes[name] for name in names), default=0)))

    def can_ever_fit(self, need: Footprint) -> bool:
        """Whether `need` fits when the sequence is alone."""
        return (
            need.device_bytes <= self.headroom.device_capacity_bytes
            and need.host_bytes <= self.headroom.host_capacity_bytes
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a call would cost on one worker."""

    seconds: float
    """Until its first token, and what it takes from others."""
    held_tokens: int
    fetched_bytes: int
    computed_tokens: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a call takes of a worker's time, by itself.

    Attributes:
        seconds: of all of it, as far as is expected of its answer, by which shares are counted (`internal.fair`).
        read_s: before its first token; 0 if no worker has measured its speed.
    """

    seconds: float = 0.0
    read_s: float = 0.0


def estimate(request: PlacementRequest, best: WorkerView) -> Estimate:
    """What the call takes on the worker that is asked first."""
    load = best.headroom.load
    speed = load.prefill_tokens_per_s or UNMEASURED_TOKENS_PER_S
    prediction = predict(request, best, request.need(best.model.shape), speed)
    fetch_s = prediction.fetched_bytes / load.fetch_bytes_per_s if prediction.fetched_bytes else 0.0
    read_s = prediction.computed_tokens / speed + fetch_s
    answer = expected_answer_tokens(request.num_tokens - request.given_tokens, request.answers)
    seconds = Price.of(load.prefill_tokens_per_s, load.decode_tokens_per_s).seconds(read_s * speed, answer)
    return Estimate(seconds, read_s if load.prefill_tokens_per_s else 0.0)


def predict(request: PlacementRequest, worker: WorkerView, need: Footprint, usual_tokens_per_s: float) -> Prediction:
    """What the call would cost on `worker`.

    It waits for the prefills before it; reads from the kv Redis what is there and comes faster than it is computed;
    computes the rest; and takes the bytes of idle sessions, some of which will be computed again.

    Args:
        request: the call.
        worker: where it would go.
        need: of the call, for the worker's model.
        usual_tokens_per_s: prefill speed of a worker that has measured none.
    """
    headroom, load, shape = worker.headroom, worker.headroom.load, worker.model.shape
    seconds_a_token = (1.0 + CALL_SHARE * headroom.running_calls) / (load.prefill_tokens_per_s or usual_tokens_per_s)
    held = worker.held_tokens(request)
    fetched = max(0, min(request.stored_tokens, request.given_tokens) - held)
    fetched_bytes = fetched * shape.kv_bytes_per_token
    if load.fetch_bytes_per_s <= 0.0 or fetched_bytes / load.fetch_bytes_per_s >= fetched * seconds_a_token:
        fetched = fetched_bytes = 0
    computed = request.given_tokens - held - fetched
    fetch_s = fetched_bytes / load.fetch_bytes_per_s if fetched_bytes else 0.0
    displaced_bytes = max(0, need.device_bytes - headroom.device_free_bytes)
    if worker.holds(request):
        # Most of what it needs are its own bytes, which count as taken.
        displaced_bytes = max(0, displaced_bytes - footprint(shape, request.recipe, request.base_tokens).device_bytes)
    bytes_a_token = max(1.0, need.device_bytes / max(1, request.num_tokens))
    displaced_s = DISPLACED_SHARE * displaced_bytes / bytes_a_token * seconds_a_token
    return Prediction(
        seconds=(load.waiting_tokens + computed) * seconds_a_token + fetch_s + displaced_s,
        held_tokens=held,
        fetched_bytes=fetched_bytes,
        computed_tokens=computed,
    )


def place(request: PlacementRequest, fleet: Sequence[WorkerView]) -> list[WorkerId]:
    """The workers that may serve `request`, best first.

    Those where it never fits are left out, and those of another model or that drain; those come last where there is no
    room for it even if every idle session went. Before them, whoever answers soonest by `predict`: so the worker that
    holds the session, then those that hold its document or the beginning of it, then the one that has the least to do,
    unless the queue of one of the former takes longer than to compute anew what it holds. Among equals the one with the
    fewest running calls, then the most free bytes.
    """
    return [worker.worker_id for worker in ranked(request, fleet)]


def ranked(request: PlacementRequest, fleet: Sequence[WorkerView]) -> list[WorkerView]:
    """See `place`."""
    candidates = _candidates(request, fleet)
    measured = [speed for view, _ in candidates if (speed := view.headroom.load.prefill_tokens_per_s) > 0.0]
    usual = statistics.median_low(measured) if measured else UNMEASURED_TOKENS_PER_S

    def key(candidate: tuple[WorkerView, Footprint]) -> tuple[bool, float, bool, int, int, str]:
        worker, need = candidate
        holds = worker.holds(request)
        return (
            not (holds or _could_fit(need, worker.headroom)),
            predict(request, worker, need, usual).seconds,
            not holds,
            worker.headroom.running_calls,
            -worker.headroom.device_free_bytes,
            worker.worker_id,
        )

    return [worker for worker, _ in sorted(candidates, key=key)]


def has_room(request: PlacementRequest, fleet: Sequence[WorkerView]) -> bool:
    """Whether a worker shows bytes for the call, if need be those of idle sessions. A hint like all else here."""
    return any(_could_fit(need, worker.headroom) for worker, need in _candidates(request, fleet))


def _could_fit(need: Footprint, headroom: Headroom) -> bool:
    """Whether it fits once every idle session is gone."""
    return need.device_bytes <= headroom.device_freeable_bytes and need.host_bytes <= headroom.host_freeable_bytes


def _candidates(request: PlacementRequest, fleet: Sequence[WorkerView]) -> list[tuple[WorkerView, Footprint]]:
    """Workers that could ever serve the call, each with what the call needs there."""
    needs: dict[ModelShape, Footprint] = {}
    found = []
    for worker in fleet:
        if worker.model.name != request.model or worker.headroom.draining:
            continue
        shape = worker.model.shape
        need = needs.get(shape)
        if need is None:
            need = needs[shape] = request.need(shape)
        if worker.can_ever_fit(need):
            found.append((worker, need))
    return found
