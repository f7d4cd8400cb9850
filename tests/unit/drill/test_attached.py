from __future__ import annotations

from contextlib import aclosing

import pytest
from redis.asyncio import Redis

from kvservice.drill.attached import FLEET_KEY, AttachedConfig, RunningService, _Server, run_attached
from kvservice.errors import ConfigError, Unavailable
from tests.unit.gateway.conftest import running


async def test_server_that_holds_the_state_is_left_alone(kv_url):
    async with Redis.from_url(kv_url) as redis, running() as service:
        await redis.set(FLEET_KEY, 3)
        with pytest.raises(ConfigError, match="state"):
            await run_attached(AttachedConfig(kv_url, may_lose_kv=True), await service.client(), "recall", print)
        assert await redis.get(FLEET_KEY) == b"3"


async def test_service_without_two_workers_is_refused(kv_url):
    async with running() as service:
        with pytest.raises(ConfigError, match="1 workers"):
            await RunningService.of(await service.client(), seed=1)
        with pytest.raises(ConfigError):
            await run_attached(AttachedConfig(kv_url), await service.client(), "recall", print)


async def test_cluster_is_refused():
    with pytest.raises(ConfigError, match="cluster"):
        _Server("redis+cluster://127.0.0.1:1")


async def test_connections_are_cut_but_for_the_drill_s(kv_url):
    async with aclosing(_Server(kv_url)) as server, Redis.from_url(kv_url) as other:
        await other.ping()
        before = await server.command("CLIENT", "ID")
        named = await other.client_id()
        await server.cut()
        await server.stop_cutting()
        await server.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert await server.command("CLIENT", "ID") == before
        assert f"id={named} ".encode() not in await server.command("CLIENT", "LIST", "TYPE", "normal")


async def test_frames_of_one_session_are_found_and_no_others(kv_url):
    async with aclosing(_Server(kv_url)) as server, Redis.from_url(kv_url) as redis:
        names = {b"kv1:{00:abc}:1", b"kv1:{00:abc}:2"}
        for name in (*names, b"kv1:{00:abcd}:1", b"kv1i:{00:abc}"):
            await redis.set(name, b"x")
        assert set(await server.frames_of("abc")) == names


async def test_server_that_is_away_says_so(unused_tcp_port):
    async with aclosing(_Server(f"redis://127.0.0.1:{unused_tcp_port}")) as server:
        with pytest.raises(Unavailable):
            await server.has_state()
