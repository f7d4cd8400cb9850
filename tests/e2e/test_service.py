"""The whole service as a user runs it: `kvservice serve`, real gRPC, real Redis, a tiny model of random weights."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager

import grpc
import psutil
import pytest
import pytest_asyncio

from kvservice.client import Client, LocalService
from kvservice.client.results import Tokens
from kvservice.config.recipes import RECIPES as RECIPES_BY_NAME
from kvservice.errors import BudgetTooSmall, Conflict, FailedPrecondition, LimitExceeded, NotFound, PromptTooLong
from kvservice.kernels import cpu
from kvservice.types import FinishReason, footprint
from kvservice.v1 import admin_pb2, admin_pb2_grpc

RECIPES = ("dense", "exact", "recall")
PATIENCE_S = 60.0

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from kvservice.models.tiny import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def arguments(model, *more):
    sizes = ("--kv-bytes", "48MiB", "--host-bytes", "64MiB", "--dtype", "fp32", "--threads", "1")
    return ["--model", str(model), "--log-level", "WARNING", *sizes, *more]


@pytest.fixture(scope="module")
def document():
    letters = random.Random(5)
    return "".join(letters.choice("abcdefghij klmnop.\n") for _ in range(900))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(model, tmp_path_factory):
    data_dir = str(tmp_path_factory.mktemp("data"))
    async with LocalService(arguments(model, "--data-dir", data_dir)) as service, Client(service.address) as client:
        yield client


async def loaded(client, recipe, document):
    session = (await client.create_session(recipe=recipe)).session_id
    appended = await client.append(session, document)
    return session, appended


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():
            await asyncio.sleep(0.05)


async def test_exact_and_dense_answer_alike_and_bytes_lie_where_the_recipe_says(client, document):
    answers = {}
    for recipe in RECIPES:
        session, appended = await loaded(client, recipe, document)
        assert appended.num_tokens == appended.durable_tokens == len(document)
        answer = await client.ask(session, "question? ", max_new_tokens=12, ignore_eos=True)
        answers[recipe] = (answer.token_ids, answer.finished.kv)
        assert answer.finished.usage.cached_tokens == len(document)
        assert answer.finished.durable_tokens == answer.finished.num_tokens == len(document) + 10 + 12
    assert answers["exact"][0] == answers["dense"][0]
    dense, exact, recall = (answers[recipe][1] for recipe in RECIPES)
    assert (dense.host_bytes, dense.index_bytes, dense.slot_bytes) == (0, 0, 0)
    assert exact.host_bytes == recall.host_bytes > 0
    # The CPU kernels read host memory where it lies: nothing moves.
    assert (exact.streamed_bytes > 0) == (cpu.isa() == "none")
    assert recall.recall_lookups > recall.recall_hits > 0
    stats = await client.stats()
    assert stats.sessions >= 3

    async def all_groups_are_in_redis():
        tier = (await client.stats()).workers[0].tier
        assert not tier.failures
        return tier.written_bytes > exact.host_bytes + recall.host_bytes

    await until(all_groups_are_in_redis)


async def test_an_answer_that_nobody_listens_to_any_more_frees_its_bytes_at_once(client, document):
    # A document of its own: blocks shared with another session are copied once they are written to, and stay so.
    document = document[::-1]
    session, _ = await loaded(client, "recall", document)
    before = (await client.stats()).workers[0]
    events = client.generate(session, "go on ", max_new_tokens=900, ignore_eos=True)
    num_read = 0
    async for event in events:
        num_read += len(event.token_ids) if isinstance(event, Tokens) else 0
        if num_read >= 100:
            break
    await events.aclose()

    async def idle():
        return (await client.stats()).workers[0].running_calls == 0

    await until(idle)
    after = (await client.stats()).workers[0]
    assert (after.window_bytes, after.index_bytes, after.host_bytes, after.device_free_bytes) == (
        before.window_bytes,
        before.index_bytes,
        before.host_bytes,
        before.device_free_bytes,
    )
    assert (await client.get(session)).num_tokens == len(document)
    answer = await client.ask(session, "and now? ", max_new_tokens=3, ignore_eos=True)
    assert answer.finished.usage.recomputed_tokens == 0


async def test_a_session_answers_one_question_at_a_time(client, document):
    session, _ = await loaded(client, "recall", document)
    events = client.generate(session, "go on ", max_new_tokens=500, ignore_eos=True)
    async for event in events:
        if isinstance(event, Tokens):
            break
    with pytest.raises(Conflict, match="session"):
        await client.ask(session, "me too ", max_new_tokens=1)
    await events.aclose()


async def test_a_repeated_request_is_answered_again_and_not_computed_again(client, document):
    session, _ = await loaded(client, "recall", document)
    first = await client.ask(session, "once ", request_id="r-1", max_new_tokens=5, temperature=0.9, ignore_eos=True)
    steps = (await client.stats()).workers[0].steps
    again = await client.ask(session, "once ", request_id="r-1", max_new_tokens=5, temperature=0.9, ignore_eos=True)
    assert again.token_ids == first.token_ids
    assert (await client.stats()).workers[0].steps == steps
    assert (await client.get(session)).num_tokens == len(document) + 5 + 5


async def test_what_cannot_be_served_is_refused_with_numbers_and_the_session_stays(client, document):
    session, _ = await loaded(client, "recall", document)
    with pytest.raises(PromptTooLong, match="2048"):
        await client.append(session, document * 2)
    with pytest.raises(FailedPrecondition, match="dense"):
        await client.ask(session, "x ", recipe="dense", max_new_tokens=1)
    with pytest.raises(NotFound, match="recipe"):
        await client.create_session(recipe="magic")
    exact = await client.ask(session, "x ", recipe="exact", max_new_tokens=2, ignore_eos=True)
    assert exact.started.recipe == "exact"
    assert exact.finished.finish_reason is FinishReason.LENGTH


def budget_for(folder, recipe, num_tokens):
    """The least `--kv-bytes` that holds one sequence of that many tokens."""
    import torch

    from kvservice.config.engine import EngineConfig
    from kvservice.engine import Engine
    from kvservice.engine.ports import NoWriter
    from kvservice.models.loader import load_model

    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    capacity = Engine(model, EngineConfig(kv_bytes=48 << 20), NoWriter()).headroom().device_capacity_bytes
    return (48 << 20) - capacity + footprint(model.spec.shape, RECIPES_BY_NAME[recipe], num_tokens).device_bytes


async def test_one_sequence_that_never_fits_is_told_what_it_needs(model, document):
    options = arguments(model, "--kv-bytes", str(budget_for(model, "recall", 500)))
    async with LocalService(options) as service, Client(service.address) as client:
        session = (await client.create_session(recipe="dense")).session_id
        with pytest.raises(BudgetTooSmall, match="device bytes"):
            await client.append(session, document)
        assert (await client.get(session)).num_tokens == 0
        session, appended = await loaded(client, "recall", document[:400])
        assert appended.durable_tokens == 0, "there is no --data-dir: nothing outlives this service"
        await client.ask(session, "x ", max_new_tokens=1)


async def test_sessions_outlive_the_worker_that_held_them(model, document):
    async with LocalService(arguments(model, "--workers", "2")) as service, Client(service.address) as client:

        async def both_are_there():
            return len((await client.stats()).workers) == 2

        await until(both_are_there)
        # Two documents: what the other session holds is of no use to this one.
        sessions = [(await loaded(client, "recall", text))[0] for text in (document, document[1:])]
        await client.ask(sessions[0], "x ", request_id="a", max_new_tokens=4, ignore_eos=True)
        holder = (await client.get(sessions[0])).worker_id

        async def all_turns_are_published():
            async with grpc.aio.insecure_channel(service.address) as channel:
                report = await admin_pb2_grpc.AdminServiceStub(channel).GetStats(admin_pb2.GetStatsRequest())
            # Both documents, and a question.
            return sum(worker.ledger.published_manifests for worker in report.workers) >= 3

        await until(all_turns_are_published)
        workers = psutil.Process(service.pid).children()
        # As an out-of-memory killer would.
        next(worker for worker in workers if f"{holder}.json" in " ".join(worker.cmdline())).kill()

        async def it_is_gone():
            return holder not in [worker.worker_id for worker in (await client.stats()).workers]

        await until(it_is_gone)
        answer = await client.ask(sessions[0], "y ", max_new_tokens=4, ignore_eos=True)
        # Brought back from Redis, window and all.
        assert answer.finished.usage.recomputed_tokens == 0
        assert answer.started.worker_id != holder


@asynccontextmanager
async def operated(model):
    """A client of a service of its own, and the operator's side."""
    async with (
        LocalService(arguments(model)) as service,
        Client(service.address) as client,
        grpc.aio.insecure_channel(service.address) as channel,
    ):
        yield client, admin_pb2_grpc.AdminServiceStub(channel)


async def test_stored_bytes_are_published_verified_and_purged_without_a_trace(model, document):
    async with operated(model) as (client, admin):

        async def verified():
            return await admin.Verify(admin_pb2.VerifyRequest(tenant="local"))

        async def is_published():
            return any(each.manifest_version for each in (await verified()).sessions)

        async def is_clean():
            left = await verified()
            return not left.sessions and left.stored_bytes == 0

        session, _ = await loaded(client, "recall", document)
        await until(is_published)
        found = await verified()
        (only,) = found.sessions
        assert (only.session_id, only.has_record, only.has_lease) == (session, True, True)
        assert only.named_frames == only.own_frames == found.checked_frames > 0
        assert (found.missing_frames, found.corrupt_frames, found.reserved_bytes) == (0, 0, 0)
        assert only.charged_bytes == found.stored_bytes > 0
        await client.ask(session, "and then?", max_new_tokens=4)
        (worker,) = (await admin.GetStats(admin_pb2.GetStatsRequest())).workers
        assert worker.ledger.held_sessions == 1
        assert not worker.ledger.failures
        await client.close_session(session, purge=True)
        await until(is_clean)


async def test_tenant_without_room_is_refused_and_told(model, document):
    async with operated(model) as (client, admin):
        await admin.SetQuota(admin_pb2.SetQuotaRequest(tenant="local", redis_bytes=1000))
        with pytest.raises(LimitExceeded, match="close sessions, or raise the quota"):
            await loaded(client, "recall", document)
        with pytest.raises(LimitExceeded, match="close sessions, or raise the quota"):
            await loaded(client, "dense", document)
        await admin.SetQuota(admin_pb2.SetQuotaRequest(tenant="local", redis_bytes=0))
        await loaded(client, "recall", document)
