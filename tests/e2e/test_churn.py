"""Sessions that come and go, on servers of both allocators; and many at a time with too little memory."""

from __future__ import annotations

import asyncio
import os
import random
from contextlib import AsyncExitStack

import pytest
from redis import Redis

from kvservice.bench.churn import ChurnLoad, measure_churn
from kvservice.store.blobs import RedisBlobs
from kvservice.store.embedded import EmbeddedRedis, RedisRole
from kvservice.store.sizes import Allocator
from kvservice.tier.base import open_tier
from kvservice.worker import publishing
from tests.e2e.test_moves import PATIENCE_S, serving
from tests.unit.store.test_sizes import jemalloc_server

SESSIONS = 8
MODEL = os.environ.get("KVSERVICE_TEST_MODEL")
"""Another model than the tiny one: its folder."""


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """What is asked here must be answered alike on a machine that others keep busy."""
    monkeypatch.setattr(publishing, "BEGIN_TIMEOUT_S", PATIENCE_S)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from kvservice.models.tiny import write_tiny_checkpoint

    return MODEL or write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("allocator", list(Allocator))
async def test_redis_comes_back_to_its_start_and_the_ledger_is_right_within_5_percent(
    model, state_url, allocator, tmp_path
):
    server = jemalloc_server(tmp_path) if allocator is Allocator.JEMALLOC else None
    with EmbeddedRedis(RedisRole.KV, maxmemory_bytes=256 << 20, server=server) as kv:
        async with AsyncExitStack() as stack:
            service = await stack.enter_async_context(serving(model, state_url, kv.url, names=("a",)))
            blobs, tier = RedisBlobs(kv.url), open_tier(kv.url)
            stack.push_async_callback(blobs.aclose)
            stack.push_async_callback(tier.aclose)
            await blobs.check()
            assert blobs.allocator is allocator
            load = ChurnLoad(sessions=24, alive=8, doc_tokens=500, seed=7)
            result = await measure_churn(service.client, blobs, tier, load, tenant="local", on_wave=lambda done: None)
            assert result.sessions == 24
            assert result.before.is_nothing
            assert result.after.is_nothing
            assert all(peak.sessions == 8 and peak.frames for peak in result.peaks)
            assert result.worst_error < 0.05


async def test_eight_sessions_with_too_little_memory_answer_as_alone(model, state_url, kv_url):
    """Cold, warm, resumed and forked, while others take the device and the host. `test_moves` has those that move."""
    letters = random.Random(3)
    documents = ["".join(letters.choice("abcdefghij klmnop.\n") for _ in range(900)) for _ in range(SESSIONS)]
    async with serving(model, state_url, kv_url, names=("alone",)) as service:
        expected = []
        for document in documents:
            session = await service.loaded(document)
            expected.append([await service.ask(session), await service.ask(session, "and last? ")])
            await service.client.close_session(session, purge=True)
    small = {"kv_bytes": 3 << 20, "host_bytes": 3 << 20}
    async with serving(model, state_url, kv_url, names=("small",), **small) as service:
        client = service.client

        def same(answers, index):
            for answer, others in zip(answers, expected, strict=True):
                assert (answer.token_ids, answer.logprobs) == (others[index].token_ids, others[index].logprobs)

        sessions = await asyncio.gather(*(service.loaded(document) for document in documents))
        forks = [(await client.fork_session(each)).session_id for each in sessions]
        others = [(await client.fork_session(each)).session_id for each in sessions]
        # Warm, or resumed where others have taken their place.
        same(await asyncio.gather(*(service.ask(each) for each in sessions)), 0)
        assert await service.evicted()
        # On from there, and forked.
        work = [*(service.ask(each, "and last? ") for each in sessions), *(service.ask(each) for each in forks)]
        answers = await asyncio.gather(*work)
        same(answers[:SESSIONS], 1)
        same(answers[SESSIONS:], 0)
        # Cold: nothing is left but records.
        with Redis.from_url(kv_url) as kv:
            kv.flushall()
        same(await asyncio.gather(*(service.ask(each) for each in others)), 0)
        assert (await service.resumed()).restored_tokens > 0
