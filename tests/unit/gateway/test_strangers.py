"""Connections that say nothing, or say it too slowly or too often, on the gRPC port of a whole gateway."""

from __future__ import annotations

import asyncio

from kvservice.config.limits import Limits
from kvservice.types import Role
from tests.unit.gateway.conftest import Service, keys, running

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CLOSED_S = 10.0


async def connection(service: Service) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = service.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def until_closed(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(CLOSED_S):
        try:
            await reader.read()
        except ConnectionError:
            return


async def test_connection_that_says_nothing_is_closed():
    async with running(limits=Limits(header_s=0.3)) as service:
        for said in (b"", PREFACE[:7], PREFACE):
            reader, writer = await connection(service)
            writer.write(said)
            await until_closed(reader)
            writer.close()
        assert await (await service.client()).stats()


async def test_connections_beyond_the_limit_are_closed_and_those_before_go_on():
    async with running(limits=Limits(connections=3, header_s=30)) as service:
        client = await service.client()
        await client.stats()
        idle = [await connection(service) for _ in range(4)]
        # One of them is one too many; which, is for the server to say.
        closed = [asyncio.create_task(until_closed(reader)) for reader, _ in idle]
        done, rest = await asyncio.wait(closed, return_when=asyncio.FIRST_COMPLETED, timeout=CLOSED_S)
        assert done
        assert await client.stats()
        for task in rest:
            task.cancel()
        for _, writer in idle:
            writer.close()


async def test_crowd_of_strangers_without_keys_leaves_a_tenant_served():
    tenants = keys(("key-a", "a", Role.TENANT))
    async with running(api_keys=tenants, limits=Limits(header_s=0.5)) as service:
        client = await service.client("key-a")
        crowd = [await connection(service) for _ in range(50)]
        for _, writer in crowd:
            writer.write(PREFACE)
        for _ in range(5):
            assert (await client.create_session()).session_id
        await asyncio.gather(*(until_closed(reader) for reader, _ in crowd))
        for _, writer in crowd:
            writer.close()
