"""Answers that are none to their commands: never taken, and the connection is not used again."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from kvservice.errors import Unavailable
from kvservice.store.blobs import RedisBlobs
from kvservice.tier.base import open_source
from kvservice.tier.redis import RedisTier
from kvservice.tier.redis_cluster import ClusterTier
from kvservice.types import SessionId

TAG = bytes(16)
KEY = b"kv1:{" + TAG.hex().encode() + b":s}:aabbccddeeff:0:kv:" + bytes(16).hex().encode()


@asynccontextmanager
async def answering(*answers: bytes):
    """A server that gives one answer after another, whatever it is asked; counts connections."""
    connections = []

    async def serve(reader, writer):
        connections.append(writer)
        while await reader.read(1 << 16):
            writer.write(answers[min(len(connections), len(answers)) - 1])
            await writer.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", connections
    finally:
        server.close()
        for writer in connections:
            writer.close()


@pytest.mark.parametrize(
    "answer",
    [b"$3\r\nabc\r\n", b"*1\r\n:3\r\n", b"!what\r\n", b"$x\r\n", b"*2\r\n$1\r\na\r\n:7\r\n", b"\x00\x00\x00\r\n"],
)
async def test_length_that_is_no_number_is_garbled_and_the_next_call_has_a_new_connection(answer):
    async with answering(answer, b":0\r\n") as (url, connections):
        tier = RedisTier(url, timeout_s=2.0)
        try:
            with pytest.raises(Unavailable) as caught:
                await tier.get_many([KEY])
            assert caught.value.reason in ("garbled", "connection", "other")
            assert await tier.get_many([KEY]) == [None]
            assert len(connections) == 2
        finally:
            await tier.aclose()


SLOTS = b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n"


@pytest.mark.parametrize("answer", [b"$3\r\nabc\r\n", b"*1\r\n:3\r\n", b"*0\r\n"])
async def test_answers_of_a_cluster_are_checked_as_those_of_one_server(answer):
    async with answering(answer) as (redis_url, connections):
        port = int(redis_url.rpartition(":")[2])
        async with cluster_of(port) as url:
            tier = ClusterTier(url, timeout_s=2.0)
            try:
                with pytest.raises(Unavailable) as caught:
                    await tier.get_many([KEY])
                assert caught.value.reason in ("garbled", "connection", "other")
                with pytest.raises(Unavailable):
                    await tier.get_many([KEY])
                assert len(connections) == 2
            finally:
                await tier.aclose()


@asynccontextmanager
async def cluster_of(port: int):
    """A server that says that all slots are those of the one at `port`."""
    async with answering(SLOTS % port) as (url, _):
        yield url.replace("redis://", "redis+cluster://")


@pytest.mark.parametrize(
    "answer",
    [
        b"$3\r\nabc\r\n",
        b":3\r\n",
        b"*1\r\n:3\r\n",
        b"*1\r\n*2\r\n:0\r\n:3\r\n",
        b"*1\r\n*3\r\n:0\r\n:99999999999\r\n*2\r\n$1\r\nh\r\n:1\r\n",
        b"*1\r\n*3\r\n:-5\r\n:3\r\n*2\r\n$1\r\nh\r\n:1\r\n",
        b"*1\r\n*3\r\n:0\r\n:3\r\n*2\r\n$1\r\nh\r\n$1\r\nx\r\n",
    ],
)
async def test_map_of_slots_that_is_none_is_garbled(answer):
    async with answering(answer) as (redis_url, _):
        url = redis_url.replace("redis://", "redis+cluster://")
        tier = ClusterTier(url, timeout_s=2.0)
        try:
            with pytest.raises(Unavailable) as caught:
                await tier.get_many([KEY])
            assert caught.value.reason == "garbled"
        finally:
            await tier.aclose()
        with pytest.raises(Unavailable):
            await asyncio.to_thread(open_source(url).place_of, KEY)


async def test_values_of_another_number_are_not_given_to_keys():
    async with answering(b":5\r\n") as (url, _):
        tier = RedisTier(url, timeout_s=2.0)
        try:
            with pytest.raises(Unavailable):
                # To MGET comes what was meant for STRLEN.
                await tier.get_many([KEY])
        finally:
            await tier.aclose()


async def test_names_of_others_in_an_index_delete_nothing():
    async with answering(b"*1\r\n$3\r\nkv1\r\n") as (url, _):
        tier = RedisTier(url, timeout_s=2.0)
        try:
            with pytest.raises(Unavailable) as caught:
                await tier.delete_session(TAG, SessionId("s"))
            assert caught.value.reason == "garbled"
        finally:
            await tier.aclose()


@pytest.mark.parametrize("answer", [b"$3\r\nabc\r\n", b"*0\r\n"])
async def test_sizes_of_blobs_are_numbers_or_not_known(answer):
    async with answering(answer) as (url, _):
        blobs = RedisBlobs(url, timeout_s=0.5)
        try:
            for call in (blobs.sizes([KEY]), blobs.renew([KEY], 5.0), blobs.delete([KEY]), blobs.scan(0)):
                with pytest.raises(Unavailable):
                    await call
        finally:
            await blobs.aclose()
