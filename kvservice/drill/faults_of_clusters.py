"""A Redis Cluster as the kv role whose slots move, and whose servers die."""

from __future__ import annotations

from kvservice.drill.cluster import DrillCluster
from kvservice.drill.deployment import Deployment, KvKind
from kvservice.drill.faults import TIER, Fault


def _cluster(deployment: Deployment) -> DrillCluster:
    assert deployment.cluster is not None
    return deployment.cluster


async def _begin_moves(deployment: Deployment) -> None:
    await _cluster(deployment).begin_moves()


async def _end_moves(deployment: Deployment) -> None:
    await _cluster(deployment).end_moves()


async def _move(deployment: Deployment) -> None:
    await _begin_moves(deployment)
    await _end_moves(deployment)


async def _nothing(deployment: Deployment) -> None:
    del deployment


async def _kill_one(deployment: Deployment) -> None:
    _cluster(deployment).servers[-1].kill()


async def _start_one(deployment: Deployment) -> None:
    cluster = _cluster(deployment)
    await cluster.servers[-1].start()
    await cluster.until_whole()


CLUSTER_FAULTS: tuple[Fault, ...] = (
    Fault("cluster: slots have moved", TIER, _move, _nothing, kv=KvKind.CLUSTER),
    Fault("cluster: slots are on their way", TIER, _begin_moves, _end_moves, kv=KvKind.CLUSTER),
    Fault("cluster: a server is killed", TIER, _kill_one, _start_one, kv=KvKind.CLUSTER),
)
