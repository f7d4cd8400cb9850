"""A gateway over the memory store and scripted workers, all over loopback gRPC."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest

from kvservice.client import Client, RetryPolicy
from kvservice.config.api_keys import ApiKey, ApiKeys
from kvservice.config.gateway import GatewayConfig
from kvservice.gateway.server import Gateway
from kvservice.store.base import StateStore
from kvservice.store.memory import MemoryStateStore
from kvservice.types import Role
from kvservice.v1 import inference_pb2_grpc, sessions_pb2_grpc
from tests.unit.gateway.fake_worker import FakeWorker

SECRET = b"0123456789abcdef"
ONCE = RetryPolicy(max_attempts=1)


class Clock:
    """Unix seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Service:
    """A running gateway and what is around it."""

    def __init__(self, gateway: Gateway, store: StateStore, workers: list[FakeWorker], clock: Clock) -> None:
        self.gateway = gateway
        self.store = store
        self.workers = workers
        self.clock = clock
        self.address = ""
        self._stack = AsyncExitStack()

    @property
    def worker(self) -> FakeWorker:
        """The only worker."""
        return self.workers[0]

    async def start(self) -> None:
        self.address = await self.gateway.start()
        await self.connected(len(self.workers))

    async def connected(self, num_workers: int) -> None:
        """Waits until the gateway has found that many workers."""
        await eventually(lambda: len(self.gateway.fleet.views()) == num_workers)

    async def client(self, api_key: str | None = None, retry: RetryPolicy = ONCE) -> Client:
        return await self._stack.enter_async_context(Client(self.address, api_key, retry=retry))

    async def channel(self) -> grpc.aio.Channel:
        return await self._stack.enter_async_context(grpc.aio.insecure_channel(self.address))

    async def sessions(self) -> Any:
        return sessions_pb2_grpc.SessionServiceStub(await self.channel())

    async def inference(self) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(await self.channel())

    async def aclose(self) -> None:
        await self._stack.aclose()


async def eventually(condition: Callable[[], bool] | Callable[[], Awaitable[bool]]) -> None:
    """Waits until `condition` holds: for what only shows from outside."""
    async with asyncio.timeout(10):
        while True:
            held = condition()
            if held if isinstance(held, bool) else await held:
                return
            await asyncio.sleep(0.005)


def keys(*entries: tuple[str, str, Role]) -> ApiKeys:
    return ApiKeys(
        keys=tuple(
            ApiKey(sha256=hashlib.sha256(key.encode()).hexdigest(), tenant=tenant, role=role)
            for key, tenant, role in entries
        )
    )


def config(**settings: Any) -> GatewayConfig:
    return GatewayConfig(**{"secret": SECRET, "port": 0, "discovery_interval_s": 0.02, **settings})


@asynccontextmanager
async def running(
    workers: list[FakeWorker] | None = None,
    api_keys: ApiKeys | None = None,
    store: StateStore | None = None,
    **settings: Any,
) -> AsyncIterator[Service]:
    clock = Clock()
    if store is None:
        store = MemoryStateStore(clock)
    else:
        # Redis has a clock of its own.
        clock.now = time.time()
    workers = [FakeWorker()] if workers is None else workers
    gateway = Gateway(config(**settings), store, api_keys, clock=clock)
    service = Service(gateway, store, workers, clock)
    try:
        for worker in workers:
            await worker.start(store)
        await service.start()
        yield service
    finally:
        await service.aclose()
        await gateway.stop()
        for worker in workers:
            await worker.kill()


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with running() as service:
        yield service
