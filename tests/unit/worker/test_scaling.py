"""How many workers a load asks for, and which one may go."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import yaml

from kvservice.types import Headroom, Load, WorkerStats
from kvservice.worker.scaling import RETIRING, Descent, Goals, MissMeter, target

GOALS = Goals(occupancy=0.8, queue_s=2.0, miss_s=0.2)
GONE = {RETIRING: 1.0}


class Replica(NamedTuple):
    """Stands for Ray Serve's id of one."""

    unique_id: str


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def told(occupancy: float = 0.0, queue_s: float = 0.0, miss_s: float = 0.0, calls: int = 0, sessions: int = 0):
    return {
        "occupancy": occupancy,
        "queue_s": queue_s,
        "miss_s": miss_s,
        "running_calls": float(calls),
        "resident_sessions": float(sessions),
    }


def test_the_target_rises_with_the_load_and_never_falls_by_it() -> None:
    workers = ["a", "b"]
    assert target({"a": told(1.0), "b": told(1.0)}, workers, 2, [], GOALS) == (3, [])
    assert target({"a": told(miss_s=0.5), "b": told()}, workers, 2, [], GOALS) == (3, [])
    assert target({"a": told(), "b": told()}, workers, 2, [], GOALS) == (2, [])
    assert target({}, workers, 2, [], GOALS) == (2, [])


def test_the_target_falls_once_a_worker_that_was_retired_has_gone() -> None:
    reports = {"a": told(0.1), "b": told(0.1), "c": GONE}
    wanted, retiring = target(reports, ["a", "b", "c"], 3, [], GOALS)
    assert (wanted, retiring) == (3, ["c"])
    # Its reports may end before it does.
    assert target({"a": told(0.1), "b": told(0.1)}, ["a", "b", "c"], 3, retiring, GOALS) == (3, ["c"])
    assert target({"a": told(0.1), "b": told(0.1)}, ["a", "b"], 3, retiring, GOALS) == (2, [])
    assert target({"a": told(0.1), "b": told(0.1)}, ["a", "b"], 2, [], GOALS) == (2, [])


def test_a_worker_that_died_is_replaced_and_not_forgotten() -> None:
    assert target({"a": told(0.1)}, ["a"], 2, [], GOALS) == (2, [])


def test_a_load_that_comes_while_one_goes_asks_for_more_than_those_that_stay() -> None:
    reports = {"a": told(1.0), "b": GONE}
    assert target(reports, ["a", "b"], 2, [], GOALS) == (3, ["b"])
    assert target({"a": told(1.0)}, ["a"], 3, ["b"], GOALS) == (3, [])


def test_a_worker_goes_when_one_fewer_has_carried_the_load_for_long_enough() -> None:
    clock = Clock()
    descent = Descent(GOALS, 1, 30.0, clock)
    idle = {"a": told(0.1, calls=1), "b": told(0.1, sessions=4), "c": told(0.1, sessions=2)}
    assert descent.look(idle) is None
    clock.now += 29.0
    assert descent.look(idle) is None
    clock.now += 1.0
    # The one with the fewest calls, and then sessions.
    assert descent.look(idle) == "c"
    # One at a time, and not at once.
    assert descent.look({**idle, "c": GONE}) is None
    assert descent.look({"a": told(), "b": told()}) is None


def test_a_load_in_between_begins_the_wait_again() -> None:
    clock = Clock()
    descent = Descent(GOALS, 1, 30.0, clock)
    assert descent.look({"a": told(), "b": told()}) is None
    clock.now += 20.0
    assert descent.look({"a": told(0.5), "b": told(0.5)}) is None
    clock.now += 20.0
    assert descent.look({"a": told(), "b": told()}) is None
    clock.now += 30.0
    assert descent.look({"a": told(), "b": told()}) == "a"


@pytest.mark.parametrize(
    "reports",
    [
        {"a": told()},
        {"a": told(0.4), "b": told(0.2)},
        {"a": told(queue_s=2.0), "b": told()},
        {"a": told(miss_s=0.2), "b": told()},
    ],
)
def test_no_worker_goes_that_is_needed(reports) -> None:
    descent = Descent(GOALS, 1, 0.0, Clock())
    assert descent.look(reports) is None
    assert descent.look(reports) is None


def test_the_fewest_workers_stay() -> None:
    descent = Descent(GOALS, 2, 0.0, Clock())
    assert descent.look({"a": told(), "b": told()}) is None
    assert descent.look({"a": told(), "b": told(), "c": told()}) == "a"


def test_misses_are_seconds_of_computing_again_in_each_second() -> None:
    clock = Clock()
    meter = MissMeter(clock)

    def stats(tokens: int) -> WorkerStats:
        return WorkerStats(headroom=Headroom(load=Load(prefill_tokens_per_s=1000.0)), recomputed_tokens=tokens)

    assert meter.look(stats(5000)) == 0.0
    clock.now += 10.0
    assert math.isclose(meter.look(stats(7000)), 0.2)
    clock.now += 10.0
    assert meter.look(stats(7000)) == 0.0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_serves_policy_remembers_who_retires_from_call_to_call() -> None:
    from kvservice.worker.ray_serve import MemoryPolicy

    policy = MemoryPolicy(GOALS.occupancy, GOALS.queue_s, GOALS.miss_s)
    a, b = Replica("a"), Replica("b")

    def context(running, metrics, state):
        return SimpleNamespace(
            aggregated_metrics=metrics, running_replicas=running, target_num_replicas=2, policy_state=state
        )

    metrics = {"occupancy": {a: 0.1, b: 0.1}, RETIRING: {b: 1.0}}
    wanted, state = policy(context([a, b], metrics, {}))
    assert (wanted, state) == (2, {RETIRING: ["b"]})
    wanted, state = policy(context([a], {"occupancy": {a: 0.1}}, {**state, "of Ray's": 1}))
    assert (wanted, state) == (1, {RETIRING: []})
    assert policy(context([a], None, None)) == (2, {RETIRING: []})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_only_what_may_shrink_has_somebody_who_takes_workers_away() -> None:
    from kvservice.config.ray import Autoscaling, RayConfig, RayDeployment
    from kvservice.worker.ray_serve import cluster_config

    def applications(*scalings: Autoscaling | None) -> list[dict]:
        deployments = [RayDeployment(name=f"m{i}", autoscaling=each) for i, each in enumerate(scalings)]
        return yaml.safe_load(cluster_config(RayConfig(), deployments, "a:worker", "a:scaler"))["applications"]

    (scaler,) = (each for each in applications(Autoscaling(max_replicas=2), None) if each["import_path"] == "a:scaler")
    assert list(scaler["args"]) == ["m0"]
    # Two that never change, and one that isn't scaled.
    alone = applications(Autoscaling(min_replicas=2, max_replicas=2), None)
    assert [each["import_path"] for each in alone] == ["a:worker", "a:worker"]
