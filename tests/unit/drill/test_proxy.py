"""The proxy that breaks connections, in front of a server that answers with what it is told."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from kvservice.drill.proxy import CommandReader, LinkFault, Proxy

PATIENCE_S = 10.0
PAYLOAD = bytes(range(256)) * 400


@asynccontextmanager
async def echo_behind(fault=None):
    """A server that sends back what it gets, and a proxy before it."""

    async def serve(reader, writer):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    proxy = Proxy("127.0.0.1", server.sockets[0].getsockname()[1], seed=3)
    await proxy.start()
    if fault is not None:
        proxy.set(fault)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield proxy
    finally:
        await proxy.aclose()
        server.close()


@asynccontextmanager
async def connected(proxy):
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def test_without_a_fault_bytes_pass_as_they_are():
    async with echo_behind() as proxy, connected(proxy) as (reader, writer):
        writer.write(PAYLOAD)
        assert await reader.readexactly(len(PAYLOAD)) == PAYLOAD
        assert proxy.counts.passed_bytes == 2 * len(PAYLOAD)


@pytest.mark.parametrize("jitter_s", [0.0, 0.05])
async def test_latency_is_added_both_ways_and_order_is_kept(jitter_s):
    async with echo_behind(LinkFault(latency_s=0.05, jitter_s=jitter_s)) as proxy, connected(proxy) as (reader, writer):
        started = asyncio.get_running_loop().time()
        for index in range(20):
            writer.write(b"%02d" % index)
            await writer.drain()
        assert await reader.readexactly(40) == b"".join(b"%02d" % index for index in range(20))
        assert asyncio.get_running_loop().time() - started >= 0.1


async def test_reset_comes_in_the_middle_of_a_reply():
    async with echo_behind(LinkFault(reset_after_bytes=1000)) as proxy, connected(proxy) as (reader, writer):
        writer.write(PAYLOAD)
        with pytest.raises(ConnectionResetError):
            await reader.read(-1)
        assert proxy.counts.cut_connections == 1


async def test_truncated_reply_ends_as_if_all_had_been_said():
    async with echo_behind(LinkFault(truncate_after_bytes=1000)) as proxy, connected(proxy) as (reader, writer):
        writer.write(PAYLOAD)
        assert await reader.read(-1) == PAYLOAD[:1000]


@pytest.mark.parametrize("flip_requests", [False, True])
async def test_bits_are_flipped_and_counted(flip_requests):
    fault = LinkFault(flip_every_bytes=10_000, flip_requests=flip_requests)
    async with echo_behind(fault) as proxy, connected(proxy) as (reader, writer):
        writer.write(PAYLOAD)
        got = await reader.readexactly(len(PAYLOAD))
        flipped = sum((a ^ b).bit_count() for a, b in zip(PAYLOAD, got, strict=True))
        assert flipped == proxy.counts.flipped_bits > 0


async def test_black_hole_swallows_nothing_and_lets_go_when_healed():
    async with echo_behind() as proxy, connected(proxy) as (reader, writer):
        proxy.set(LinkFault(black_hole=True))
        writer.write(b"late")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(4), 0.1)
        proxy.heal()
        assert await reader.readexactly(4) == b"late"


async def test_slow_drip_comes_in_drops():
    async with echo_behind(LinkFault(drip_bytes_per_s=2000)) as proxy, connected(proxy) as (reader, writer):
        started = asyncio.get_running_loop().time()
        writer.write(bytes(500))
        await reader.readexactly(500)
        assert asyncio.get_running_loop().time() - started > 0.15


async def test_refused_connections_end_at_once_those_open_included():
    async with echo_behind() as proxy, connected(proxy) as (reader, writer):
        writer.write(b"x")
        await reader.readexactly(1)
        proxy.set(LinkFault(refuses=True))
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        async with connected(proxy) as (late, _):
            with pytest.raises(ConnectionResetError):
                await late.read(1)
        assert proxy.counts.refused_connections == 1


async def test_every_command_is_answered_with_the_error_and_none_reaches_the_server():
    async with echo_behind(LinkFault(error="-LOADING not yet")) as proxy, connected(proxy) as (reader, writer):
        writer.write(b"*2\r\n$4\r\nAUTH\r\n$1\r\nx\r\n*2\r\n$3\r\nget\r\n$2\r\nkk\r\n*1\r\n$4\r\nPI")
        assert await reader.readexactly(5 + 18) == b"+OK\r\n-LOADING not yet\r\n"
        writer.write(b"NG\r\n")
        assert await reader.readexactly(18) == b"-LOADING not yet\r\n"
        assert (proxy.counts.refused_commands, proxy.counts.passed_bytes) == (2, 0)


async def test_server_that_is_away_is_a_connection_that_ends():
    proxy = Proxy("127.0.0.1", 1)
    await proxy.start()
    try:
        async with connected(proxy) as (reader, _):
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
    finally:
        await proxy.aclose()


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_commands_are_told_apart_however_they_are_cut(step):
    stream = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$4\r\n*\r\n$\r\n*1\r\n$4\r\nping\r\n*2\r\n$3\r\nGET\r\n$0\r\n\r\n"
    reader = CommandReader()
    names = [name for start in range(0, len(stream), step) for name in reader.feed(stream[start : start + step])]
    assert names == [b"SET", b"PING", b"GET"]
