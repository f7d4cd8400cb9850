"""The worker around a real engine with a tiny random model."""

from __future__ import annotations

import grpc
import pytest

from kvservice.config.engine import EngineConfig
from kvservice.config.worker import WorkerConfig
from kvservice.engine import Engine
from kvservice.engine.ports import NoWriter
from kvservice.internal.convert import sampling_to_proto
from kvservice.internal.v1 import worker_pb2
from kvservice.internal.v1.worker_pb2_grpc import WorkerServiceStub
from kvservice.models.tiny import tiny_model, write_tiny_checkpoint
from kvservice.models.tokenizer import Tokenizer
from kvservice.store.memory import MemoryStateStore
from kvservice.types import SamplingParams
from kvservice.worker.server import WorkerServer
from tests.unit.worker.conftest import GatewaySide

ENGINE_CONFIG = EngineConfig(kv_bytes=8 * 2**20, host_bytes=8 * 2**20, step_tokens=128)


@pytest.fixture
async def stub(tmp_path):
    tokenizer = Tokenizer.load(write_tiny_checkpoint(tmp_path))
    server = WorkerServer(
        WorkerConfig(),
        lambda: Engine(tiny_model(vocab_size=259), ENGINE_CONFIG, NoWriter()),
        tokenizer,
        MemoryStateStore(),
    )
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield WorkerServiceStub(channel)
    await server.stop()


async def tokens_of(stub, text, role):
    response = await stub.Tokenize(worker_pb2.TokenizeRequest(text=text, role=role, first=True))
    return list(response.token_ids)


@pytest.mark.parametrize("recipe", ["dense", "exact", "recall"])
async def test_a_document_is_read_and_questions_about_it_are_answered_from_held_kv(stub, recipe):
    gateway = GatewaySide(stub)
    await gateway.hello()
    document = await tokens_of(
        stub, "the quick brown fox jumps over the lazy dog. " * 15, worker_pb2.TEXT_ROLE_DOCUMENT
    )
    question = await tokens_of(stub, "who jumps?", worker_pb2.TEXT_ROLE_QUESTION)
    await gateway.submit("read", session_id="s", recipe=recipe, append=worker_pb2.AppendWork(token_ids=document))
    assert (await gateway.admission()).admitted
    *progress, read = [event async for event in gateway.events("read")]
    assert progress[-1].progress.done_tokens == len(document)
    assert list(read.done.appended_token_ids) == document

    sampling = sampling_to_proto(SamplingParams(max_new_tokens=8))
    work = worker_pb2.GenerateWork(prompt_token_ids=question, sampling=sampling)
    await gateway.submit("ask", session_id="s", recipe=recipe, base_token_ids=document, generate=work)
    assert (await gateway.admission()).admitted
    events = [event async for event in gateway.events("ask")]
    done = events[-1].done
    generated = [token for event in events for token in event.tokens.token_ids]
    assert done.usage.cached_tokens == len(document)
    assert done.usage.recomputed_tokens == 0
    assert list(done.appended_token_ids) == question + generated
    assert done.usage.completion_tokens == len(generated)
    assert (done.kv.bytes.host > 0) == (recipe != "dense")


async def test_a_call_that_can_never_fit_is_refused_and_says_so(stub):
    gateway = GatewaySide(stub)
    await gateway.hello()
    await gateway.submit("c1", append=worker_pb2.AppendWork(token_ids=[1] * 5000))
    refusal = (await gateway.admission()).refusal
    assert (refusal.code, refusal.reason, refusal.retryable) == ("INVALID_ARGUMENT", "prompt_too_long", False)
