"""Workers killed with -9 in the middle of an answer, and before its first token: real processes, real Redis."""

from __future__ import annotations

import asyncio
import random

import pytest
import pytest_asyncio

from kvservice.client import Client, RetryPolicy, Started, Tokens
from kvservice.drill.deployment import Deployment, DrillConfig
from kvservice.errors import Unavailable

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

KILLED: list[str] = []
SAMPLING = {"max_new_tokens": 48, "ignore_eos": True, "temperature": 0.7, "seed": 11}

LONG = {**SAMPLING, "max_new_tokens": 800}
"""Far from its end when the caller has its first token."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment(tmp_path_factory):
    from kvservice.models.tiny import write_tiny_checkpoint

    folder = tmp_path_factory.mktemp("failover")
    config = DrillConfig(str(write_tiny_checkpoint(folder / "tiny")), folder / "drill", gateways=("gateway-1",))
    async with Deployment(config) as deployment:
        yield deployment


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def whole(deployment: Deployment):
    """Whoever a test has killed is there again for the next."""
    KILLED.clear()
    yield
    for worker_id in KILLED:
        await deployment.processes[worker_id].start()
    await deployment.until_whole()


def _text(seed: int, num_characters: int) -> str:
    letters = random.Random(seed)
    return "".join(letters.choice("abcdefghij klmnop.\n") for _ in range(num_characters))


async def _session(client: Client) -> str:
    session = (await client.create_session(recipe="recall")).session_id
    await client.append(session, _text(7, 900))
    await client.ask(session, "first? ", max_new_tokens=4)
    return session


async def _read(client: Client, seed: int) -> None:
    async for _ in client.complete(_text(100 + seed, 1600), max_new_tokens=1):
        pass


async def _kill(deployment: Deployment, worker_id: str) -> None:
    KILLED.append(worker_id)
    await deployment.processes[worker_id].kill()


async def test_before_the_first_token_another_worker_answers_within_the_same_call(deployment: Deployment) -> None:
    question = _text(8, 1000)
    client = deployment.client
    session = await _session(client)
    twin = (await client.fork_session(session)).session_id
    right = await client.ask(twin, question, **SAMPLING)
    # They are read first, so that there is time between admission and token.
    before = [asyncio.create_task(_read(client, seed)) for seed in range(10)]
    await asyncio.sleep(0.05)
    async with Client(deployment.processes["gateway-1"].address, retry=RetryPolicy(max_attempts=1)) as once:
        tokens: list[int] = []
        lost = ""
        async for event in once.generate(session, question, **SAMPLING):
            if isinstance(event, Started):
                assert not lost
                lost = event.worker_id
                await _kill(deployment, lost)
            elif isinstance(event, Tokens):
                tokens.extend(event.token_ids)
    assert tuple(tokens) == right.token_ids
    found = await client.get(session)
    assert found.worker_id != lost
    assert found.num_tokens == (await client.get(twin)).num_tokens
    # Theirs had no token either.
    await asyncio.gather(*before)


async def test_in_mid_stream_the_client_goes_on_after_the_last_event_it_has(deployment: Deployment) -> None:
    client = deployment.client
    session = await _session(client)
    twin = (await client.fork_session(session)).session_id
    right = await client.ask(twin, "and then? ", **LONG)
    numbers: list[int] = []
    tokens: list[int] = []
    lost = ""
    async for event in client.generate(session, "and then? ", **LONG):
        numbers.append(event.sequence)
        if isinstance(event, Started):
            worker = event.worker_id
        elif isinstance(event, Tokens):
            tokens.extend(event.token_ids)
            if not lost:
                lost = worker
                await _kill(deployment, lost)
    assert tuple(tokens) == right.token_ids
    assert numbers == list(range(1, len(numbers) + 1))
    assert (await client.get(session)).worker_id != lost


async def test_in_mid_stream_the_status_says_where_the_stream_stands(deployment: Deployment) -> None:
    client = deployment.client
    session = await _session(client)
    before = await client.get(session)
    last = 0

    async def ask_until_it_fails(once: Client) -> None:
        nonlocal last
        async for event in once.generate(session, "and then? ", **LONG):
            last = event.sequence
            if isinstance(event, Started):
                worker = event.worker_id
            elif isinstance(event, Tokens) and not KILLED:
                await _kill(deployment, worker)

    async with Client(deployment.processes["gateway-1"].address, retry=RetryPolicy(max_attempts=1)) as once:
        with pytest.raises(Unavailable) as caught:
            await ask_until_it_fails(once)
    assert caught.value.metadata["last_sequence"] == str(last)
    assert caught.value.retry_after_s is not None
    assert (await client.get(session)).num_tokens == before.num_tokens
