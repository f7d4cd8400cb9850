from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvservice.client import Client, RetryPolicy
from kvservice.errors import ConfigError, InvalidRequest, NotFound, Unavailable
from kvservice.gateway.server import SERVICE_NAMES, Gateway
from kvservice.store.memory import MemoryStateStore
from kvservice.types import Role
from tests.unit.gateway.conftest import config, eventually, keys, running
from tests.unit.gateway.fake_worker import MODEL, FakeWorker

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(address: str, name: str = "") -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status


@pytest.mark.parametrize("name", ["", *SERVICE_NAMES])
async def test_health_is_serving_while_a_worker_is_connected(name: str) -> None:
    async with running([], keys(("k", "t", Role.TENANT)), health_port=0) as service:
        assert await health(service.address, name) == NOT_SERVING
        worker = FakeWorker()
        service.workers.append(worker)
        await worker.start(service.store)

        async def serving() -> bool:
            return await health(service.gateway.health_address, name) == SERVING

        await eventually(serving)
        await worker.kill()

        async def not_serving() -> bool:
            return await health(service.address, name) == NOT_SERVING

        await eventually(not_serving)


async def test_a_drain_refuses_new_calls_lets_running_ones_end_and_says_so_in_health() -> None:
    async with running() as service:
        client, worker = await service.client(), service.worker
        session = await client.create_session()
        worker.pause_after = 1
        answer = asyncio.create_task(client.ask(session.session_id, "q", max_new_tokens=2))
        await worker.wait_for("submits")
        assert await client.drain(grace_s=60) == 1

        async def not_serving() -> bool:
            return await health(service.address) == NOT_SERVING

        await eventually(not_serving)
        with pytest.raises(Unavailable, match="draining") as caught:
            await client.create_session()
        assert caught.value.retry_after_s is not None
        # Reading goes on.
        assert await client.get(session.session_id)
        assert (await client.stats()).draining
        worker.go.set()
        assert (await answer).finished.num_tokens == 3
        await service.gateway.drain()


async def test_callers_of_a_gateway_that_leaves_go_to_another_at_once_and_their_streams_end_well() -> None:
    async with running() as first:
        other = Gateway(config(), first.store)
        try:
            address = await other.start()
            await eventually(lambda: bool(other.fleet.views()))
            # A call may cross the news that the connection ends; the next attempt goes elsewhere.
            async with Client(f"ipv4:{first.address},{address}", retry=RetryPolicy(max_attempts=3)) as client:
                session = await client.create_session()
                first.worker.pause_after = 1
                answer = asyncio.create_task(client.ask(session.session_id, "q", max_new_tokens=2))
                await first.worker.wait_for("submits")
                leaving = asyncio.create_task(first.gateway.leave())
                await eventually(lambda: closed(first.address))
                assert (await client.stats()).draining is False
                for _ in range(5):
                    assert await client.create_session()
                first.worker.go.set()
                assert (await answer).finished.num_tokens == 3
                await leaving
        finally:
            await other.stop()


def closed(address: str) -> bool:
    """Whether nobody listens there any more."""
    host, _, port = address.rpartition(":")
    with socket.socket() as connection:
        return connection.connect_ex((host, int(port))) != 0


async def test_after_the_grace_running_calls_are_cancelled_and_sessions_are_as_before() -> None:
    async with running() as service:
        client, worker = await service.client(), service.worker
        session = await client.create_session()
        worker.pause_after = 1
        answer = asyncio.create_task(client.ask(session.session_id, "q"))
        await worker.wait_for("submits")
        await service.gateway.drain(0.01)
        with pytest.raises(Unavailable, match="drained while the call ran"):
            await answer
        assert len(worker.cancels) == 1
        assert (await client.get(session.session_id)).num_tokens == 0


async def test_one_worker_is_drained_by_name() -> None:
    async with running() as service:
        client = await service.client()
        assert await client.drain("w1", grace_s=1.5) == 0
        assert service.worker.drains[0].grace.ToMilliseconds() == 1500
        with pytest.raises(NotFound, match="unknown worker 'w9': connected are w1"):
            await client.drain("w9")
        with pytest.raises(InvalidRequest, match="can't be negative"):
            await client.drain(grace_s=-1)


async def test_a_busy_port_is_a_config_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for settings, name in (({"port": port}, "port"), ({"health_port": port}, "health_port")):
            gateway = Gateway(config(**settings), MemoryStateStore())
            with pytest.raises(ConfigError, match=f"^{name}={port}.*another process.*choose another") as caught:
                await gateway.start()
            assert caught.value.field == name
            await gateway.stop()


async def test_two_gateways_do_not_share_a_port() -> None:
    async with running([]) as service:
        port = int(service.address.rpartition(":")[2])
        second = Gateway(config(port=port), MemoryStateStore())
        with pytest.raises(ConfigError, match=f"port={port}"):
            await second.start()
        await second.stop()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_without_keys_only_loopback_is_listened_on(host: str) -> None:
    with pytest.raises(ConfigError, match="without API keys"):
        Gateway(config(host=host), MemoryStateStore())


async def test_with_keys_any_address_is_listened_on() -> None:
    async with running(api_keys=keys(("k", "t", Role.TENANT)), host="0.0.0.0") as service:
        assert service.address.startswith("0.0.0.0:")


async def test_reflection_lists_the_services() -> None:
    async with running([]) as service, grpc.aio.insecure_channel(service.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(one(reflection_pb2.ServerReflectionRequest(list_services="")))
        (response,) = [response async for response in call]
        found = {each.name for each in response.list_services_response.service}
        assert set(SERVICE_NAMES) < found


async def one(message):
    yield message


async def test_models_are_those_of_the_workers() -> None:
    small = replace(MODEL, name="small", recipes=("dense", "recall-oracle"), default_recipe="dense")
    async with running([FakeWorker("w1"), FakeWorker("w2", model=small)]) as service:
        client = await service.client()
        models = {model.name: model for model in await client.list_models()}
        assert models["toy"] == MODEL
        assert models["small"].recipes == ("dense",)
        with pytest.raises(InvalidRequest, match="name one of toy, small"):
            await client.create_session()
        session = await client.create_session(model="small")
        assert session.recipe == "dense"
        assert (await client.ask(session.session_id, "q", max_new_tokens=1)).started.worker_id == "w2"


async def test_an_answer_without_a_session_leaves_nothing() -> None:
    async with running() as service:
        client = await service.client()
        events = [event async for event in client.complete("why?", document="because", max_new_tokens=2, seed=1)]
        assert [event.sequence for event in events] == [1, 2, 3, 4]
        submit = service.worker.submits[0]
        assert (bytes(submit.generate.document_token_ids), submit.retain) == (b"because", False)
        assert [request.first for request in service.worker.tokenized] == [True, False]
        assert [session async for session in client.list()] == []
        with pytest.raises(InvalidRequest, match="are empty"):
            await anext(client.complete(""))


async def test_a_client_that_leaves_an_answer_without_a_session_cancels_it() -> None:
    async with running() as service:
        client = await service.client()
        service.worker.pause_after = 1
        events = client.complete("why?")
        await anext(events)
        await events.aclose()
        await service.worker.wait_for("cancels")


async def test_tokens_are_counted() -> None:
    async with running() as service:
        client = await service.client()
        counted = await client.count_tokens("four")
        assert (counted.num_tokens, counted.max_positions) == (4, 2000)
        with pytest.raises(NotFound, match="unknown model"):
            await client.count_tokens("x", model="nope")


async def test_stats_are_gathered_from_every_worker() -> None:
    async with running([FakeWorker("w2"), FakeWorker("w1")]) as service:
        client = await service.client()
        session = await client.create_session()
        await client.append(session.session_id, "x")
        stats = await client.stats()
        assert [worker.worker_id for worker in stats.workers] == ["w1", "w2"]
        assert stats.sessions == 1
        assert stats.workers[0].tier.failures == {"timeout": 3}
        assert stats.version


async def test_discovery_survives_a_store_that_is_away() -> None:
    async with running([]) as service:
        list_workers = service.store.list_workers

        async def away():
            raise Unavailable("the store is away")

        service.store.list_workers = away
        await eventually(lambda: service.gateway.fleet.failed_looks > 0)
        service.store.list_workers = list_workers
        worker = FakeWorker()
        service.workers.append(worker)
        await worker.start(service.store)
        await service.connected(1)
