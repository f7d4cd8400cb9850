"""Many sessions, created, used, forked and closed: does Redis come back to its start, is the ledger right?

Knows nothing of how the service was started. What the servers hold is asked of the servers.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvservice.client import Client
from kvservice.store.blobs import RedisBlobs, all_blobs
from kvservice.tier.base import TierBackend

QUESTION_TOKENS = 12
NEW_TOKENS = 4
LEAST_TOKEN, TOKEN_RANGE = 100, 200
"""Random ids that any model has."""

CLEARING_LOOKS, CLEARING_PAUSE_S = 100, 0.3


@dataclass(frozen=True, slots=True)
class ChurnLoad:
    """Sessions in all, forks included; at a time; tokens of each document; seed of their random tokens."""

    sessions: int
    alive: int
    doc_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Stored:
    """What the servers say.

    Attributes:
        sessions: of which there is anything: a record, a lease, or frames.
        frames: in the kv Redis.
        frame_bytes: theirs, by MEMORY USAGE.
        index_bytes: of the sets that name them, likewise.
        used_bytes: of the kv Redis in all.
        charged_bytes: of the tenant, by the ledger.
    """

    sessions: int
    frames: int
    frame_bytes: int
    index_bytes: int
    used_bytes: int
    charged_bytes: int

    @property
    def is_nothing(self) -> bool:
        """Whether nothing is stored."""
        return not (self.sessions or self.frames or self.index_bytes or self.charged_bytes)


@dataclass(frozen=True, slots=True)
class ChurnResult:
    """What it came to.

    Attributes:
        sessions: created, forks included.
        before: before the first.
        peaks: of each wave, when all its sessions were there.
        after: when all were closed, and workers had time to delete.
        worst_error: largest share by which the ledger was off what the server said that frames take.
    """

    sessions: int
    before: Stored
    peaks: tuple[Stored, ...]
    after: Stored
    worst_error: float


async def measure_churn(
    client: Client,
    blobs: RedisBlobs,
    tier: TierBackend,
    load: ChurnLoad,
    *,
    tenant: str,
    on_wave: Callable[[int], None],
) -> ChurnResult:
    """Waves of sessions: each reads a document, answers, is forked, and the fork answers; then all are closed.

    Args:
        client: of the service, as an operator.
        blobs: the kv Redis, of nobody else.
        tier: the same.
        load: how many, and how long.
        tenant: the client's.
        on_wave: told after each wave how many sessions have been closed.
    """
    ids = random.Random(load.seed)

    def some(count: int) -> list[int]:
        return [ids.randrange(LEAST_TOKEN, TOKEN_RANGE) for _ in range(count)]

    before, done = await look(client, blobs, tier, tenant), 0
    peaks: list[Stored] = []
    while done < load.sessions:
        pairs = max(1, min(load.alive, load.sessions - done) // 2)
        plans = [(some(load.doc_tokens), [some(QUESTION_TOKENS) for _ in range(3)]) for _ in range(pairs)]
        made = [name for names in await asyncio.gather(*(_use(client, *plan) for plan in plans)) for name in names]
        peaks.append(await look(client, blobs, tier, tenant))
        await asyncio.gather(*(client.close_session(name, purge=True) for name in made))
        done += len(made)
        on_wave(done)
    worst = max(abs(peak.charged_bytes - peak.frame_bytes) / max(1, peak.frame_bytes) for peak in peaks)
    after = await _look_until_nothing(client, blobs, tier, tenant)
    return ChurnResult(done, before, tuple(peaks), after, worst)


async def look(client: Client, blobs: RedisBlobs, tier: TierBackend, tenant: str) -> Stored:
    """What is stored, once all that has ended is published."""
    report = await client.verify(tenant)
    keys = [blob.key async for blob in all_blobs(blobs, b"")]
    frame_bytes, index_bytes = await blobs.memory(keys)
    used_bytes = (await tier.usage()).memory_bytes
    return Stored(len(report.session_ids), len(keys), frame_bytes, index_bytes, used_bytes, report.stored_bytes)


async def _look_until_nothing(client: Client, blobs: RedisBlobs, tier: TierBackend, tenant: str) -> Stored:
    """What is stored when nothing is left, or at the last of some looks: workers delete after they have answered."""
    for _ in range(CLEARING_LOOKS):
        after = await look(client, blobs, tier, tenant)
        if after.is_nothing:
            break
        await asyncio.sleep(CLEARING_PAUSE_S)
    return after


async def _use(client: Client, document: Sequence[int], questions: Sequence[Sequence[int]]) -> tuple[str, str]:
    session = (await client.create_session()).session_id
    await client.append(session, token_ids=document)
    await _ask(client, session, questions[0])
    fork = (await client.fork_session(session)).session_id
    await _ask(client, fork, questions[1])
    await _ask(client, session, questions[2])
    return session, fork


async def _ask(client: Client, session: str, question: Sequence[int]) -> None:
    async for _ in client.generate(session, prompt_token_ids=question, max_new_tokens=NEW_TOKENS, ignore_eos=True):
        pass
