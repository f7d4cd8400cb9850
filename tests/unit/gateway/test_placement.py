from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.config.recipes import DENSE, EXACT, RECALL
from kvservice.gateway.placement import PlacementRequest, WorkerView, has_room, place
from kvservice.internal.prefixes import MAX_REPORTED, lengths_by_name, prefix_names, reported
from kvservice.types import Headroom, Load, WorkerId, footprint
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
    load=st.builds(
        Load,
        waiting_tokens=st.integers(0, 5000),
        prefill_tokens_per_s=st.sampled_from([0.0, 500.0, 5000.0]),
        fetch_bytes_per_s=st.sampled_from([0.0, 1e9]),
        prefixes=st.sampled_from([(), (1,), (1, 2)]),
    ),
)
models = st.sampled_from([MODEL, replace(MODEL, name="other")])


@st.composite
def fleets(draw: st.DrawFn) -> list[WorkerView]:
    ids = draw(st.lists(st.integers(0, 20), max_size=6, unique=True))
    return [WorkerView(WorkerId(f"w{i}"), draw(st.integers(1, 2)), "here", draw(models), draw(headrooms)) for i in ids]


@st.composite
def requests(draw: st.DrawFn) -> PlacementRequest:
    base = draw(st.integers(0, 1000))
    given = base + draw(st.integers(0, 500))
    return PlacementRequest(
        "toy",
        draw(st.sampled_from([DENSE, EXACT, RECALL])),
        given + draw(st.integers(1, 400)),
        draw(st.sampled_from(["", "w1", "w2"])),
        draw(st.integers(1, 2)),
        base_tokens=base,
        given_tokens=given,
        answers=draw(st.integers(1, 4)),
        stored_tokens=draw(st.integers(0, 1500)),
        prefixes=draw(st.sampled_from([{}, {1: 80}, {1: 80, 2: 144}])),
    )


@given(requests(), fleets())
def test_all_and_only_workers_that_could_serve_are_ranked(request: PlacementRequest, fleet: list[WorkerView]) -> None:
    need = request.need(SHAPE)
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


@given(requests(), fleets(), st.randoms())
def test_the_order_of_the_fleet_says_nothing(request: PlacementRequest, fleet: list[WorkerView], rng) -> None:
    shuffled = list(fleet)
    rng.shuffle(shuffled)
    assert place(request, shuffled) == place(request, fleet)


@given(requests(), fleets())
def test_a_worker_that_could_make_room_is_never_ranked_after_one_that_could_not(
    request: PlacementRequest, fleet: list[WorkerView]
) -> None:
    need = request.need(SHAPE)
    views = {view.worker_id: view for view in fleet}
    fits = [
        need.device_bytes <= views[worker_id].headroom.device_freeable_bytes
        and need.host_bytes <= views[worker_id].headroom.host_freeable_bytes
        for worker_id in place(request, fleet)
        if not views[worker_id].holds(request)
    ]
    assert fits == sorted(fits, reverse=True)
    if any(fits):
        assert has_room(request, fleet)


def worker(name: str, load: Load | None = None, **headroom: int) -> WorkerView:
    shown = replace(ROOMY, load=load or Load(prefill_tokens_per_s=1000.0), **headroom)
    return WorkerView(WorkerId(name), 1, "here", MODEL, shown)


def turn(**more) -> PlacementRequest:
    fields = {"holder": "", "holder_epoch": 0, "base_tokens": 900, "given_tokens": 1000} | more
    return PlacementRequest("toy", RECALL, 1200, **fields)


def test_among_equals_the_one_with_fewest_calls_comes_first() -> None:
    fleet = [worker(name, running_calls=calls) for name, calls in (("w1", 2), ("w2", 0), ("w3", 1))]
    assert place(turn(), fleet) == ["w2", "w3", "w1"]


def test_the_holder_comes_first_then_who_has_the_document_then_who_has_least_to_do() -> None:
    fleet = [
        worker("busy", Load(300, 1000.0)),
        worker("idle"),
        worker("document", Load(prefill_tokens_per_s=1000.0, prefixes=(5,))),
        worker("holder", running_calls=3),
    ]
    request = turn(holder="holder", holder_epoch=1, prefixes={4: 400, 5: 720})
    assert place(request, fleet) == ["holder", "document", "idle", "busy"]
    # Started again since, it has lost it.
    assert place(replace(request, holder_epoch=2), fleet)[0] == "document"


def test_the_holder_is_left_when_its_queue_takes_longer_than_to_compute_anew() -> None:
    fleet = [worker("holder", Load(850, 1000.0)), worker("idle")]
    request = turn(holder="holder", holder_epoch=1)
    assert place(request, fleet) == ["holder", "idle"]
    fleet[0] = worker("holder", Load(950, 1000.0))
    assert place(request, fleet) == ["idle", "holder"]


def test_stored_kv_draws_a_session_to_where_it_is_read_fast() -> None:
    slow, fast = Load(0, 1000.0, fetch_bytes_per_s=1.0), Load(200, 1000.0, fetch_bytes_per_s=1e9)
    fleet = [worker("slow", slow), worker("fast", fast)]
    assert place(turn(stored_tokens=900), fleet) == ["fast", "slow"]
    assert place(turn(stored_tokens=0), fleet) == ["slow", "fast"]


def test_idle_kv_that_would_go_counts_as_time() -> None:
    need = turn().need(SHAPE)
    full = worker("full", device_free_bytes=0)
    empty = worker("empty", Load(100, 1000.0), device_free_bytes=need.device_bytes)
    assert place(turn(), [full, empty]) == ["empty", "full"]


def test_a_worker_without_a_measure_is_taken_to_be_as_fast_as_the_others() -> None:
    fleet = [worker("fast", Load(0, 4000.0)), worker("new", Load()), worker("behind", Load(100, 4000.0))]
    assert set(place(turn(), fleet)[:2]) == {"fast", "new"}


@pytest.mark.parametrize("recipe", [DENSE, EXACT, RECALL])
def test_further_answers_count_for_what_they_do_not_share(recipe) -> None:
    one = replace(turn(), recipe=recipe)
    four = replace(one, answers=4).need(SHAPE)
    alone = footprint(SHAPE, recipe, one.num_tokens)
    assert one.need(SHAPE) == alone
    assert alone.device_bytes < four.device_bytes < 4 * alone.device_bytes
    assert alone.host_bytes <= four.host_bytes <= 4 * alone.host_bytes


def test_gateway_and_worker_name_prefixes_alike_and_the_deepest_shared_one_is_found() -> None:
    document, tag = list(range(700)), b"t" * 16
    held = reported(list(prefix_names(tag, "recall", document)))
    assert len(held) < 8 < MAX_REPORTED
    asked = lengths_by_name(tag, "recall", [*document, 9, 9, 9, *range(100)])
    view = worker("w", Load(prefixes=tuple(held)))
    assert view.held_tokens(turn(given_tokens=803, base_tokens=0, prefixes=asked)) == 16 + 10 * 64
    # One that shares half of the document: at least half of that is found.
    half = lengths_by_name(tag, "recall", [*document[:400], *range(900)])
    assert view.held_tokens(turn(given_tokens=1300, base_tokens=0, prefixes=half)) >= 200
    for other in (lengths_by_name(b"u" * 16, "recall", document), lengths_by_name(tag, "exact", document)):
        assert view.held_tokens(turn(prefixes=other)) == 0
    assert lengths_by_name(b"", "recall", document) == {}
