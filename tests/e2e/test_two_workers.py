"""Sessions that placement sends from worker to worker, and servers that are lost under load: no answer changes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from dataclasses import dataclass
from itertools import pairwise

import pytest
from redis import Redis

from kvservice.client import RetryPolicy
from kvservice.errors import KVServiceError
from kvservice.gateway import admission, leaving, placement
from kvservice.store.embedded import EmbeddedRedis, RedisRole
from kvservice.worker import publishing
from tests.e2e.test_moves import PATIENCE_S, Service, serving

SESSIONS = 8
SOME = 4
"""Of them: for what takes time."""
QUESTIONS = ("who was it? ", "and where, if at all, did they go from there? ", "why? ", "and what came of it? ")
SMALL = {"kv_bytes": 3 << 20, "host_bytes": 3 << 20}
"""For each worker: too little for eight sessions, on the device and in host memory."""
MODEL = os.environ.get("KVSERVICE_TEST_MODEL")
"""Another model than the tiny one: its folder."""


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """What is asked here must be answered alike on a machine that others keep busy."""
    monkeypatch.setattr(publishing, "BEGIN_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(leaving, "HAND_OVER_S", PATIENCE_S)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from kvservice.models.tiny import write_tiny_checkpoint

    return MODEL or write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def documents():
    letters = random.Random(5)
    return ["".join(letters.choice("abcdefghij klmnop.\n") for _ in range(900)) for _ in range(SESSIONS)]


@dataclass(frozen=True)
class Turn:
    """What is compared of an answer."""

    token_ids: tuple[int, ...]
    logprobs: object
    num_tokens: int

    @classmethod
    def of(cls, answer) -> Turn:
        return cls(tuple(answer.token_ids), answer.logprobs, answer.finished.num_tokens)


async def undisturbed(model, state_url, kv_url, documents) -> list[list[Turn]]:
    """What each session answers on one worker with room for all, one at a time."""
    async with serving(model, state_url, kv_url, names=("alone",)) as service:
        turns = []
        for document in documents:
            session = await service.loaded(document)
            turns.append([Turn.of(await service.ask(session, question)) for question in QUESTIONS])
            await service.client.close_session(session, purge=True)
    return turns


@pytest.fixture
def leave(monkeypatch):
    """A switch: from now on placement asks the worker that holds a session last."""

    def switch(on: bool) -> None:
        def ranked(request, fleet):
            found = placement.ranked(request, fleet)
            return sorted(found, key=lambda worker: worker.holds(request)) if on else found

        monkeypatch.setattr(admission, "ranked", ranked)

    return switch


async def holders(service: Service, sessions: list[str]) -> list[str]:
    return [(await service.client.get(each)).worker_id for each in sessions]


@pytest.mark.parametrize("recipe", ["recall", "exact", "dense"])
async def test_a_turn_that_no_manifest_names_yet_goes_with_its_session(
    model, documents, state_url, kv_url, leave, monkeypatch, recipe
):
    async with serving(model, state_url, kv_url, names=("alone",)) as service:
        session = await service.loaded(documents[0], recipe)
        expected = [Turn.of(await service.ask(session, question)) for question in QUESTIONS]
    # Nothing is published but what is handed over.
    monkeypatch.setattr(publishing.Publisher, "_start", lambda _, work: work.close())
    async with serving(model, state_url, kv_url) as service:
        session = await service.loaded(documents[0], recipe)
        leave(True)
        seen = await holders(service, [session])
        for question, turn in zip(QUESTIONS, expected, strict=True):
            answer = await service.ask(session, question)
            assert Turn.of(answer) == turn
            seen += await holders(service, [session])
        assert all(before != after for before, after in pairwise(seen))
        assert (await service.resumed()).restored_tokens > 0


async def test_a_turn_that_is_lost_with_its_worker_is_computed_again_as_it_was(
    model, documents, state_url, kv_url, monkeypatch
):
    async with serving(model, state_url, kv_url, names=("alone",)) as service:
        session = await service.loaded(documents[0])
        expected = [Turn.of(await service.ask(session, question)) for question in QUESTIONS]
    # No manifest says anything.
    monkeypatch.setattr(publishing.Publisher, "_start", lambda _, work: work.close())
    async with serving(model, state_url, kv_url) as service:
        session = await service.loaded(documents[0])
        assert Turn.of(await service.ask(session, QUESTIONS[0])) == expected[0]
        (holder,) = await holders(service, [session])
        await service.workers[holder].stop()
        answer = await service.ask(session, QUESTIONS[1])
        assert Turn.of(answer) == expected[1]
        assert answer.finished.usage.recomputed_tokens > 0


async def test_eight_sessions_answer_as_alone_while_placement_sends_them_from_worker_to_worker(
    model, documents, state_url, kv_url, leave
):
    """Too little device and host memory: cold, warm, resumed, moved and forked sessions, all of them beside others."""
    expected = await undisturbed(model, state_url, kv_url, documents)
    async with serving(model, state_url, kv_url, **SMALL) as service:
        client = service.client
        sessions = list(await asyncio.gather(*(service.loaded(document) for document in documents)))
        moves = 0
        for number, question in enumerate(QUESTIONS):
            # By turns: as placement finds best, and away from who holds them.
            leave(number % 2 == 0)
            forks = [(await client.fork_session(each)).session_id for each in sessions]
            before = await holders(service, sessions)
            answers = await asyncio.gather(*(service.ask(each, question) for each in (*sessions, *forks)))
            for index, answer in enumerate(answers):
                assert Turn.of(answer) == expected[index % SESSIONS][number]
            after = await holders(service, sessions)
            moves += sum(old != new for old, new in zip(before, after, strict=True))
            await asyncio.gather(*(client.close_session(each, purge=True) for each in forks))
            if number == 1:
                await asyncio.gather(*(client.move_session(each) for each in sessions))
        assert moves >= SESSIONS
        assert await service.evicted()
        assert (await service.resumed()).restored_tokens > 0


async def test_kv_that_is_flushed_under_load_costs_time_and_no_answer(model, documents, state_url, kv_url):
    expected = await undisturbed(model, state_url, kv_url, documents[:SOME])
    async with serving(model, state_url, kv_url, **SMALL) as service:
        client = service.client
        sessions = await asyncio.gather(*(service.loaded(document) for document in documents[:SOME]))
        recomputed = 0

        async def talk(index: int) -> None:
            nonlocal recomputed
            for number, question in enumerate(QUESTIONS):
                answer = await service.ask(sessions[index], question)
                assert Turn.of(answer) == expected[index][number]
                recomputed += answer.finished.usage.recomputed_tokens
                # Behind every answer, while the others are asked.
                with Redis.from_url(kv_url) as kv:
                    kv.flushall()
                await client.move_session(sessions[index])

        await asyncio.gather(*(talk(index) for index in range(SOME)))
        assert recomputed > 0
        assert (await service.resumed()).misses["absent"] > 0


async def test_state_that_is_killed_under_load_and_started_from_its_file_loses_nothing_durable(
    model, documents, state_url, kv_url, tmp_path
):
    expected = await undisturbed(model, state_url, kv_url, documents[:SOME])
    with EmbeddedRedis(RedisRole.STATE, data_dir=tmp_path) as state:
        async with serving(model, state.url, kv_url, retry=RetryPolicy(max_attempts=2), **SMALL) as service:
            sessions = await asyncio.gather(*(service.loaded(document) for document in documents[:SOME]))
            under_load, failed = asyncio.Event(), asyncio.Event()

            async def talk(index: int) -> None:
                durable = (await service.client.get(sessions[index])).durable_tokens
                for number, question in enumerate(QUESTIONS):
                    turn = expected[index][number]
                    while True:
                        try:
                            answer = await service.ask(sessions[index], question)
                        except KVServiceError:
                            failed.set()
                            held = await num_tokens(service, sessions[index])
                            assert held >= durable
                            if held == turn.num_tokens:
                                break  # It was written down, and only its answer lost.
                            continue
                        assert Turn.of(answer) == turn
                        durable = answer.finished.durable_tokens
                        assert durable == turn.num_tokens
                        break
                    under_load.set()

            async def kill() -> None:
                await under_load.wait()
                os.kill(state.pid, signal.SIGKILL)
                # Whoever is asked meanwhile is told so.
                await failed.wait()
                state.stop()
                state.start()

            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(kill(), *(talk(index) for index in range(SOME)))
            assert [await num_tokens(service, each) for each in sessions] == [
                turns[-1].num_tokens for turns in expected
            ]


async def num_tokens(service: Service, session: str) -> int:
    """Of a session, once its record can be read."""
    while True:
        try:
            return (await service.client.get(session)).num_tokens
        except KVServiceError:
            await asyncio.sleep(0.05)
