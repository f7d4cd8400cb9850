"""Long-document sessions of many callers on the real service, through the public client over gRPC.

Each session has a document of its own and asks a question a turn. All take turn t together; turn t + 1 starts when the
last answer of turn t has ended. Turn 1 loads the documents, and its times include that.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kvservice.bench.load import random_ids, rotated_ids
from kvservice.client import Client, Finished, RetryPolicy, ServiceStats, Tokens
from kvservice.errors import InternalError

PATIENT = RetryPolicy(max_attempts=1000)
"""A session that finds no room tries again until it does: waiting for room is part of what is measured."""

POLL_INTERVAL_S = 0.25


@dataclass(frozen=True, slots=True)
class SessionLoad:
    """What the callers do.

    Attributes:
        sessions: how many.
        document_tokens: of each session's document.
        question_tokens: of each question.
        new_tokens: of each answer; end tokens don't end it.
        turns: questions of each session.
        recipe: of all sessions.
        text: token ids to cut documents and questions from; None: random ids.
        seed: of random ids.
    """

    sessions: int
    document_tokens: int
    question_tokens: int
    new_tokens: int
    turns: int
    recipe: str
    text: tuple[int, ...] | None
    seed: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of all sessions. Times to the first token count from the start of the turn."""

    turn: int
    wall_s: float
    ttft_s_mean: float
    ttft_s_max: float
    output_tokens_per_s: float


@dataclass(slots=True)
class Peaks:
    """The most bytes seen at any poll, of all workers together."""

    device_kv_bytes: int = 0
    workspace_bytes: int = 0
    host_kv_bytes: int = 0
    redis_kv_bytes: int = 0

    def see(self, stats: ServiceStats) -> None:
        """Takes one poll into account."""
        workers = stats.workers
        kv = sum(w.window_bytes + w.index_bytes + w.slot_bytes for w in workers)
        self.device_kv_bytes = max(self.device_kv_bytes, kv)
        self.workspace_bytes = max(self.workspace_bytes, sum(w.workspace_bytes for w in workers))
        self.host_kv_bytes = max(self.host_kv_bytes, sum(w.host_bytes for w in workers))
        self.redis_kv_bytes = max(self.redis_kv_bytes, sum(w.redis_bytes for w in workers))


@dataclass(frozen=True, slots=True)
class SessionsResult:
    """What was measured.

    Attributes:
        turns: one after the other.
        peaks: bytes by place.
        rss_bytes_peak: of the server process: weights, device and host KV are all in it on a CPU.
        tier_bytes_moved_per_token: from host to device by questions and answers, for each of their tokens.
        recall_hit_rate: share of recalled cells that were on the device already; None without recall.
        recomputed_tokens: whose KV was held nowhere when a question came.
    """

    turns: tuple[Turn, ...]
    peaks: Peaks
    rss_bytes_peak: int
    tier_bytes_moved_per_token: float
    recall_hit_rate: float | None
    recomputed_tokens: int


@dataclass(frozen=True, slots=True)
class _Asked:
    ttft_s: float
    finished: Finished


async def run_sessions(address: str, pid: int, load: SessionLoad, report: Callable[[], None]) -> SessionsResult:
    """Puts the load on a service that has nothing else to do.

    Args:
        address: of the gateway.
        pid: of the server process, for its memory.
        load: what the callers do.
        report: called after each answer.

    Raises:
        KVServiceError: a call failed for another reason than lack of room for now.
    """
    async with Client(address, retry=PATIENT) as client:
        texts = _Texts(load, (await client.list_models())[0].shape.vocab_size)
        await _warm_up(client, texts)
        sessions = [(await client.create_session(recipe=load.recipe)).session_id for _ in range(load.sessions)]
        answers: list[_Asked] = []
        turns = []
        async with _watched(client) as peaks:
            for turn in range(load.turns):
                started = time.perf_counter()
                questions = [texts.question() for _ in sessions]
                documents = [texts.document(number) if turn == 0 else [] for number in range(load.sessions)]
                asked = await asyncio.gather(
                    *(
                        _take_turn(client, session_id, document, question, load.new_tokens, report)
                        for session_id, document, question in zip(sessions, documents, questions, strict=True)
                    )
                )
                turns.append(_turn(turn + 1, time.perf_counter() - started, asked))
                answers += asked
        return _result(turns, peaks, peak_rss_bytes(pid), answers)


async def _take_turn(
    client: Client,
    session_id: str,
    document: Sequence[int],
    question: Sequence[int],
    new_tokens: int,
    report: Callable[[], None],
) -> _Asked:
    started = time.perf_counter()
    if document:
        await client.append(session_id, token_ids=document)
    ttft_s = 0.0
    events = client.generate(session_id, prompt_token_ids=question, max_new_tokens=new_tokens, ignore_eos=True)
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Tokens):
                ttft_s = ttft_s or time.perf_counter() - started
            if isinstance(event, Finished):
                report()
                return _Asked(ttft_s, event)
    raise InternalError("an answer ended without its last event")


async def _warm_up(client: Client, texts: _Texts) -> None:
    async with aclosing(client.complete(prompt_token_ids=texts.question(), max_new_tokens=4)) as events:
        async for _ in events:
            pass


@asynccontextmanager
async def _watched(client: Client) -> AsyncIterator[Peaks]:
    peaks = Peaks()

    async def poll() -> None:
        while True:
            peaks.see(await client.stats())
            await asyncio.sleep(POLL_INTERVAL_S)

    task = asyncio.create_task(poll(), name="poll-stats")
    try:
        yield peaks
        peaks.see(await client.stats())
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class _Texts:
    """Documents and questions in the order in which they are asked for."""

    def __init__(self, load: SessionLoad, vocab_size: int) -> None:
        self._load = load
        self._vocab_size = vocab_size
        self._rng = random.Random(load.seed)

    def document(self, session: int) -> list[int]:
        load = self._load
        if load.text is None:
            return random_ids(self._rng, load.document_tokens, self._vocab_size)
        # Each begins elsewhere in the text: no two sessions have a prefix in common.
        return rotated_ids(load.text, load.document_tokens, session * len(load.text) // load.sessions)

    def question(self) -> list[int]:
        load = self._load
        if load.text is None:
            return random_ids(self._rng, load.question_tokens, self._vocab_size)
        return rotated_ids(load.text, load.question_tokens, self._rng.randrange(len(load.text)))


def peak_rss_bytes(pid: int) -> int:
    """The most memory a process ever had resident (VmHWM of /proc: Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise InternalError(f"/proc/{pid}/status has no VmHWM")


def _turn(number: int, wall_s: float, asked: Sequence[_Asked]) -> Turn:
    tokens = sum(answer.finished.usage.completion_tokens for answer in asked)
    return Turn(
        turn=number,
        wall_s=wall_s,
        ttft_s_mean=sum(answer.ttft_s for answer in asked) / len(asked),
        ttft_s_max=max(answer.ttft_s for answer in asked),
        output_tokens_per_s=tokens / wall_s,
    )


def _result(turns: Sequence[Turn], peaks: Peaks, rss_bytes_peak: int, answers: Sequence[_Asked]) -> SessionsResult:
    kv = [answer.finished.kv for answer in answers]
    usage = [answer.finished.usage for answer in answers]
    moved = sum(one.recalled_bytes + one.streamed_bytes for one in kv)
    lookups = sum(one.recall_lookups for one in kv)
    return SessionsResult(
        turns=tuple(turns),
        peaks=peaks,
        rss_bytes_peak=rss_bytes_peak,
        tier_bytes_moved_per_token=moved / sum(one.prompt_tokens + one.completion_tokens for one in usage),
        recall_hit_rate=sum(one.recall_hits for one in kv) / lookups if lookups else None,
        recomputed_tokens=sum(one.recomputed_tokens for one in usage),
    )
