from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest

from kvservice.drill.cluster import DrillCluster
from kvservice.tier.base import open_tier
from kvservice.tier.header import FrameHeader, FrameRole
from kvservice.tier.wire import encode_frame
from kvservice.types import SessionId

PAYLOAD = bytes(range(256))


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[DrillCluster]:
    cluster = DrillCluster(tmp_path)
    async with AsyncExitStack() as stack:
        for server in cluster.servers:
            stack.callback(server.kill)
            await server.start()
        await cluster.join()
        yield cluster


def header(number: int) -> FrameHeader:
    name = bytes([number]) * 16
    session = SessionId(f"s{number}")
    return FrameHeader(bytes(16), session, bytes(16), 0, FrameRole.KV, name, 16, 80, (len(PAYLOAD),), "uint8")


async def test_frames_are_read_while_their_slots_move_and_after(cluster):
    headers = [header(number) for number in range(12)]
    frames = {each.key: encode_frame(each, PAYLOAD) for each in headers}
    async with aclosing(open_tier(cluster.url())) as tier:
        await tier.put_many(list(frames.items()), 60)
        wanted = [bytes(frame) for frame in frames.values()]
        await cluster.begin_moves()
        assert await tier.get_many(list(frames)) == wanted
        # What is new is written where its slot will be.
        await tier.put_many(list(frames.items()), 60)
        await cluster.end_moves()
        await cluster.until_whole()
        assert await tier.get_many(list(frames)) == wanted
        assert await tier.delete_session(bytes(16), SessionId("s3")) == 1
