"""One tenant floods, another sends one call: how long that waits for its first token, beside what it takes alone.

Drives a running service over gRPC with the keys of two tenants; knows nothing of how the service shares its time.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from kvservice.client import Client, RetryPolicy
from kvservice.client.client import collect_answer
from kvservice.errors import KVServiceError

PATIENT = RetryPolicy(max_attempts=100)
"""The flood: whoever is refused comes again."""

QUESTION_TOKENS = 16
"""At the end of each document."""

FIRST_TOKEN_ID = 20
"""Of random documents; special tokens lie below it."""


@dataclass(frozen=True, slots=True)
class FairnessLoad:
    """What is sent.

    Attributes:
        documents: of the flood.
        doc_tokens: of each document, also of the other tenant's.
        new_tokens: of each answer.
        repeats: times that the other tenant sends its one call, alone and beside the flood, there as far apart as it
            takes alone.
        seed: of the documents.
    """

    documents: int = 50
    doc_tokens: int = 2000
    new_tokens: int = 1
    repeats: int = 5
    seed: int = 7


@dataclass(frozen=True, slots=True)
class FairnessResult:
    """Seconds to the first token of the one call.

    Attributes:
        alone_s: by nobody else about.
        beside_s: while the flood waited.
        flood_left: calls of the flood that had not ended when each of them got its first token.
        flood_failed: calls of the flood that failed.
    """

    alone_s: tuple[float, ...]
    beside_s: tuple[float, ...]
    flood_left: tuple[int, ...]
    flood_failed: int

    @property
    def ratio(self) -> float:
        """The median beside the flood, of the median alone."""
        return statistics.median(self.beside_s) / statistics.median(self.alone_s)

    @property
    def worst_ratio(self) -> float:
        """The longest beside the flood, of the median alone."""
        return max(self.beside_s) / statistics.median(self.alone_s)


class _Flood:
    """All calls of the one tenant, sent at once."""

    def __init__(self, client: Client, documents: Sequence[Sequence[int]], new_tokens: int) -> None:
        self._tasks = [asyncio.create_task(_first_token_s(client, document, new_tokens)) for document in documents]

    @property
    def left(self) -> int:
        """Calls that have not ended."""
        return sum(not task.done() for task in self._tasks)

    async def end(self) -> int:
        """Waits for them; gives the number of those that failed."""
        ends = await asyncio.gather(*self._tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException) and not isinstance(end, KVServiceError):
                raise end
        return sum(isinstance(end, KVServiceError) for end in ends)


async def measure(flood: Client, one: Client, load: FairnessLoad, vocab_size: int) -> FairnessResult:
    """Sends the one call alone, then beside the flood.

    Args:
        flood: with the key of the tenant that floods; it should come again when it is refused, see `PATIENT`.
        one: with that of another.
        load: what is sent.
        vocab_size: of the model.
    """
    chance = random.Random(load.seed)

    def document() -> list[int]:
        return [chance.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(load.doc_tokens)]

    # The first calls measure nothing: speeds, from which the service predicts, are not known yet.
    await _first_token_s(one, document(), load.new_tokens)
    alone = [await _first_token_s(one, document(), load.new_tokens) for _ in range(load.repeats)]
    running = _Flood(flood, [document() for _ in range(load.documents)], load.new_tokens)
    beside, left = [], []
    try:
        for _ in range(load.repeats):
            # It sends one: who sends one after the other has its half of the time, and waits twice as long.
            await asyncio.sleep(statistics.median(alone))
            beside.append(await _first_token_s(one, document(), load.new_tokens))
            left.append(running.left)
    finally:
        failed = await running.end()
    return FairnessResult(tuple(alone), tuple(beside), tuple(left), failed)


async def _first_token_s(client: Client, document: Sequence[int], new_tokens: int) -> float:
    """Sends a document with a question, without a session; gives the seconds to its first token, once it has ended."""
    events = client.complete(
        document_token_ids=document[:-QUESTION_TOKENS],
        prompt_token_ids=document[-QUESTION_TOKENS:],
        max_new_tokens=new_tokens,
        ignore_eos=True,
    )
    answer = await collect_answer(events)
    return answer.finished.timings.ttft_ms / 1000.0
