"""Workers inside real Ray Serve replicas: `kvservice serve --ray` with two of them, one of which is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
import pytest_asyncio

from kvservice.client import Client, LocalService

PATIENCE_S = 60.0

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

ASK_RAY = """
import json, sys, time
import ray
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve.context import _get_global_client

ray.init("auto", namespace="serve", log_to_driver=False, configure_logging=False)
report = serve.get_app_handle("kvservice-tiny").stats.remote().result(timeout_s=30)
# What the controller has recorded has no public way out.
controller = _get_global_client()._controller
deployment = DeploymentID(name="Worker", app_name="kvservice-tiny")
recorded = {}
for _ in range(60):
    recorded = ray.get(controller._get_metrics_for_deployment_for_testing.remote(deployment))
    if "occupancy" in str(recorded):
        break
    time.sleep(0.5)
status = serve.status().applications["kvservice-tiny"].deployments["Worker"]
print(json.dumps({"report": report, "recorded": str(recorded), "replicas": status.replica_states}))
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory):
    from kvservice.models.tiny import write_tiny_checkpoint

    folder = tmp_path_factory.mktemp("ray")
    worker = {
        "model": str(write_tiny_checkpoint(folder / "tiny")),
        "kv_bytes": "48MiB",
        "host_bytes": "64MiB",
        "dtype": "fp32",
        "threads": 1,
        "drain_grace_s": 5,
    }
    deployment = {
        "name": "tiny",
        "worker": worker,
        "num_cpus": 0.25,
        "health_check_period_s": 1,
        "autoscaling": {"min_replicas": 2, "max_replicas": 2},
    }
    settings = folder / "settings.json"
    settings.write_text(json.dumps({"ray": {"deployments": [deployment]}, "log_level": "WARNING"}))
    service = LocalService(["--ray", "--config", str(settings)])
    await service.start()
    children = psutil.Process(service.pid).children(recursive=True)
    try:
        yield service
    finally:
        assert await service.stop() == 0, service.last_lines
        _, alive = psutil.wait_procs(children, timeout=20)
        for process in alive:
            process.kill()
        assert not alive


async def test_ray_runs_two_workers_and_records_their_load(service) -> None:
    asked = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", ASK_RAY], capture_output=True, text=True, timeout=120, check=False
    )
    assert asked.returncode == 0, asked.stderr[-2000:]
    told = json.loads(asked.stdout.splitlines()[-1])
    assert set(told["report"]) >= {"occupancy", "queue_s", "running_calls"}
    assert "occupancy" in told["recorded"]
    assert told["replicas"] == {"RUNNING": 2}


async def test_a_session_goes_on_at_the_other_worker_when_its_own_is_killed(service) -> None:
    async with Client(service.address) as client:
        session = (await client.create_session()).session_id
        await client.append(session, "a document of no great length. " * 20)
        before = await client.ask(session, "what? ", max_new_tokens=8, ignore_eos=True)
        assert before.finished.usage.recomputed_tokens == 0
        holder = (await client.get(session)).worker_id
        addresses = {worker.worker_id: worker.address for worker in (await client.stats()).workers}
        assert len(addresses) == 2
        os.kill(_listener(service.pid, int(addresses[holder].rsplit(":", 1)[1])), signal.SIGKILL)
        after = await client.ask(session, "and then? ", max_new_tokens=8, ignore_eos=True)
        # It is brought back from Redis, if it was published by then.
        assert 0 <= after.finished.usage.recomputed_tokens <= before.finished.num_tokens
        assert (await client.get(session)).worker_id != holder
        async with asyncio.timeout(PATIENCE_S):
            while len((await client.stats()).workers) < 2:
                await asyncio.sleep(0.25)
        # Ray has started a new replica, which is a new worker.
        assert holder not in {worker.worker_id for worker in (await client.stats()).workers}


def _listener(root: int, port: int) -> int:
    """The process below `root` that listens on `port`."""
    for process in psutil.Process(root).children(recursive=True):
        for connection in process.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                return process.pid
    raise AssertionError(f"nobody listens on port {port}")
