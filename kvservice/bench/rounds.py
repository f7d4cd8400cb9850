"""Callers that hold the same conversations over and over, and compare every answer with the first one.

For what is done to a service meanwhile: workers that are killed, added, taken away. The service must be deterministic:
then an answer is right if it is the one that was given when nothing had happened. Knows nothing of workers.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Collection
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

from kvservice.bench.load import random_ids
from kvservice.client import Client, Finished, RetryPolicy, Started, Tokens
from kvservice.errors import KVServiceError

PATIENT = RetryPolicy(max_attempts=30)
"""Longer than a worker takes to start."""


@dataclass(frozen=True, slots=True)
class RoundsLoad:
    """What the callers do.

    Attributes:
        callers: each with a conversation of its own, again and again.
        document_tokens: that it begins with.
        question_tokens: of each question.
        turns: questions of a conversation.
        new_tokens: of each answer.
        recipe: of the sessions.
        seed: of the tokens.
    """

    callers: int
    document_tokens: int
    question_tokens: int
    turns: int
    new_tokens: int
    recipe: str
    seed: int


@dataclass(slots=True)
class RoundsReport:
    """What became of the calls.

    Attributes:
        answers: that came to their end.
        wrong: of these, those with a token that isn't the first round's.
        lost_turns: sessions found to hold fewer tokens than were reported durable, or not as many as the answer said.
        recomputed_tokens: whose KV was computed again.
        refusals: calls that ended with a status, by status and reason.
    """

    answers: int = 0
    wrong: int = 0
    lost_turns: int = 0
    recomputed_tokens: int = 0
    refusals: Counter[str] = field(default_factory=Counter)


class Rounds:
    """The callers. `streaming` has the sessions in the middle of an answer, with the worker that took it."""

    def __init__(self, address: str, load: RoundsLoad, vocab_size: int, retry: RetryPolicy = PATIENT) -> None:
        self.report = RoundsReport()
        self.streaming: dict[str, str] = {}
        self._address = address
        self._load = load
        self._retry = retry
        rng = random.Random(load.seed)

        def texts(length: int) -> list[list[int]]:
            return [random_ids(rng, length, vocab_size) for _ in range(load.callers)]

        self._documents = texts(load.document_tokens)
        self._questions = [texts(load.question_tokens) for _ in range(load.turns)]
        self._right: dict[tuple[int, int], tuple[int, ...]] = {}
        self._streams = asyncio.Condition()

    async def rehearse(self) -> None:
        """One round, whose answers are the right ones. Raises what a call fails with."""
        async with Client(self._address, retry=self._retry) as client:
            await asyncio.gather(*(self._converse(client, caller) for caller in range(self._load.callers)))

    async def run(self, until: asyncio.Event) -> RoundsReport:
        """Round after round, each caller at its own pace, until told to end; the last rounds come to their end."""

        async def call_on(client: Client, caller: int) -> None:
            while not until.is_set():
                try:
                    await self._converse(client, caller)
                except KVServiceError as error:
                    self.report.refusals[f"{error.status} {error.reason}"] += 1

        async with Client(self._address, retry=self._retry) as client:
            await asyncio.gather(*(call_on(client, caller) for caller in range(self._load.callers)))
        return self.report

    async def mid_stream(self, workers: Collection[str]) -> str:
        """One of these workers, that has a call which has given a token and not ended; waits for one.

        A call that was given to another worker is still counted under the first.
        """

        def found() -> list[str]:
            return [worker for worker in self.streaming.values() if worker in workers]

        async with self._streams:
            await self._streams.wait_for(found)
            return found()[0]

    async def _converse(self, client: Client, caller: int) -> None:
        session = (await client.create_session(recipe=self._load.recipe)).session_id
        try:
            await client.append(session, token_ids=self._documents[caller])
            for turn in range(self._load.turns):
                await self._ask(client, session, caller, turn)
        finally:
            with suppress(KVServiceError):
                await client.close_session(session)

    async def _ask(self, client: Client, session: str, caller: int, turn: int) -> None:
        tokens: list[int] = []
        worker = ""
        events = client.generate(
            session,
            prompt_token_ids=self._questions[turn][caller],
            max_new_tokens=self._load.new_tokens,
            ignore_eos=True,
            temperature=0.7,
            seed=self._load.seed,
        )
        try:
            async with aclosing(events):
                async for event in events:
                    match event:
                        case Started():
                            worker = event.worker_id
                        case Tokens():
                            tokens += event.token_ids
                            await self._note(session, worker)
                        case Finished():
                            self._check(caller, turn, tokens, event)
                            num_tokens, durable = event.num_tokens, event.durable_tokens
        finally:
            await self._note(session, "")
        held = (await client.get(session)).num_tokens
        self.report.lost_turns += held < durable or held != num_tokens

    async def _note(self, session: str, worker: str) -> None:
        async with self._streams:
            if worker:
                self.streaming[session] = worker
            else:
                self.streaming.pop(session, None)
            self._streams.notify_all()

    def _check(self, caller: int, turn: int, tokens: list[int], finished: Finished) -> None:
        right = self._right.setdefault((caller, turn), tuple(tokens))
        self.report.answers += 1
        self.report.wrong += tuple(tokens) != right
        self.report.recomputed_tokens += finished.usage.recomputed_tokens
