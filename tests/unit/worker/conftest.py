"""A worker around a scripted engine, and a gateway's side of its stream."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest

from kvservice.config.worker import WorkerConfig
from kvservice.internal.convert import sampling_to_proto
from kvservice.internal.v1 import worker_pb2
from kvservice.internal.v1.worker_pb2_grpc import WorkerServiceStub
from kvservice.store.memory import MemoryStateStore
from kvservice.types import Grammar, SamplingParams
from kvservice.worker.server import WorkerServer
from tests.unit.worker.scripted_engine import ScriptedEngine, ToyTokenizer


class GatewaySide:
    """One Connect stream, as a gateway uses it."""

    def __init__(self, stub: WorkerServiceStub, gateway_id: str = "gateway-0") -> None:
        self.call = stub.Connect()
        self.gateway_id = gateway_id

    async def hello(self) -> worker_pb2.ConnectResponse:
        await self.call.write(worker_pb2.ConnectRequest(hello=worker_pb2.Hello(gateway_id=self.gateway_id)))
        return await self.read()

    async def read(self) -> worker_pb2.ConnectResponse:
        message = await asyncio.wait_for(self.call.read(), 20)
        assert message is not grpc.aio.EOF, await self.call.code()
        return message

    async def send(self, **command: object) -> None:
        await self.call.write(worker_pb2.ConnectRequest(**command))

    async def generate(self, call_id: str, text: str, **sampling: object) -> None:
        """Submits a call that the scripted engine answers with `text`, over and over."""
        work = worker_pb2.GenerateWork(
            prompt_token_ids=[ord(character) for character in text],
            sampling=sampling_to_proto(SamplingParams(**{"max_new_tokens": len(text), **sampling})),
        )
        await self.submit(call_id, generate=work)

    async def submit(self, call_id: str, **fields: object) -> None:
        values = {"session_id": f"session-{call_id}", "recipe": "dense", "retain": True, **fields}
        await self.send(submit=worker_pb2.Submit(call_id=call_id, **values))

    async def read_to_the_end(self) -> None:
        while await asyncio.wait_for(self.call.read(), 20) is not grpc.aio.EOF:
            pass

    async def admission(self) -> worker_pb2.Admission:
        message = await self.read()
        while message.WhichOneof("event") == "step" and not message.step.events:
            # Bytes were freed elsewhere, and everybody is told.
            message = await self.read()
        assert message.WhichOneof("event") == "admission", message
        return message.admission

    async def events(self, call_id: str) -> AsyncIterator[worker_pb2.CallEvent]:
        """The call's events up to its last."""
        while True:
            message = await self.read()
            for event in message.step.events:
                if event.call_id == call_id:
                    yield event
                    if event.WhichOneof("event") in ("done", "failure"):
                        return

    async def answer(self, call_id: str) -> tuple[str, worker_pb2.CallEvent]:
        """The call's text and its last event."""
        events = [event async for event in self.events(call_id)]
        return "".join(event.tokens.text for event in events), events[-1]


class Running:
    """A started worker and all that a test may want to hold of it."""

    def __init__(
        self, server: WorkerServer, engine: ScriptedEngine, tokenizer: ToyTokenizer, store: MemoryStateStore
    ) -> None:
        self.server = server
        self.engine = engine
        self.tokenizer = tokenizer
        self.store = store
        self.channel = grpc.aio.insecure_channel(server.address)
        self.stub = WorkerServiceStub(self.channel)

    async def connect(self) -> GatewaySide:
        gateway = GatewaySide(self.stub)
        await gateway.hello()
        return gateway


StartWorker = Callable[..., Awaitable[Running]]


@pytest.fixture
async def start_worker() -> AsyncIterator[StartWorker]:
    """Starts workers; stops them after the test."""
    running: list[Running] = []

    async def start(
        *, step_by_step: bool = False, compile_grammar: Callable[[Grammar], object] | None = None, **settings: object
    ) -> Running:
        if step_by_step:
            settings.setdefault("stream_queue_messages", 1_000_000)
        engines: list[ScriptedEngine] = []

        def make_engine() -> ScriptedEngine:
            engine = ScriptedEngine()
            if step_by_step:
                engine.permits = threading.Semaphore(0)
            engines.append(engine)
            return engine

        store, tokenizer = MemoryStateStore(), ToyTokenizer()
        config = WorkerConfig(worker_id="worker-a", **settings)
        server = WorkerServer(config, make_engine, tokenizer, store, compile_grammar)
        await server.start()
        running.append(Running(server, engines[0], tokenizer, store))
        return running[-1]

    yield start
    for worker in running:
        if worker.engine.permits is not None:
            permits, worker.engine.permits = worker.engine.permits, None
            permits.release()
        await worker.channel.close()
        await worker.server.stop()
        await worker.store.aclose()
        assert worker.engine.closed


@pytest.fixture
async def worker(start_worker: StartWorker) -> Running:
    """A worker with its defaults."""
    return await start_worker()
