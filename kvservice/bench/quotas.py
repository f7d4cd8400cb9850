"""What gets through a tenant's quotas, asked of two gateways at once that share nothing but the state Redis.

Drives running gateways whose worker computes nothing; knows nothing of how quotas are kept.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

from kvservice.client import Client, RetryPolicy, Tokens
from kvservice.errors import QUOTA_KEY, KVServiceError

ONCE = RetryPolicy(max_attempts=1)
"""Who is refused doesn't come again: refusals are what is counted."""
PACE = 200.0
"""Calls a second, of both gateways together."""
CALL_TOKENS = 100
"""Of a call: all but one are read."""
SETTLE_S = 1.5
"""A change of a quota holds within a second."""


@dataclass(frozen=True, slots=True)
class QuotaRow:
    """One quota.

    Attributes:
        quota: as SetQuota names it.
        limit: that was set.
        asked: calls, half of them of each gateway.
        seconds: from the first to the end of the last.
        let_through: calls that were answered.
        at_most: as many as may have been, in that time. Tokens are paid for at the end of a call, so those under
            way at the same time count besides; what they owe is paid before others begin.
        refused: calls by the status, and the quota named in the answer.
        retry_after_s: median of what refusals said; None: they said that it doesn't pass by itself.
        refusal_ms_p50: how long a refusal took.
    """

    quota: str
    limit: float
    asked: int
    seconds: float
    let_through: int
    at_most: float
    refused: dict[str, int]
    retry_after_s: float | None
    refusal_ms_p50: float | None


@dataclass(slots=True)
class _Told:
    """What callers were told."""

    let_through: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    refusal_ms: list[float] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0

    async def ask(self, call: Callable[[], Awaitable[object]]) -> None:
        """Makes a call, and notes what came of it."""
        started = time.perf_counter()
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await call()
        except KVServiceError as error:
            self.refused[f"{error.status} {error.metadata.get(QUOTA_KEY, error.reason)}"] += 1
            self.refusal_ms.append((time.perf_counter() - started) * 1e3)
            if error.retry_after_s is not None:
                self.waits.append(error.retry_after_s)
        else:
            self.let_through += 1
        finally:
            self.under_way -= 1

    def row(self, quota: str, limit: float, seconds: float, at_most: float) -> QuotaRow:
        """What it comes to."""
        return QuotaRow(
            quota=quota,
            limit=limit,
            asked=self.let_through + self.refused.total(),
            seconds=seconds,
            let_through=self.let_through,
            at_most=at_most,
            refused=dict(self.refused),
            retry_after_s=statistics.median(self.waits) if self.waits else None,
            refusal_ms_p50=statistics.median(self.refusal_ms) if self.refusal_ms else None,
        )


async def measure_quotas(
    operator: Client, clients: Callable[[str], Sequence[Client]], *, calls: int
) -> tuple[list[QuotaRow], float]:
    """Meets each quota with a tenant of its own, and then lifts one.

    Args:
        operator: may set quotas.
        clients: of a tenant by its name, one for each gateway; they don't try again.
        calls: to send against each quota of a minute.

    Returns:
        A row for each quota; and the seconds until calls got through again once one had been lifted.

    Raises:
        KVServiceError: a quota couldn't be set.
    """
    await operator.set_quota("requests", requests_per_minute=60)
    await operator.set_quota("tokens", tokens_per_minute=30 * CALL_TOKENS)
    await operator.set_quota("concurrent", concurrent_calls=5)
    await operator.set_quota("documents", document_tokens=CALL_TOKENS - 2)
    await operator.set_quota("sessions", sessions=8)
    await asyncio.sleep(SETTLE_S)
    rows = [
        await _of_a_minute(clients("requests"), "requests_per_minute", 60, calls, per_call=1),
        await _of_a_minute(clients("tokens"), "tokens_per_minute", 30 * CALL_TOKENS, calls, per_call=CALL_TOKENS),
        await _at_a_time(clients("concurrent"), 5, asked=20),
        await _document(clients("documents"), CALL_TOKENS - 2),
        await _sessions(clients("sessions"), 8, asked=20),
    ]
    return rows, await _lifted(operator, clients("requests"))


async def _of_a_minute(clients: Sequence[Client], quota: str, limit: float, calls: int, *, per_call: float) -> QuotaRow:
    """Calls at a steady pace, by turns of each gateway. A minute's may come at once, and more come back meanwhile."""
    told, started, tasks = _Told(), time.perf_counter(), []
    for number in range(calls):
        await asyncio.sleep(max(0.0, started + number / PACE - time.perf_counter()))
        client = clients[number % len(clients)]
        tasks.append(asyncio.create_task(told.ask(partial(_answer, client))))
    await asyncio.gather(*tasks)
    seconds = time.perf_counter() - started
    at_most = (limit + limit / 60 * seconds) / per_call
    return told.row(quota, limit, seconds, at_most + (told.most_under_way if per_call > 1 else 0))


async def _at_a_time(clients: Sequence[Client], limit: int, asked: int) -> QuotaRow:
    """Answers that stay open until all have been asked for."""
    told, started = _Told(), time.perf_counter()
    heard: asyncio.Queue[None] = asyncio.Queue()
    is_over = asyncio.Event()

    async def hold(client: Client) -> None:
        try:
            async with aclosing(client.complete(prompt_token_ids=[65], max_new_tokens=2)) as events:
                async for event in events:
                    if isinstance(event, Tokens):
                        heard.put_nowait(None)
                        await is_over.wait()
                        return
        except KVServiceError:
            heard.put_nowait(None)
            raise

    tasks = [asyncio.create_task(told.ask(partial(hold, clients[number % len(clients)]))) for number in range(asked)]
    for _ in tasks:
        await heard.get()
    is_over.set()
    await asyncio.gather(*tasks)
    return told.row("concurrent_calls", limit, time.perf_counter() - started, limit)


async def _document(clients: Sequence[Client], limit: int) -> QuotaRow:
    """A document that is just short enough, and one that isn't, of each gateway."""
    told, started = _Told(), time.perf_counter()
    for client in clients:
        for tokens in (limit, limit + 1):
            await told.ask(partial(_answer, client, tokens))
    return told.row("document_tokens", limit, time.perf_counter() - started, len(clients))


async def _sessions(clients: Sequence[Client], limit: int, asked: int) -> QuotaRow:
    told, started = _Told(), time.perf_counter()
    await asyncio.gather(*(told.ask(clients[number % len(clients)].create_session) for number in range(asked)))
    return told.row("sessions", limit, time.perf_counter() - started, limit)


async def _lifted(operator: Client, clients: Sequence[Client]) -> float:
    """Seconds from a change to the first moment at which all gateways let calls through."""
    await operator.set_quota("requests", requests_per_minute=1e6)
    started, waiting = time.perf_counter(), list(clients)
    while waiting:
        told = _Told()
        await told.ask(partial(_answer, waiting[0]))
        if told.let_through:
            waiting.pop(0)
        else:
            await asyncio.sleep(0.02)
    return time.perf_counter() - started


async def _answer(client: Client, document_tokens: int = CALL_TOKENS - 2) -> None:
    """A document, a question of a token, and an answer of one."""
    events = client.complete(document_token_ids=[65] * document_tokens, prompt_token_ids=[66], max_new_tokens=1)
    async with aclosing(events):
        async for _ in events:
            pass
