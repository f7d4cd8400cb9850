"""Sessions that move, fork, resume and lose what is stored of them: real gRPC, real Redis, tiny models."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest
from redis import Redis

from kvservice.cli import compose
from kvservice.client import Client
from kvservice.config.gateway import GatewayConfig
from kvservice.config.worker import WorkerConfig
from kvservice.errors import InvalidRequest, NotFound
from kvservice.gateway.server import Gateway
from kvservice.store.redis import RedisStateStore
from kvservice.v1 import admin_pb2, admin_pb2_grpc

PATIENCE_S = 120.0
QUESTION = "and what then? "
WINDOW_TOKENS = 400
"""More than the window of any recipe, and less than the document."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from kvservice.models.tiny import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def document():
    letters = random.Random(7)
    return "".join(letters.choice("abcdefghij klmnop.\n") for _ in range(1300))


class Service:
    """A gateway and workers in this process."""

    def __init__(self, client: Client, address: str, workers) -> None:
        self.client = client
        self.address = address
        self.workers = workers

    async def loaded(self, document: str, recipe: str = "recall") -> str:
        """A session with a document and one question behind it, so that some of its tokens were selecting."""
        session = (await self.client.create_session(recipe=recipe)).session_id
        await self.client.append(session, document)
        await self.ask(session, "first question? ")
        return session

    async def ask(self, session: str, question: str = QUESTION):
        return await self.client.ask(session, question, max_new_tokens=10, logprobs=2, ignore_eos=True)

    async def resumed(self) -> admin_pb2.ResumeStats:
        """Of all workers."""
        total = admin_pb2.ResumeStats()
        async with grpc.aio.insecure_channel(self.address) as channel:
            report = await admin_pb2_grpc.AdminServiceStub(channel).GetStats(admin_pb2.GetStatsRequest())
        for worker in report.workers:
            stats = worker.ledger.resumed
            total.fetched_sessions += stats.fetched_sessions
            total.restored_tokens += stats.restored_tokens
            for reason, count in stats.misses.items():
                total.misses[reason] += count
        return total


@asynccontextmanager
async def serving(model, state_url, kv_url, names=("a", "b")):
    async with AsyncExitStack() as stack:
        store = RedisStateStore(state_url)
        stack.push_async_callback(store.aclose)
        workers = {}
        for name in names:
            config = WorkerConfig(
                worker_id=name,
                model=str(model),
                kv_bytes=16 << 20,
                host_bytes=32 << 20,
                dtype="fp32",
                threads=1,
                deterministic=True,
                redis_url=kv_url,
                drain_grace_s=1.0,
            )
            workers[name] = await compose.worker(config, store, stack)
            await workers[name].start()
        gateway = Gateway(GatewayConfig(secret="0" * 32, port=0, discovery_interval_s=0.05), store)
        stack.push_async_callback(gateway.stop)
        address = await gateway.start()
        async with asyncio.timeout(PATIENCE_S):
            while len(gateway.fleet.views()) < len(names):
                await asyncio.sleep(0.02)
        client = await stack.enter_async_context(Client(address))
        yield Service(client, address, workers)


@pytest.mark.parametrize("recipe", ["recall", "exact"])
async def test_a_session_answers_bit_for_bit_alike_wherever_it_goes_on(model, document, state_url, kv_url, recipe):
    async with serving(model, state_url, kv_url) as service:
        client = service.client
        session = await service.loaded(document, recipe)
        forks = [(await client.fork_session(session)).session_id for _ in range(5)]
        warm = await service.ask(session)
        assert warm.finished.usage.recomputed_tokens == 0

        # Forked: from the same memory.
        forked = await service.ask(forks[0])
        assert (forked.token_ids, forked.logprobs) == (warm.token_ids, warm.logprobs)
        assert forked.finished.usage.recomputed_tokens == 0

        # Truncated: back to where it was.
        held = (await client.get(forks[1])).num_tokens
        await service.ask(forks[1], "something else entirely, and at some length? ")
        left = await client.truncate_session(forks[1], held)
        assert left.num_tokens == left.durable_tokens == held
        truncated = await service.ask(forks[1])
        assert (truncated.token_ids, truncated.logprobs) == (warm.token_ids, warm.logprobs)

        # Moved: from the tier, all but the window.
        holder = (await client.get(forks[2])).worker_id
        moved_to = (await client.move_session(forks[2])).worker_id
        assert moved_to != holder
        before = await service.resumed()
        moved = await service.ask(forks[2])
        assert (moved.token_ids, moved.logprobs) == (warm.token_ids, warm.logprobs)
        assert (await client.get(forks[2])).worker_id == moved_to
        assert (await service.resumed()).restored_tokens > before.restored_tokens
        assert 0 < moved.finished.usage.recomputed_tokens < WINDOW_TOKENS
        again = await service.ask(forks[2], "and now? ")
        assert again.finished.usage.recomputed_tokens == 0
        assert (await client.move_session(forks[2], holder)).worker_id == holder
        back = await service.ask(forks[2], "and back? ")
        assert 0 < back.finished.usage.recomputed_tokens < WINDOW_TOKENS

        # Resumed: the worker that had it has gone.
        await service.workers[holder].stop()
        resumed = await service.ask(forks[3])
        assert (resumed.token_ids, resumed.logprobs) == (warm.token_ids, warm.logprobs)
        assert 0 < resumed.finished.usage.recomputed_tokens < WINDOW_TOKENS

        # Cold: nothing is left but the record, how its tokens were computed, and what other sessions share with it.
        with Redis.from_url(kv_url) as kv:
            kv.flushall()
        cold = await service.ask(forks[4])
        assert (cold.token_ids, cold.logprobs) == (warm.token_ids, warm.logprobs)
        assert cold.finished.usage.recomputed_tokens > 0
        assert (await service.resumed()).misses["absent"] > 0


@pytest.mark.parametrize("damage", ["flipped", "missing"])
async def test_a_frame_that_is_damaged_or_gone_costs_time_and_no_answer(model, document, state_url, kv_url, damage):
    async with serving(model, state_url, kv_url) as service:
        client = service.client
        session = await service.loaded(document)
        fork = (await client.fork_session(session)).session_id
        warm = await service.ask(session)
        await client.move_session(fork)
        with Redis.from_url(kv_url) as kv:
            frames = [key for key in kv.scan_iter("kv1:*") if kv.type(key) == b"string"]
            assert frames
            for key in frames:
                if damage == "missing":
                    kv.delete(key)
                else:
                    middle = kv.strlen(key) // 2
                    (byte,) = kv.getrange(key, middle, middle)
                    kv.setrange(key, middle, bytes([byte ^ 1]))
        answer = await service.ask(fork)
        assert (answer.token_ids, answer.logprobs) == (warm.token_ids, warm.logprobs)
        assert answer.finished.usage.recomputed_tokens > WINDOW_TOKENS
        misses = (await service.resumed()).misses
        assert misses["checksum" if damage == "flipped" else "absent"] > 0


async def test_operations_are_refused_with_numbers_and_repeated_once(model, document, state_url, kv_url):
    async with serving(model, state_url, kv_url, names=("a",)) as service:
        client = service.client
        session = await service.loaded(document[:200])
        num_tokens = (await client.get(session)).num_tokens
        with pytest.raises(InvalidRequest, match=f"holds {num_tokens}"):
            await client.truncate_session(session, num_tokens + 1)
        with pytest.raises(NotFound, match="connected are a"):
            await client.move_session(session, "nobody")
        with pytest.raises(NotFound):
            await client.fork_session("another")
        fork = await client.fork_session(session, request_id="f-1")
        assert await client.fork_session(session, request_id="f-1") == fork
        assert (fork.num_tokens, fork.session_id != session) == (num_tokens, True)
        assert (await client.truncate_session(fork.session_id, 0)).num_tokens == 0
        await client.append(fork.session_id, "a new beginning")
        assert (await client.get(session)).num_tokens == num_tokens
        for each in (session, fork.session_id):
            await client.close_session(each, purge=True)
        with Redis.from_url(kv_url) as kv:
            assert not list(kv.scan_iter("kv1*"))
