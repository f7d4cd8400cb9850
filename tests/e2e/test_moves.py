"""Sessions that move, fork, resume, share documents, and lose what is stored: real gRPC and Redis, tiny models."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest
from redis import Redis

from kvservice.cli import compose
from kvservice.client import Client, RetryPolicy
from kvservice.config.gateway import GatewayConfig
from kvservice.config.worker import WorkerConfig
from kvservice.errors import FailedPrecondition, InvalidRequest, LimitExceeded, NotFound
from kvservice.gateway.server import Gateway
from kvservice.store.redis import RedisStateStore
from kvservice.v1 import admin_pb2, admin_pb2_grpc
from kvservice.worker import publishing

PATIENCE_S = 120.0
QUESTION = "and what then? "
WINDOW_TOKENS = 400
"""More than the window of any recipe, and less than the document."""


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """What is asked here must be answered alike on a machine that others keep busy."""
    monkeypatch.setattr(publishing, "BEGIN_TIMEOUT_S", PATIENCE_S)


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

    async def stored_bytes(self) -> int:
        """That the tenant is charged with."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            found = await admin_pb2_grpc.AdminServiceStub(channel).Verify(admin_pb2.VerifyRequest(tenant="local"))
        return found.stored_bytes

    async def evicted(self) -> int:
        """Sessions that made room for others, of all workers."""
        workers = (await self.client.stats()).workers
        return sum(each.idle_dropped + each.idle_swapped_out + each.forgotten + each.swapped_out for each in workers)

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
async def serving(model, state_url, kv_url, names=("a", "b"), secret="0" * 32, retry=None, **settings):
    async with AsyncExitStack() as stack:
        store = RedisStateStore(state_url)
        stack.push_async_callback(store.aclose)
        workers = {}
        for name in names:
            defaults = {"kv_bytes": 16 << 20, "host_bytes": 32 << 20, "dtype": "fp32", "threads": 1}
            config = WorkerConfig(
                worker_id=name,
                model=str(model),
                deterministic=True,
                redis_url=kv_url,
                drain_grace_s=1.0,
                **{**defaults, **settings},
            )
            workers[name] = await compose.worker(config, store, stack)
            await workers[name].start()
        gateway = Gateway(GatewayConfig(secret=secret, port=0, discovery_interval_s=0.05), store)
        stack.push_async_callback(gateway.stop)
        address = await gateway.start()
        async with asyncio.timeout(PATIENCE_S):
            while len(gateway.fleet.views()) < len(names):
                await asyncio.sleep(0.02)
        client = await stack.enter_async_context(Client(address, retry=retry or RetryPolicy()))
        yield Service(client, address, workers)


async def nothing_is_left(kv_url: str) -> None:
    """Workers delete behind the answer."""
    with Redis.from_url(kv_url) as kv:
        async with asyncio.timeout(PATIENCE_S):
            while list(kv.scan_iter("kv1*")):
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("recipe", ["recall", "exact", "dense"])
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

        # Moved: from the tier, all of it.
        holder = (await client.get(forks[2])).worker_id
        moved_to = (await client.move_session(forks[2])).worker_id
        assert moved_to != holder
        before = await service.resumed()
        moved = await service.ask(forks[2])
        assert (moved.token_ids, moved.logprobs) == (warm.token_ids, warm.logprobs)
        assert (await client.get(forks[2])).worker_id == moved_to
        assert (await service.resumed()).restored_tokens > before.restored_tokens
        assert moved.finished.usage.recomputed_tokens == 0
        again = await service.ask(forks[2], "and now? ")
        assert again.finished.usage.recomputed_tokens == 0
        assert (await client.move_session(forks[2], holder)).worker_id == holder
        back = await service.ask(forks[2], "and back? ")
        # From the tier, or, where that is predicted to be faster, on from what another session shares with it.
        assert back.finished.usage.recomputed_tokens < WINDOW_TOKENS

        # Resumed: the worker that had it has gone.
        await service.workers[holder].stop()
        resumed = await service.ask(forks[3])
        assert (resumed.token_ids, resumed.logprobs) == (warm.token_ids, warm.logprobs)
        assert resumed.finished.usage.recomputed_tokens == 0

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


async def test_a_document_is_read_once_and_begins_many_sessions(model, document, state_url, kv_url):
    async with serving(model, state_url, kv_url) as service:
        client = service.client
        alone = await service.loaded(document)
        expected = await service.ask(alone)
        source = (await client.create_session(recipe="recall")).session_id
        await client.append(source, document)
        shown = await client.get(source)
        num_tokens = shown.document_tokens
        assert num_tokens == shown.num_tokens > WINDOW_TOKENS
        before = await service.stored_bytes()
        sessions = [await client.create_session(document_id=source) for _ in range(4)]
        assert {(each.document_id, each.num_tokens, each.recipe) for each in sessions} == {
            (source, num_tokens, "recall")
        }
        # Named once more, and not stored once more.
        assert await service.stored_bytes() == before
        for each in sessions[:2]:
            await service.ask(each.session_id, "first question? ")
            answer = await service.ask(each.session_id)
            assert (answer.token_ids, answer.logprobs) == (expected.token_ids, expected.logprobs)
            assert answer.finished.usage.recomputed_tokens == 0
        # Elsewhere, and under another recipe: from the tier.
        moved = sessions[2].session_id
        await client.move_session(moved)
        await service.ask(moved, "first question? ")
        answer = await service.ask(moved)
        assert (answer.token_ids, answer.logprobs) == (expected.token_ids, expected.logprobs)
        exact = await client.create_session(document_id=source, recipe="exact")
        # It needs nothing read again, whether its KV is fetched or computing it is predicted to be faster.
        assert (await client.verify("local", exact.session_id)).checked_frames > 0
        await service.ask(exact.session_id)
        # The document's own session may go, and take nothing with it.
        await client.close_session(source, purge=True)
        last = sessions[3].session_id
        await client.move_session(last)
        await service.ask(last, "first question? ")
        answer = await service.ask(last)
        assert (answer.token_ids, answer.logprobs) == (expected.token_ids, expected.logprobs)
        for each in (alone, exact.session_id, *(each.session_id for each in sessions)):
            await client.close_session(each, purge=True)
        await nothing_is_left(kv_url)


async def test_what_is_no_document_begins_no_session(model, document, state_url, kv_url):
    async with serving(model, state_url, kv_url, names=("a",)) as service:
        client = service.client
        asked = (await client.create_session()).session_id
        await service.ask(asked, "a question before any document? ")
        await client.append(asked, document[:100])
        assert (await client.get(asked)).document_tokens == 0
        with pytest.raises(FailedPrecondition, match="has no document"):
            await client.create_session(document_id=asked)
        with pytest.raises(NotFound):
            await client.create_session(document_id="another")
        source = (await client.create_session()).session_id
        await client.append(source, document[:100])
        await client.append(source, document[100:200])
        tokens = (await client.get(source)).document_tokens
        await service.ask(source)
        assert (await client.get(source)).document_tokens == tokens
        with pytest.raises(InvalidRequest, match="is of model"):
            await client.create_session(document_id=source, model="other")
        attached = await client.create_session(document_id=source)
        assert (attached.num_tokens, attached.document_tokens) == (tokens, tokens)
        left = await client.truncate_session(source, 10)
        assert left.document_tokens == 10


async def test_full_quota_of_stored_bytes_is_told_as_one(model, document, state_url, kv_url):
    async with serving(model, state_url, kv_url, names=("a",)) as service:
        async with grpc.aio.insecure_channel(service.address) as channel:
            quota = admin_pb2.SetQuotaRequest(tenant="local", redis_bytes=1000)
            await admin_pb2_grpc.AdminServiceStub(channel).SetQuota(quota)
        session = (await service.client.create_session(recipe="recall")).session_id
        with pytest.raises(LimitExceeded) as caught:
            await service.client.append(session, document)
        assert caught.value.reason == "stored_bytes_quota"
        assert caught.value.metadata["quota"] == "stored_bytes"


async def test_a_drained_worker_hands_its_sessions_over(model, document, state_url, kv_url):
    async with serving(model, state_url, kv_url) as service:
        client = service.client
        sessions = [await service.loaded(document) for _ in range(3)]
        forks = [(await client.fork_session(each)).session_id for each in sessions]
        expected = [await service.ask(each) for each in sessions]
        holders = {(await client.get(each)).worker_id for each in forks}
        drained = holders.pop()
        await client.drain(drained, grace_s=PATIENCE_S)
        await service.workers[drained].wait_stopped()
        for fork, warm in zip(forks, expected, strict=True):
            answer = await service.ask(fork)
            assert (answer.token_ids, answer.logprobs) == (warm.token_ids, warm.logprobs)
            assert answer.finished.usage.recomputed_tokens == 0
            assert (await client.get(fork)).worker_id != drained


async def test_after_a_change_of_the_secret_nothing_old_is_left(model, document, state_url, kv_url):
    async with serving(model, state_url, kv_url, names=("a",)) as service:
        session = await service.loaded(document)
        untouched = await service.loaded(document[:900])
        with Redis.from_url(kv_url) as kv:
            old = set(kv.scan_iter("kv1:*"))
    assert old
    async with serving(model, state_url, kv_url, names=("b",), secret="1" * 32) as service:
        await service.ask(session)
        await service.client.close_session(session, purge=True)
        await service.client.close_session(untouched, purge=True)
        await nothing_is_left(kv_url)
