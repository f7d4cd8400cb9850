from __future__ import annotations

import asyncio

import pytest

from kvservice.errors import Unavailable
from kvservice.store.base import WorkerRecord
from kvservice.store.memory import MemoryStateStore
from kvservice.types import WorkerId
from kvservice.worker.registration import Registration

WORKER = WorkerId("worker-a")


class Clock:
    """Unix seconds that move only when the test says so; `sleep` returns once they have moved far enough."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        event = asyncio.Event()
        self._sleepers.append((self.now + seconds, event))
        await event.wait()

    async def advance(self, seconds: float) -> None:
        """Moves on and lets what was woken run until it sleeps again."""
        self.now += seconds
        woken = [event for wakes_at, event in self._sleepers if wakes_at <= self.now]
        self._sleepers = [sleeper for sleeper in self._sleepers if sleeper[1] not in woken]
        for event in woken:
            event.set()
        while woken and not self._sleepers:
            await asyncio.sleep(0)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(clock):
    return MemoryStateStore(clock)


@pytest.fixture
async def registration(store, clock):
    registration = Registration(store, WORKER, 9.0, clock.sleep)
    await registration.start("127.0.0.1:1")
    # The renewal begins its first sleep.
    await asyncio.sleep(0)
    yield registration
    await registration.stop()


async def test_a_worker_is_listed_while_its_lease_is_renewed(registration, store, clock):
    for _ in range(10):
        await clock.advance(3.0)
    assert await store.list_workers() == [WorkerRecord(WORKER, "127.0.0.1:1", 1)]
    assert registration.epoch == 1


async def test_a_stopped_worker_is_listed_no_more(registration, store):
    await registration.stop()
    assert await store.list_workers() == []
    await registration.stop()


async def test_a_lost_lease_is_taken_again_under_a_new_epoch(registration, store, clock, caplog):
    await store.unregister_worker(WORKER, 1)
    await clock.advance(3.0)
    assert await store.list_workers() == [WorkerRecord(WORKER, "127.0.0.1:1", 2)]
    assert registration.epoch == 2
    assert "lease_lost" in caplog.messages


async def test_a_store_that_is_away_is_tried_again(registration, store, clock, caplog, monkeypatch):
    async def away(*_):
        raise Unavailable("the state store can't be reached")

    with monkeypatch.context() as patch:
        patch.setattr(store, "renew_worker", away)
        await clock.advance(3.0)
    assert registration.num_failures == 1
    assert "lease_not_renewed" in caplog.messages
    await clock.advance(3.0)
    await clock.advance(8.0)
    assert registration.num_failures == 1
    assert len(await store.list_workers()) == 1


async def test_a_store_that_is_away_at_the_end_keeps_no_worker_from_stopping(registration, store, caplog, monkeypatch):
    async def away(*_):
        raise Unavailable("the state store can't be reached")

    monkeypatch.setattr(store, "unregister_worker", away)
    await registration.stop()
    assert "unregister_failed" in caplog.messages


async def test_a_store_that_is_away_at_the_start_ends_the_start(store, clock, monkeypatch):
    async def away(*_):
        raise Unavailable("the state store can't be reached")

    monkeypatch.setattr(store, "next_epoch", away)
    with pytest.raises(Unavailable):
        await Registration(store, WORKER, 9.0, clock.sleep).start("127.0.0.1:1")
