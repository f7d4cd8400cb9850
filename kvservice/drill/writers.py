"""Two gateways that change one session at the same moment: each change is made whole and once, or refused.

Rounds of a question against a question, and of a question against a move. What is kept must be what the same questions
give one after another.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass

from kvservice.client import Answer
from kvservice.drill.calls import FIRST, put
from kvservice.drill.deployment import Deployment
from kvservice.drill.examine import QUESTION, Examiner, Expected
from kvservice.drill.outcomes import FaultReport, Outcome, Probe, judge
from kvservice.errors import Conflict

ROUNDS = 8
NAME = "two gateways write one session"


@dataclass(frozen=True, slots=True)
class WritersFault:
    """See the module."""

    name: str = NAME
    part: str = "process"


async def examine_writers(deployment: Deployment, examiner: Examiner) -> FaultReport:
    """All rounds, from a whole deployment to a whole deployment."""
    prepared = await examiner.prepare()
    session, client = prepared.warm, deployment.client
    reference = (await client.fork_session(session)).session_id
    before = await examiner.misses()
    given: list[Expected] = []
    refused: Counter[str] = Counter()
    for index in range(ROUNDS):
        first, second = deployment.clients.values()
        rival = put(second, session, FIRST) if index % 2 else second.move_session(session)
        for ended in await asyncio.gather(put(first, session, FIRST), rival, return_exceptions=True):
            if isinstance(ended, Conflict):
                refused[ended.reason] += 1
            elif isinstance(ended, BaseException):
                raise ended
            elif isinstance(ended, Answer):
                given.append(Expected.of(ended))
    wanted = [Expected.of(await put(client, reference, FIRST)) for _ in given]
    probes = [_probe("answers", given == wanted, f"{len(given)} answers aren't those of one after another")]
    held, right = (await client.get(session)).num_tokens, (await client.get(reference)).num_tokens
    probes.append(_probe("tokens", held == right, f"{held} tokens instead of {right}"))
    after = Expected.of(await put(client, reference, QUESTION))
    outcome, recomputed, error = await examiner.ask(client, session, after)
    probes.append(Probe("afterwards", outcome, 0.0, 0.0, recomputed, error))
    await client.close_session(reference, purge=True)
    recovered_s = await examiner.recovered(prepared)
    misses = await examiner.misses() - before
    data = await examiner.data(prepared)
    findings = judge(tuple(probes), recovered_s, data, misses, max_recovery_s=examiner.max_recovery_s)
    if unknown := refused.keys() - {"session_busy"}:
        findings += (f"refused for {', '.join(sorted(unknown))}",)
    if not refused:
        findings += ("no two calls ever met",)
    return FaultReport(NAME, "process", tuple(probes), dict(misses), recovered_s, data, findings)


def _probe(name: str, is_right: bool, error: str) -> Probe:
    return Probe(name, Outcome.SAME if is_right else Outcome.WRONG, 0.0, error="" if is_right else error)
