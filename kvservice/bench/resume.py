"""Time to the first token of a session on a worker process that never saw it. Knows nothing of how workers start.

holder: document read, a question ──► KV in Redis ──► fresh process: acquired there, asked again
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from kvservice.client import Client
from kvservice.client.results import Finished, Tokens
from kvservice.errors import InternalError

HOLDER = "holder"
QUESTION_TOKENS = 24
NEW_TOKENS = 8
LEAST_TOKEN, TOKEN_RANGE = 100, 20_000
"""Random ids of ordinary tokens, of any model."""

StartWorker = Callable[[str], AbstractAsyncContextManager[None]]
"""Starts a worker process of that name; it is connected when the context is entered, and gone when it is left."""


@dataclass(frozen=True, slots=True)
class ResumeRow:
    """One session. Seconds are the caller's.

    Attributes:
        codec: of what is stored.
        tokens: of the document.
        prefill_s: that reading the document took, on the holder.
        held_ttft_s: of a question to the worker that holds the session.
        fresh_ttft_s: of the first question to a process that has just started.
        again_ttft_s: of the same process, when the session has been elsewhere meanwhile.
        recomputed_tokens: that the fresh process computed again; all others came from Redis.
    """

    codec: str
    tokens: int
    prefill_s: float
    held_ttft_s: float
    fresh_ttft_s: float
    again_ttft_s: float
    recomputed_tokens: int


async def measure_resume(
    client: Client, start_worker: StartWorker, *, codec: str, recipe: str, tokens: int, rounds: int, seed: int
) -> list[ResumeRow]:
    """A session in each round, each to a process of its own.

    Args:
        client: of the service, without a worker yet.
        start_worker: starts one.
        codec: that these workers have.
        recipe: of the sessions.
        tokens: of their documents.
        rounds: how many.
        seed: of the documents' random tokens.

    Raises:
        InternalError: what should have come from Redis didn't, so that nothing would be measured.
    """
    ids = random.Random(seed)
    rows: list[ResumeRow] = []
    async with start_worker(HOLDER):
        for number in range(rounds):
            document = [ids.randrange(LEAST_TOKEN, TOKEN_RANGE) for _ in range(tokens)]
            questions = [[ids.randrange(LEAST_TOKEN, TOKEN_RANGE) for _ in range(QUESTION_TOKENS)] for _ in range(4)]
            session = (await client.create_session(recipe=recipe)).session_id
            started = time.perf_counter()
            await client.append(session, token_ids=document)
            prefill_s = time.perf_counter() - started
            await _ask(client, session, questions[0])
            held_ttft_s, _ = await _ask(client, session, questions[1])
            name = f"fresh-{number}"
            async with start_worker(name):
                await client.move_session(session, name)
                fresh_ttft_s, fresh = await _ask(client, session, questions[2])
                await client.move_session(session, HOLDER)
                await client.move_session(session, name)
                again_ttft_s, _ = await _ask(client, session, questions[3])
                await client.close_session(session, purge=True)
            recomputed = fresh.usage.recomputed_tokens
            if 2 * recomputed > tokens:
                raise InternalError(f"{recomputed} of {tokens} tokens were computed again: too little came from Redis")
            rows.append(
                ResumeRow(
                    codec=codec,
                    tokens=tokens,
                    prefill_s=prefill_s,
                    held_ttft_s=held_ttft_s,
                    fresh_ttft_s=fresh_ttft_s,
                    again_ttft_s=again_ttft_s,
                    recomputed_tokens=recomputed,
                )
            )
    return rows


async def _ask(client: Client, session: str, question: list[int]) -> tuple[float, Finished]:
    """Seconds to the first token, and the end of the answer."""
    started, first, finished = time.perf_counter(), 0.0, None
    async for event in client.generate(session, prompt_token_ids=question, max_new_tokens=NEW_TOKENS, ignore_eos=True):
        if isinstance(event, Tokens) and not first:
            first = time.perf_counter() - started
        if isinstance(event, Finished):
            finished = event
    assert finished is not None
    return first, finished
