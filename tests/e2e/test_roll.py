"""Workers of two models' weights under one name, as in the middle of a roll: what only the old ones could read."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from kvservice.cli import compose
from kvservice.client import Client
from kvservice.config.gateway import GatewayConfig
from kvservice.config.worker import WorkerConfig
from kvservice.gateway.server import Gateway
from kvservice.models.tiny import write_tiny_checkpoint
from kvservice.store.redis import RedisStateStore

PATIENCE_S = 120.0


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    """Rounds are this test's to begin."""
    monkeypatch.setattr("kvservice.gateway.server.REFRESH_INTERVAL_S", 3600.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same name, other weights."""
    root = tmp_path_factory.mktemp("roll")
    return {name: write_tiny_checkpoint(root / name / "tiny", seed) for seed, name in enumerate(("old", "new"))}


@pytest.fixture(scope="module")
def document():
    letters = random.Random(3)
    return "".join(letters.choice("abcdefghij klmnop.\n") for _ in range(900))


class Roll:
    """A gateway, and workers that come and go."""

    def __init__(self, stack: AsyncExitStack, store, kv_url: str, folders) -> None:
        self.gateway = Gateway(
            GatewayConfig(secret="0" * 32, port=0, discovery_interval_s=0.05, refresh_tokens_per_s=1e6), store
        )
        self.client: Client
        self._stack, self._store, self._kv_url, self._folders = stack, store, kv_url, folders

    async def start(self, name: str):
        config = WorkerConfig(
            worker_id=name,
            model=str(self._folders[name]),
            deterministic=True,
            redis_url=self._kv_url,
            drain_grace_s=1.0,
            kv_bytes=16 << 20,
            host_bytes=32 << 20,
            dtype="fp32",
            threads=1,
        )
        worker = await compose.worker(config, self._store, self._stack)
        await worker.start()
        await self._until(lambda: name in self._connected())
        return worker

    async def drain(self, worker, name: str) -> None:
        await self.client.drain(name, grace_s=PATIENCE_S)
        await worker.wait_stopped()
        await self._until(lambda: name not in self._connected())

    async def misses(self) -> int:
        """Sessions whose stored KV was of another fingerprint."""
        return sum(worker.ledger.misses.get("fingerprint", 0) for worker in (await self.client.stats()).workers)

    def _connected(self) -> set[str]:
        return {view.worker_id for view in self.gateway.fleet.views()}

    async def _until(self, condition) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.02)


@asynccontextmanager
async def rolling(folders, state_url, kv_url):
    async with AsyncExitStack() as stack:
        store = RedisStateStore(state_url)
        stack.push_async_callback(store.aclose)
        roll = Roll(stack, store, kv_url, folders)
        stack.push_async_callback(roll.gateway.stop)
        roll.client = await stack.enter_async_context(Client(await roll.gateway.start()))
        yield roll


async def _loaded(client: Client, document: str) -> tuple[str, int]:
    session = (await client.create_session(recipe="recall")).session_id
    await client.append(session, document)
    answer = await client.ask(session, "first question? ", max_new_tokens=6, ignore_eos=True)
    return session, answer.finished.num_tokens


async def test_both_kinds_of_kv_are_served_and_what_is_left_of_the_old_is_computed_again(
    folders, document, state_url, kv_url
):
    async with rolling(folders, state_url, kv_url) as roll:
        old = await roll.start("old")
        at_its_next_call, held = await _loaded(roll.client, document)
        beside, _ = await _loaded(roll.client, document[::-1])
        await roll.start("new")
        # Both are there: a session stays where its KV is of use.
        answer = await roll.client.ask(at_its_next_call, "second? ", max_new_tokens=6, ignore_eos=True)
        assert answer.started.worker_id == "old"
        assert answer.finished.usage.recomputed_tokens == 0
        await roll.drain(old, "old")

        answer = await roll.client.ask(at_its_next_call, "third? ", max_new_tokens=6, ignore_eos=True)
        assert answer.started.worker_id == "new"
        assert answer.finished.usage.recomputed_tokens >= held
        assert await roll.misses() >= 1

        # The other one is computed again beside calls, once, and no token of it changes.
        before = await roll.client.get(beside)
        assert await roll.gateway.refresher.round() == 1
        assert await roll.gateway.refresher.round() == 0
        assert roll.gateway.levels().refreshed_tokens >= before.num_tokens - 1
        after = await roll.client.get(beside)
        assert (after.num_tokens, after.worker_id) == (before.num_tokens, "new")
        answer = await roll.client.ask(beside, "third? ", max_new_tokens=6, ignore_eos=True)
        assert answer.finished.usage.recomputed_tokens == 0


async def test_what_a_worker_holds_or_can_read_is_left_alone(folders, document, state_url, kv_url):
    async with rolling(folders, state_url, kv_url) as roll:
        old = await roll.start("old")
        held, _ = await _loaded(roll.client, document)
        assert await roll.gateway.refresher.round() == 0
        await roll.drain(old, "old")
        # One of the same model: the stored KV is good.
        again = await roll.start("old")
        assert await roll.gateway.refresher.round() == 0
        answer = await roll.client.ask(held, "second? ", max_new_tokens=6, ignore_eos=True)
        assert answer.finished.usage.recomputed_tokens == 0
        await again.stop()
