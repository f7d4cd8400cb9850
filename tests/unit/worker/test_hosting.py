"""A worker in a thread of its own, as a Ray Serve replica runs it, and what it tells of its load."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest

from kvservice.config.ray import RayConfig, RayDeployment
from kvservice.config.service import ServiceConfig
from kvservice.config.worker import WorkerConfig
from kvservice.errors import ModelError, Unavailable
from kvservice.store.memory import MemoryStateStore
from kvservice.types import Headroom, Load, WorkerStats
from kvservice.worker.hosting import HostedWorker
from kvservice.worker.scaling import Goals, report, workers_wanted
from kvservice.worker.server import WorkerServer
from tests.unit.worker.scripted_engine import ScriptedEngine, ToyTokenizer


class Hosted:
    def __init__(self, **settings) -> None:
        self.engine: ScriptedEngine
        self._config = WorkerConfig(worker_id="hosted", **settings)
        self.host = HostedWorker(self.open)

    def make_engine(self) -> ScriptedEngine:
        self.engine = ScriptedEngine()
        return self.engine

    @asynccontextmanager
    async def open(self):
        server = WorkerServer(self._config, self.make_engine, ToyTokenizer(), MemoryStateStore())
        try:
            yield server
        finally:
            await server.stop()


async def test_a_hosted_worker_serves_tells_its_load_and_ends() -> None:
    hosted = Hosted()
    address = await asyncio.to_thread(hosted.host.start)
    assert address.startswith("127.0.0.1:")
    await hosted.host.check(10.0)
    assert report(await hosted.host.stats())["running_calls"] == 0.0
    await asyncio.to_thread(hosted.host.drain, 20.0)
    assert hosted.engine.closed
    with pytest.raises(Unavailable, match="has stopped"):
        await hosted.host.check(1.0)
    hosted.host.drain(0.0)


async def test_health_means_that_the_loop_advances(monkeypatch) -> None:
    hosted = Hosted()
    await asyncio.to_thread(hosted.host.start)
    stuck, entered = threading.Event(), threading.Event()

    def hang() -> WorkerStats:
        entered.set()
        stuck.wait(20)
        return WorkerStats()

    monkeypatch.setattr(hosted.engine, "stats", hang)
    asked = asyncio.create_task(hosted.host.stats())
    await asyncio.to_thread(entered.wait, 20)
    with pytest.raises(Unavailable, match=r"hasn't advanced for 0\.05 s"):
        await hosted.host.check(0.05)
    stuck.set()
    await asked
    await hosted.host.check(20.0)
    await asyncio.to_thread(hosted.host.drain, 20.0)


def test_what_a_worker_cannot_start_for_is_raised_where_it_was_started() -> None:
    @asynccontextmanager
    async def fails():
        raise ModelError("no such model")
        yield

    with pytest.raises(ModelError, match="no such model"):
        HostedWorker(fails).start()


def test_load_is_bytes_of_running_calls_and_seconds_of_queue() -> None:
    headroom = Headroom(
        device_capacity_bytes=100,
        device_free_bytes=0,
        device_freeable_bytes=40,
        host_capacity_bytes=100,
        host_freeable_bytes=90,
        running_calls=3,
        load=Load(waiting_tokens=500, prefill_tokens_per_s=250.0),
    )
    told = report(WorkerStats(headroom=headroom, recall_lookups=10, recall_hits=7))
    assert told["occupancy"] == pytest.approx(0.6)
    assert (told["queue_s"], told["running_calls"], told["recall_misses"]) == (2.0, 3.0, 3.0)
    assert report(WorkerStats())["queue_s"] == 0.0


@pytest.mark.parametrize(
    ("reports", "wanted"),
    [
        ([], 4),
        ([{"occupancy": 0.4, "queue_s": 1.0}], 4),
        ([{"occupancy": 0.0, "queue_s": 0.0}], 4),
        ([{"occupancy": 1.0, "queue_s": 0.0}], 5),
        ([{"occupancy": 0.0, "queue_s": 3.0}], 6),
        ([{"occupancy": 0.0, "queue_s": 300.0}], 8),
    ],
)
def test_workers_are_added_by_bytes_or_queue_at_most_doubled_and_never_taken_away(reports, wanted) -> None:
    assert workers_wanted(reports, 4, Goals(occupancy=0.8, queue_s=2.0)) == wanted


def test_the_service_has_one_deployment_unless_more_are_named() -> None:
    one = ServiceConfig(workers=3).ray_deployments()
    assert [(each.name, each.replicas) for each in one] == [("worker", 3)]
    named = (RayDeployment(name="small"), RayDeployment(name="large", num_gpus=0.5))
    assert ServiceConfig(ray=RayConfig(deployments=named)).ray_deployments() == named


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"deployments": [{"name": "a"}, {"name": "a"}]}, "names must be unique, got a, a"),
        (
            {"external_scaler_enabled": True, "deployments": [{"autoscaling": {"max_replicas": 2}}]},
            "no deployment may have `autoscaling`",
        ),
        ({"deployments": [{"autoscaling": {"min_replicas": 3, "max_replicas": 2}}]}, "must be at least min_replicas=3"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        RayConfig.model_validate(settings)
