from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kvservice.config.recipes import DENSE, EXACT, RECALL
from kvservice.gateway.placement import PlacementRequest, WorkerView, place
from kvservice.types import Headroom, WorkerId, footprint
from tests.unit.gateway.fake_worker import MODEL, ROOMY, SHAPE

byte_counts = st.integers(0, 1 << 22)
headrooms = st.builds(
    Headroom,
    device_capacity_bytes=byte_counts,
    device_free_bytes=byte_counts,
    device_freeable_bytes=byte_counts,
    host_capacity_bytes=byte_counts,
    host_free_bytes=byte_counts,
    host_freeable_bytes=byte_counts,
    running_calls=st.integers(0, 5),
    draining=st.booleans(),
)
models = st.sampled_from([MODEL, replace(MODEL, name="other")])


@st.composite
def fleets(draw: st.DrawFn) -> list[WorkerView]:
    ids = draw(st.lists(st.integers(0, 20), max_size=6, unique=True))
    return [WorkerView(WorkerId(f"w{i}"), draw(st.integers(1, 2)), "here", draw(models), draw(headrooms)) for i in ids]


requests = st.builds(
    PlacementRequest,
    model=st.just("toy"),
    recipe=st.sampled_from([DENSE, EXACT, RECALL]),
    num_tokens=st.integers(1, 2000),
    holder=st.sampled_from(["", "w1", "w2"]),
    holder_epoch=st.integers(1, 2),
)


@given(requests, fleets())
def test_all_and_only_workers_that_could_serve_are_ranked(request: PlacementRequest, fleet: list[WorkerView]) -> None:
    need = footprint(SHAPE, request.recipe, request.num_tokens)
    could = {
        worker.worker_id
        for worker in fleet
        if worker.model.name == "toy"
        and not worker.headroom.draining
        and need.device_bytes <= worker.headroom.device_capacity_bytes
        and need.host_bytes <= worker.headroom.host_capacity_bytes
    }
    ranked = place(request, fleet)
    assert len(ranked) == len(could)
    assert set(ranked) == could


@given(requests, fleets(), st.randoms())
def test_the_order_of_the_fleet_says_nothing(request: PlacementRequest, fleet: list[WorkerView], rng) -> None:
    shuffled = list(fleet)
    rng.shuffle(shuffled)
    assert place(request, shuffled) == place(request, fleet)


@given(requests, fleets())
def test_the_holder_comes_first_unless_it_was_started_again(request: PlacementRequest, fleet: list[WorkerView]) -> None:
    ranked = place(request, fleet)
    holders = [view.worker_id for view in fleet if view.holds(request) and view.worker_id in ranked]
    assert ranked[: len(holders)] == holders


@given(requests, fleets())
def test_a_worker_with_room_is_never_ranked_after_one_without(
    request: PlacementRequest, fleet: list[WorkerView]
) -> None:
    need = footprint(SHAPE, request.recipe, request.num_tokens)
    views = {view.worker_id: view for view in fleet}
    fits = [
        need.device_bytes <= views[worker_id].headroom.device_free_bytes
        and need.host_bytes <= views[worker_id].headroom.host_free_bytes
        for worker_id in place(request, fleet)
        if not views[worker_id].holds(request)
    ]
    assert fits == sorted(fits, reverse=True)


def test_among_equals_the_one_with_fewest_calls_comes_first() -> None:
    fleet = [
        WorkerView(WorkerId(name), 1, "here", MODEL, replace(ROOMY, running_calls=calls))
        for name, calls in (("w1", 2), ("w2", 0), ("w3", 1))
    ]
    assert place(PlacementRequest("toy", RECALL, 100, "", 0), fleet) == ["w2", "w3", "w1"]
