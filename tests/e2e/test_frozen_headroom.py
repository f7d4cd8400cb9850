"""Two gateways whose hints stand still, and one real engine that is full: the worker alone admits."""

from __future__ import annotations

import asyncio

from kvservice.client import Client, RetryPolicy
from kvservice.config.engine import EngineConfig
from kvservice.config.gateway import GatewayConfig
from kvservice.config.recipes import DENSE
from kvservice.config.worker import WorkerConfig
from kvservice.engine import Engine
from kvservice.engine.ports import NoWriter
from kvservice.errors import Overloaded
from kvservice.gateway.server import Gateway
from kvservice.gateway.worker_link import WorkerLink
from kvservice.models.tiny import tiny_model, write_tiny_checkpoint
from kvservice.models.tokenizer import Tokenizer
from kvservice.store.memory import MemoryStateStore
from kvservice.types import footprint
from kvservice.worker.server import WorkerServer

FROZEN_S = 10.0
DOCUMENT_TOKENS = 600
SESSIONS = 8


class WatchedEngine(Engine):
    """Notes the least that was free, on device and host, after any step."""

    least_free = (0, 0)

    def step(self):
        events = super().step()
        ledger = self._sequences.ledger
        free = (ledger.device_free_bytes, ledger.host_free_bytes)
        self.least_free = tuple(min(pair) for pair in zip(self.least_free, free, strict=True))
        return events


async def connected(gateway: Gateway) -> None:
    while not gateway.fleet.views():
        await asyncio.sleep(0.02)


async def test_two_gateways_on_frozen_headroom_never_over_commit(tmp_path, monkeypatch) -> None:
    shape = tiny_model(vocab_size=259).spec.shape
    one = footprint(shape, DENSE, DOCUMENT_TOKENS + 40).device_bytes
    # Room for three of the eight sessions, beside the prefill workspace.
    config = EngineConfig(kv_bytes=3 * one + 3 * 2**20, host_bytes=one, step_tokens=128)
    engines: list[WatchedEngine] = []

    def make_engine() -> WatchedEngine:
        engines.append(WatchedEngine(tiny_model(vocab_size=259), config, NoWriter()))
        return engines[0]

    store = MemoryStateStore()
    worker = WorkerServer(WorkerConfig(), make_engine, Tokenizer.load(write_tiny_checkpoint(tmp_path)), store)
    await worker.start()
    settings = {"secret": b"0123456789abcdef", "port": 0, "discovery_interval_s": 0.05, "max_wait_s": 20.0}
    gateways = [Gateway(GatewayConfig(**settings), store, None) for _ in range(2)]
    addresses = [await gateway.start() for gateway in gateways]
    await asyncio.gather(*(connected(gateway) for gateway in gateways))
    once = RetryPolicy(max_attempts=1)
    update, loop = WorkerLink._update, asyncio.get_running_loop()
    thaw_at = loop.time() + FROZEN_S

    def frozen(link: WorkerLink, headroom) -> None:
        if loop.time() >= thaw_at:
            update(link, headroom)

    monkeypatch.setattr(WorkerLink, "_update", frozen)
    answered = refused = 0

    async def talk(client: Client, number: int) -> None:
        nonlocal answered, refused
        session = (await client.create_session(recipe="dense")).session_id
        try:
            await client.append(session, chr(97 + number) * DOCUMENT_TOKENS)
        except Overloaded:
            refused += 1
            return
        while loop.time() < thaw_at:
            try:
                await client.ask(session, "?", max_new_tokens=4, ignore_eos=True)
                answered += 1
            except Overloaded:
                refused += 1
            await asyncio.sleep(0.05)

    async with Client(addresses[0], retry=once) as first, Client(addresses[1], retry=once) as second:
        await asyncio.gather(*(talk((first, second)[i % 2], i) for i in range(SESSIONS)))
    for gateway in gateways:
        await gateway.stop()
    assert engines[0].least_free >= (0, 0)
    engines[0]._sequences.check()
    await worker.stop()
    await store.aclose()
    assert answered > SESSIONS
