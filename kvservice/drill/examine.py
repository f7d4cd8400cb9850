"""Examines a deployment under faults: sessions made ready before, calls made under the fault, and what is left after.

    prepare                 heal ─► again: load, store, move, answer as ever? ─► data ─► purge: is anything left?
       └► inject ─► cold, warm, new ──┘

cold    a session that was moved: the worker that answers has never seen it, so its KV comes from the tier
warm    a session that the worker holds
new     a document is read and asked about
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from kvservice.client import Answer, Client, ServiceStats
from kvservice.drill.calls import CALL_S, FIRST, put
from kvservice.drill.deployment import TENANT
from kvservice.drill.outcomes import MAX_RECOVERY_S, DataReport, FaultReport, Outcome, Probe, judge
from kvservice.errors import KVServiceError, NotFound

logger = logging.getLogger(__name__)

DOCUMENT_TOKENS = 1300
"""More than the window of any recipe: most of it is in the tier."""
QUESTION = "and what then? "
GRACE_S = 5.0
"""What a call may take beyond its deadline before it counts as hung."""
RECOVERY_S = 60.0
"""How long a deployment is given to recover; ten seconds are what it should take."""
SLOW_SHARE = 3.0
"""Where the same work takes long without a fault, it may take so many times as long after one."""
RECOVERED_STORED_S = 5.0
"""After a fault one that isn't by then, since its worker hadn't heard of the end, is left for the next."""
STORED_S = 20.0
"""Frames of a session are stored, and named by a manifest, within this time."""
GONE_S = 15.0
"""What a call held that its caller gave up, or whose session was closed, is let go within this time."""
POLL_S = 0.05

Judged = tuple[Outcome, int, str]


@dataclass(frozen=True, slots=True)
class Expected:
    """The bits of a right answer."""

    token_ids: tuple[int, ...]
    logprobs: tuple[object, ...]

    @classmethod
    def of(cls, answer: Answer) -> Expected:
        """As it was given without a fault."""
        return cls(answer.token_ids, answer.logprobs)

    def fits(self, answer: Answer) -> bool:
        """Whether an answer is this one; without log-probabilities, the same tokens."""
        return self.token_ids == answer.token_ids and self.logprobs in ((), answer.logprobs)


class Described(Protocol):
    """What is said of a fault."""

    @property
    def name(self) -> str:
        """Unique."""

    @property
    def part(self) -> str:
        """What it strikes."""

    @property
    def expects(self) -> frozenset[str]:
        """Reasons of misses of which one at least must be counted; empty: none need be."""

    @property
    def may_fail(self) -> bool:
        """Calls may be refused while it lasts."""

    @property
    def most_s(self) -> float:
        """So long a call may take; 0: however long."""


class Examined(Protocol):
    """A service that faults befall."""

    @property
    def client(self) -> Client:
        """With an operator's key."""

    @property
    def workers(self) -> tuple[str, ...]:
        """Those that must be there."""

    @property
    def seed(self) -> int:
        """Of all that is random."""

    async def until_whole(self, timeout_s: float) -> ServiceStats:
        """Waits until all workers are there, and in touch with the kv server.

        Raises:
            Unavailable: that takes longer.
        """

    async def revive(self) -> list[str]:
        """Starts processes that have ended by themselves; gives their names."""


@dataclass(slots=True)
class Prepared:
    """Sessions that are ready for a fault."""

    cold: str
    cold_answer: Expected
    """To `QUESTION`."""
    warm: str
    warm_answer: Expected
    new_document: str
    new_answer: Expected
    """To `FIRST`, of a session with `new_document`."""
    sessions: dict[str, int] = field(default_factory=dict)
    """All that there are, with the tokens that were reported durable."""


class Examiner:
    """Examines one deployment, one fault after another.

    Args:
        deployment: whole.
        recipe: of the sessions.
        tenant: of the sessions.
        is_alone: nobody else uses the service, and its workers are deterministic. Otherwise tokens are compared, and
            not their log-probabilities, and what else the tenant has is left out of account.
    """

    def __init__(self, deployment: Examined, recipe: str, *, tenant: str = TENANT, is_alone: bool = True) -> None:
        self._deployment = deployment
        self._recipe = recipe
        self._tenant = tenant
        self._is_alone = is_alone
        self._others = (0, 0)
        """Frames and bytes that are not the drill's."""
        self._rng = random.Random(deployment.seed)
        self.cold_session = ""
        """The session whose KV must come from the tier, once there is one."""
        self._usual: dict[str, float] = {}
        self.max_recovery_s = MAX_RECOVERY_S
        """Ten seconds; more on a machine that is slow or busy."""

    async def examine(
        self, fault: Described, inject: Callable[[], Awaitable[None]], heal: Callable[[], Awaitable[None]]
    ) -> FaultReport:
        """One fault, from a whole deployment to a whole deployment. `inject` brings it about, `heal` ends it."""
        prepared = await self.prepare()
        before = await self.misses()
        await inject()
        try:
            probes = await self._probes(prepared)
            under_fault = await self._misses_or_none()
        finally:
            await heal()
        ended = await self._deployment.revive()
        recovered_s = await self.recovered(prepared)
        misses = (under_fault or await self.misses()) - before
        data = await self.data(prepared)
        findings = judge(
            probes,
            recovered_s,
            data,
            misses,
            expects=fault.expects,
            may_fail=fault.may_fail,
            max_recovery_s=self.max_recovery_s,
            most_s=fault.most_s,
        )
        findings += tuple(f"{name} ended under it" for name in ended)
        return FaultReport(fault.name, fault.part, probes, dict(misses), recovered_s, data, findings)

    async def without_fault(self) -> FaultReport:
        """What is usual: the same calls, and how long they take."""
        # The first calls of a process warm it up.
        await self._probes(warming := await self.prepare())
        await self.data(warming)
        prepared = await self.prepare()
        probes = await self._probes(prepared)
        self._usual = {probe.name: probe.seconds for probe in probes}
        recovered_s = await self.recovered(prepared)
        self.max_recovery_s = max(MAX_RECOVERY_S, SLOW_SHARE * (recovered_s or 0.0))
        data = await self.data(prepared)
        findings = judge(probes, recovered_s, data, {}, max_recovery_s=self.max_recovery_s)
        return FaultReport("none", "", probes, {}, recovered_s, data, findings)

    async def prepare(self) -> Prepared:
        """Sessions of their own for one fault, and the answers that are right."""
        client = self._deployment.client
        if not self._is_alone:
            there = await client.verify(self._tenant)
            self._others = (there.own_frames, there.stored_bytes + there.reserved_bytes)
        new_document = self._document()
        rehearsal = await self._loaded(client, new_document)
        new_answer = self._expected(await put(client, rehearsal, FIRST))
        await client.close_session(rehearsal, purge=True)
        warm, warm_answer = await self._with_answer(client)
        cold, cold_answer = await self._with_answer(client)
        # Nobody else has its document: on the other worker all of it must come from the tier.
        await client.move_session(cold, self.other((await client.get(cold)).worker_id))
        self.cold_session = cold
        prepared = Prepared(cold, cold_answer, warm, warm_answer, new_document, new_answer)
        for session in (cold, warm):
            prepared.sessions[session] = (await client.get(session)).durable_tokens
        return prepared

    async def ask(self, client: Client, session: str, expected: Expected, question: str = QUESTION) -> Judged:
        """One question, and what became of it."""
        return await judged(lambda: put(client, session, question), expected)

    async def recovered(self, prepared: Prepared) -> float | None:
        """Seconds until a new document was read, answered, stored, moved, brought back and answered alike, or None."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        while loop.time() - started < RECOVERY_S:
            try:
                async with asyncio.timeout(RECOVERY_S):
                    if await self._whole_way(prepared):
                        return loop.time() - started
            except (KVServiceError, TimeoutError) as error:
                logger.info("not_recovered_yet", extra={"why": str(error)})
            await asyncio.sleep(POLL_S)
        return None

    async def data(self, prepared: Prepared) -> DataReport:
        """What there is after a fault; then closes all sessions, and looks for what is left."""
        client = self._deployment.client
        short = 0
        for session, durable in prepared.sessions.items():
            try:
                short += (await client.get(session)).num_tokens < durable
            except KVServiceError:
                short += 1
        found = await client.verify(self._tenant)
        for session in prepared.sessions:
            with contextlib.suppress(NotFound):
                await client.close_session(session, purge=True)
        left_frames, left_bytes = await self._left(client)
        return DataReport(
            short_sessions=short,
            checked_frames=found.checked_frames,
            missing_frames=found.missing_frames,
            corrupt_frames=found.corrupt_frames,
            left_frames=left_frames,
            left_bytes=left_bytes,
        )

    async def _left(self, client: Client) -> tuple[int, int]:
        """Frames and bytes that are there still; what is on its way out is given `GONE_S`."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + GONE_S
        while True:
            there = await client.verify(self._tenant)
            frames = max(0, there.own_frames - self._others[0])
            stored = max(0, there.stored_bytes + there.reserved_bytes - self._others[1])
            if not (frames or stored) or loop.time() > give_up:
                return frames, stored
            await asyncio.sleep(POLL_S)

    async def misses(self) -> Counter[str]:
        """Frames not read and not written, over all workers since they started, by reason."""
        total: Counter[str] = Counter()
        for worker in (await self._deployment.client.stats()).workers:
            total.update(worker.ledger.misses)
            total.update({f"write:{reason}": count for reason, count in worker.tier.failures.items()})
        return total

    def other(self, worker_id: str) -> str:
        """A worker that is another one."""
        return next(name for name in self._deployment.workers if name != worker_id)

    async def _probes(self, prepared: Prepared) -> tuple[Probe, ...]:
        client = self._deployment.client
        cold = await self._probe("cold", lambda: self.ask(client, prepared.cold, prepared.cold_answer))
        warm = await self._probe("warm", lambda: self.ask(client, prepared.warm, prepared.warm_answer))
        new = await self._probe("new", lambda: self._new(client, prepared))
        return cold, warm, new

    async def _probe(self, name: str, call: Callable[[], Awaitable[Judged]]) -> Probe:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(2 * CALL_S + GRACE_S):
                outcome, recomputed, error = await call()
        except TimeoutError:
            outcome, recomputed, error = Outcome.HUNG, 0, ""
        return Probe(name, outcome, loop.time() - started, self._usual.get(name, 0.0), recomputed, error)

    async def _new(self, client: Client, prepared: Prepared) -> Judged:
        try:
            session = await self._loaded(client, prepared.new_document)
        except KVServiceError as error:
            return Outcome.ERROR, 0, _words(error)
        prepared.sessions[session] = 0
        return await self.ask(client, session, prepared.new_answer, FIRST)

    async def _whole_way(self, prepared: Prepared) -> bool:
        client = self._deployment.client
        await self._deployment.until_whole(RECOVERY_S)
        session, expected = await self._with_answer(client, RECOVERED_STORED_S, prepared.sessions)
        before = await self._restored_tokens()
        await client.move_session(session, self.other((await client.get(session)).worker_id))
        outcome, _, _ = await self.ask(client, session, expected)
        return outcome in (Outcome.SAME, Outcome.RECOMPUTED) and await self._restored_tokens() > before

    async def _with_answer(
        self, client: Client, stored_s: float = STORED_S, sessions: dict[str, int] | None = None
    ) -> tuple[str, Expected]:
        """A session with a document of its own and one question behind it, stored within `stored_s`; and the answer to
        `QUESTION`. It is noted in `sessions`, whatever becomes of it, to be closed in the end."""
        session = await self._loaded(client, self._document())
        if sessions is not None:
            sessions[session] = 0
        await put(client, session, FIRST)
        await self._stored(client, session, stored_s)
        fork = (await client.fork_session(session)).session_id
        if sessions is not None:
            sessions[fork] = 0
        answer = self._expected(await put(client, fork, QUESTION))
        await client.close_session(fork, purge=True)
        if sessions is not None:
            del sessions[fork]
        return session, answer

    def _expected(self, answer: Answer) -> Expected:
        return Expected.of(answer) if self._is_alone else Expected(answer.token_ids, ())

    async def _loaded(self, client: Client, document: str) -> str:
        # The client repeats it while it is refused.
        async with asyncio.timeout(2 * CALL_S):
            session = (await client.create_session(recipe=self._recipe)).session_id
        await client.append(session, document, timeout_s=CALL_S)
        return session

    async def _stored(self, client: Client, session: str, stored_s: float) -> None:
        """Waits until a manifest names the session's frames."""
        async with asyncio.timeout(stored_s):
            while True:
                if (await client.verify(self._tenant, session)).checked_frames:
                    return
                await asyncio.sleep(POLL_S)

    async def _misses_or_none(self) -> Counter[str] | None:
        try:
            return await self.misses()
        except KVServiceError:
            return None

    async def _restored_tokens(self) -> int:
        return sum(worker.ledger.restored_tokens for worker in (await self._deployment.client.stats()).workers)

    def _document(self) -> str:
        return "".join(self._rng.choice("abcdefghij klmnop.\n") for _ in range(DOCUMENT_TOKENS))


async def judged(call: Callable[[], Awaitable[Answer]], expected: Expected) -> Judged:
    """What became of a call: its outcome, the tokens that were computed again, and the error's words."""
    try:
        answer = await call()
    except KVServiceError as error:
        return Outcome.ERROR, 0, _words(error)
    recomputed = answer.finished.usage.recomputed_tokens
    is_same = expected.fits(answer)
    if recomputed:
        return (Outcome.RECOMPUTED if is_same else Outcome.FLAGGED), recomputed, ""
    return (Outcome.SAME if is_same else Outcome.WRONG), 0, ""


def _words(error: KVServiceError) -> str:
    return f"{error.status} {error.reason}: {error.message}"[:200]
