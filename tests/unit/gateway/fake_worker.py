"""A scripted worker behind a real gRPC server: no model, one token a byte. Stands in for `kvservice.worker` in tests.

What it answers is a function of the seed, so that a repeated call gives the same tokens.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from kvservice.internal import convert
from kvservice.internal.v1 import worker_pb2, worker_pb2_grpc
from kvservice.store.base import StateStore, WorkerRecord
from kvservice.types import Headroom, ModelInfo, ModelShape, WorkerId
from kvservice.v1 import admin_pb2, common_pb2

SHAPE = ModelShape(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    hidden_size=64,
    intermediate_size=128,
    vocab_size=256,
    max_positions=2000,
)
MODEL = ModelInfo("toy", SHAPE, ("dense", "exact", "recall"), "recall", "a fake")
ROOMY = Headroom(
    device_capacity_bytes=1 << 30,
    device_free_bytes=1 << 30,
    device_freeable_bytes=1 << 30,
    host_capacity_bytes=1 << 30,
    host_free_bytes=1 << 30,
    host_freeable_bytes=1 << 30,
)
OVERLOADED = worker_pb2.Failure(
    code="RESOURCE_EXHAUSTED", reason="overloaded", message="no room at the moment", retryable=True
)


def answer_tokens(seed: int, num_tokens: int) -> list[int]:
    """What the fake answers; answer `i` of several as if its seed were `i` more."""
    return [ord("a") + (seed + i) % 26 for i in range(num_tokens)]


def token_chunk(token_id: int, index: int, sampling: common_pb2.SamplingParams) -> common_pb2.TokenChunk:
    """One token; the log-probability of each is minus its number."""
    chunk = common_pb2.TokenChunk(token_ids=[token_id], text=chr(token_id), index=index)
    if sampling.HasField("logprobs"):
        logprobs = chunk.logprobs.add()
        logprobs.chosen.CopyFrom(common_pb2.TokenLogprob(token_id=token_id, logprob=-token_id))
        logprobs.top.extend(common_pb2.TokenLogprob(token_id=i, logprob=-i) for i in range(sampling.logprobs))
    return chunk


@dataclass
class Running:
    """A call that the fake has admitted."""

    submit: worker_pb2.Submit
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """Set the attributes to script it."""

    def __init__(self, worker_id: str = "w1", *, model: ModelInfo = MODEL, headroom: Headroom = ROOMY) -> None:
        self.worker_id = WorkerId(worker_id)
        self.model = model
        self.headroom = headroom
        self.address = ""
        self.epoch = 0
        self.refusals: deque[worker_pb2.Failure] = deque()
        """Answers to the next submissions; when it is empty, calls are admitted."""
        self.failures: deque[worker_pb2.Failure] = deque()
        """How the next admitted calls end, instead of well."""
        self.pause_after: int | None = None
        """Tokens (or progress events) after which a call waits for `go` or for its cancellation."""
        self.done_byte_s = (0.0, 0.0)
        """On the device and in host memory: of each call that ends well, and of what is released."""
        self.released_byte_s = (0.0, 0.0)
        self.selects_from: int | None = None
        """The first token of each session that is computed with a selection."""
        self.go = asyncio.Event()
        self.submits: list[worker_pb2.Submit] = []
        self.cancels: list[str] = []
        self.releases: list[worker_pb2.Release] = []
        self.tokenized: list[worker_pb2.TokenizeRequest] = []
        self.drains: list[worker_pb2.DrainRequest] = []
        self.forks: list[worker_pb2.ForkRequest] = []
        self.hand_overs: list[worker_pb2.HandOverRequest] = []
        self.lets_go = asyncio.Event()
        """A worker that hands nothing over until it is set again."""
        self.lets_go.set()
        self.running: dict[str, Running] = {}
        self.news = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._outgoing: list[asyncio.Queue[worker_pb2.ConnectResponse]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, store: StateStore) -> None:
        """Serves, and registers under a lease."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.http2.max_ping_strikes", 0)])
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.address = f"127.0.0.1:{port}"
        self.epoch = await store.next_epoch()
        await store.register_worker(WorkerRecord(self.worker_id, self.address, self.epoch), 3600.0)

    async def kill(self) -> None:
        """Ends at once, as a process that was killed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(None)

    def show(self, headroom: Headroom) -> None:
        """Tells every gateway of another headroom."""
        self.headroom = headroom
        for outgoing in self._outgoing:
            self._send(outgoing, worker_pb2.ConnectResponse(step=worker_pb2.Step()))

    async def wait_for(self, what: str, count: int = 1) -> None:
        """Waits until the list `what` has `count` entries."""
        async with asyncio.timeout(10):
            while len(getattr(self, what)) < count:
                self.news.clear()
                await self.news.wait()

    # The service

    async def Connect(
        self, request_iterator: AsyncIterator[worker_pb2.ConnectRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.ConnectResponse]:
        outgoing: asyncio.Queue[worker_pb2.ConnectResponse] = asyncio.Queue()
        self._outgoing.append(outgoing)
        reader = asyncio.create_task(self._read(request_iterator, outgoing))
        self._tasks.add(reader)
        try:
            while True:
                yield await outgoing.get()
        finally:
            self._outgoing.remove(outgoing)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def Tokenize(
        self, request: worker_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.TokenizeResponse:
        self.tokenized.append(request)
        if request.messages:
            texts = [message.content.encode() for message in request.messages]
            before = b"".join(texts[:-1])
            return worker_pb2.TokenizeResponse(token_ids=before + texts[-1], num_document_tokens=len(before))
        return worker_pb2.TokenizeResponse(token_ids=request.text.encode())

    async def GetStats(
        self, request: worker_pb2.GetStatsRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.GetStatsResponse:
        stats = admin_pb2.WorkerStats(
            worker_id=self.worker_id, address=self.address, epoch=self.epoch, model=self.model.name, device="none"
        )
        stats.resident_sessions = len({submit.session_id for submit in self.submits})
        stats.tier.failures["timeout"] = 3
        return worker_pb2.GetStatsResponse(stats=stats)

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.DrainResponse:
        self.drains.append(request)
        return worker_pb2.DrainResponse(running_calls=len(self.running))

    async def Fork(self, request: worker_pb2.ForkRequest, context: grpc.aio.ServicerContext) -> worker_pb2.ForkResponse:
        self.forks.append(request)
        return worker_pb2.ForkResponse(is_held=not request.stored_only, is_stored=True)

    async def HandOver(
        self, request: worker_pb2.HandOverRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.HandOverResponse:
        self.hand_overs.append(request)
        self.news.set()
        await self.lets_go.wait()
        return worker_pb2.HandOverResponse(is_stored=True)

    # Its inside

    def _send(self, outgoing: asyncio.Queue[worker_pb2.ConnectResponse], message: worker_pb2.ConnectResponse) -> None:
        message.headroom.CopyFrom(convert.headroom_to_proto(self.headroom))
        outgoing.put_nowait(message)

    async def _read(
        self,
        requests: AsyncIterator[worker_pb2.ConnectRequest],
        outgoing: asyncio.Queue[worker_pb2.ConnectResponse],
    ) -> None:
        async for request in requests:
            kind = request.WhichOneof("command")
            if kind == "hello":
                welcome = worker_pb2.Welcome(
                    worker_id=self.worker_id, epoch=self.epoch, model=convert.model_to_proto(self.model)
                )
                self._send(outgoing, worker_pb2.ConnectResponse(welcome=welcome))
            elif kind == "submit":
                self._submitted(request.submit, outgoing)
            elif kind == "cancel":
                self.cancels.append(request.cancel.call_id)
                if request.cancel.call_id in self.running:
                    self.running[request.cancel.call_id].cancelled.set()
            elif kind == "release":
                self.releases.append(request.release)
                released = worker_pb2.Released(
                    session_id=request.release.session_id, freed_device_bytes=10, freed_host_bytes=20
                )
                released.device_byte_s, released.host_byte_s = self.released_byte_s
                self._send(outgoing, worker_pb2.ConnectResponse(released=released))
            self.news.set()

    def _submitted(self, submit: worker_pb2.Submit, outgoing: asyncio.Queue[worker_pb2.ConnectResponse]) -> None:
        self.submits.append(submit)
        admission = worker_pb2.Admission(call_id=submit.call_id, admitted=not self.refusals)
        if self.refusals:
            admission.refusal.CopyFrom(self.refusals.popleft())
        else:
            self.running[submit.call_id] = Running(submit)
            task = asyncio.create_task(self._run(self.running[submit.call_id], outgoing))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._send(outgoing, worker_pb2.ConnectResponse(admission=admission))

    async def _run(self, call: Running, outgoing: asyncio.Queue[worker_pb2.ConnectResponse]) -> None:
        submit = call.submit
        produced: list[int] = []
        steps = self._steps(submit)
        for done, event in enumerate(steps):
            if done == self.pause_after:
                await self._go_or_cancel(call)
            if call.cancelled.is_set():
                break
            if event.tokens.index == 0:
                produced.extend(event.tokens.token_ids)
            self._event(outgoing, event)
        del self.running[submit.call_id]
        if self.failures:
            self._event(outgoing, worker_pb2.CallEvent(call_id=submit.call_id, failure=self.failures.popleft()))
        else:
            self._event(outgoing, self._done(call, produced))

    async def _go_or_cancel(self, call: Running) -> None:
        waits = [asyncio.create_task(self.go.wait()), asyncio.create_task(call.cancelled.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _steps(self, submit: worker_pb2.Submit) -> list[worker_pb2.CallEvent]:
        if submit.HasField("append"):
            total = len(submit.append.token_ids)
            return [
                worker_pb2.CallEvent(
                    call_id=submit.call_id, progress=worker_pb2.Progress(done_tokens=done, total_tokens=total)
                )
                for done in (total // 2, total)
            ]
        sampling = submit.generate.sampling
        answers = [answer_tokens(sampling.seed + index, sampling.max_new_tokens) for index in range(sampling.n)]
        return [
            worker_pb2.CallEvent(call_id=submit.call_id, tokens=token_chunk(token_ids[i], index, sampling))
            for i in range(sampling.max_new_tokens)
            for index, token_ids in enumerate(answers)
        ]

    def _done(self, call: Running, produced: list[int]) -> worker_pb2.CallEvent:
        submit = call.submit
        given = [*submit.append.token_ids, *submit.generate.document_token_ids, *submit.generate.prompt_token_ids]
        appended = [*given, *produced]
        reason = common_pb2.FINISH_REASON_LENGTH
        if call.cancelled.is_set():
            reason = common_pb2.FINISH_REASON_CANCELLED
            if not submit.generate.keep_partial:
                appended = []
        done = worker_pb2.Done(
            finish_reasons=[reason] * max(1, submit.generate.sampling.n),
            appended_token_ids=appended if submit.retain else [],
            prefill_ms=1.5,
            decode_ms=2.5,
        )
        if submit.retain and self.selects_from is not None:
            held = len(submit.base_token_ids) + len(appended)
            done.reached.num_computed = held
            done.reached.selected.extend((self.selects_from, held))
        done.usage.cached_tokens = len(submit.base_token_ids)
        done.usage.prompt_tokens = len(given)
        done.usage.completion_tokens = len(produced)
        done.kv.bytes.device_window = 4096
        done.device_byte_s, done.host_byte_s = self.done_byte_s
        return worker_pb2.CallEvent(call_id=submit.call_id, done=done)

    def _event(self, outgoing: asyncio.Queue[worker_pb2.ConnectResponse], event: worker_pb2.CallEvent) -> None:
        self._send(outgoing, worker_pb2.ConnectResponse(step=worker_pb2.Step(events=[event])))
