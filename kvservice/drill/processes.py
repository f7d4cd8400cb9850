"""Processes killed or frozen in the middle of a call: is the call carried out once, and is nobody's late word taken?

call begins ─► at a random point: victim killed, or frozen ─► repeat under the same request id, where it isn't ─►
victim started again, or thawed ─► what does the session hold, and does it go on as if nothing had happened?
"""

from __future__ import annotations

import asyncio
import enum
import random
import signal
from collections.abc import Awaitable
from dataclasses import dataclass

from kvservice.client import Client
from kvservice.drill.caller import CallerProcess
from kvservice.drill.calls import EXTRA, FIRST, Call, carry_out, put
from kvservice.drill.deployment import TENANT, Deployment
from kvservice.drill.examine import GRACE_S, QUESTION, Examiner, Expected, Prepared
from kvservice.drill.outcomes import FaultReport, Outcome, Probe, judge
from kvservice.errors import KVServiceError, NotFound, Unavailable

PROCESS = "process"
FROZEN_S = 16.0
"""Longer than a worker's lease, a session's lock and a keepalive: it is given up by all others before it is back."""
START_TRIES = 3
CONNECTING_S = 0.02
"""About what a client takes until its call is on its way."""
REPEAT_PAUSE_S = 0.2
REPEAT_S = 45.0
"""A call that was cut short is carried out, by repeating it, within this time."""


class Victim(enum.Enum):
    """Whom the fault strikes."""

    WORKER = "worker"
    """The one that holds the session."""
    GATEWAY = "gateway"
    """The one that is called."""
    CLIENT = "client"


class Blow(enum.Enum):
    """What is done to it."""

    KILL = "killed"
    FREEZE = "frozen"


@dataclass(frozen=True, slots=True)
class ProcessFault:
    """One blow during one call."""

    victim: Victim
    blow: Blow
    call: Call

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.victim.value} {self.blow.value} in {self.call.value}"


PROCESS_FAULTS = tuple(
    ProcessFault(victim, blow, call)
    for victim, blow in (
        (Victim.WORKER, Blow.KILL),
        (Victim.WORKER, Blow.FREEZE),
        (Victim.GATEWAY, Blow.KILL),
        (Victim.GATEWAY, Blow.FREEZE),
        (Victim.CLIENT, Blow.KILL),
        (Victim.CLIENT, Blow.FREEZE),
    )
    for call in Call
)
REDUCED_PROCESS_FAULTS = (ProcessFault(Victim.WORKER, Blow.KILL, Call.GENERATE),)


@dataclass(frozen=True, slots=True)
class _Scene:
    """One session, what is done to it, and what must come of it."""

    session: str
    num_tokens: int
    """After the call, carried out once."""
    after: Expected
    """The answer to `QUESTION` then."""


class ProcessExaminer:
    """Strikes processes of one deployment.

    Args:
        deployment: whole.
        examiner: of the same deployment.
    """

    def __init__(self, deployment: Deployment, examiner: Examiner) -> None:
        self._deployment = deployment
        self._examiner = examiner
        self._rng = random.Random(deployment.config.seed)
        self._usual: dict[Call, float] = {}

    async def _rehearse(self, call: Call) -> None:
        """Learns how long a call takes, so that blows fall within it."""
        prepared = await self._examiner.prepare()
        scene = await self._scene(prepared, call)
        loop = asyncio.get_running_loop()
        started = loop.time()
        await self._carry_out(self._deployment.client, call, scene, f"rehearsal-{call.value}", prepared)
        self._usual[call] = loop.time() - started
        await self._examiner.data(prepared)

    async def examine(self, fault: ProcessFault) -> FaultReport:
        """One blow, from a whole deployment to a whole deployment."""
        if fault.call not in self._usual:
            await self._rehearse(fault.call)
        prepared = await self._examiner.prepare()
        scene = await self._scene(prepared, fault.call)
        victim = await self._victim(fault, scene)
        request_id = f"{fault.name.replace(' ', '-')}-{self._rng.randrange(1 << 30)}"
        before = await self._examiner.misses()
        after_s = self._rng.uniform(0.0, self._usual[fault.call])
        if fault.victim is Victim.CLIENT:
            probe = await self._client_struck(fault, scene, request_id, prepared, after_s)
        else:
            call = asyncio.create_task(
                self._carry_out(self._deployment.client, fault.call, scene, request_id, prepared)
            )
            await asyncio.sleep(after_s)
            healing = await self._strike(fault, victim)
            if fault.victim is Victim.GATEWAY:
                # Its answer isn't awaited: who is left takes the request on.
                call.cancel()
            probe = await self._settled(fault, scene, request_id, prepared, call)
            await healing
        recovered_s = await self._examiner.recovered(prepared)
        aftermath = await self._aftermath(fault.call, scene)
        misses = await self._examiner.misses() - before
        data = await self._examiner.data(prepared)
        probes = (probe, aftermath)
        findings = judge(probes, recovered_s, data, misses, max_recovery_s=self._examiner.max_recovery_s)
        return FaultReport(fault.name, PROCESS, probes, dict(misses), recovered_s, data, findings)

    async def _scene(self, prepared: Prepared, call: Call) -> _Scene:
        """The session that the call is made on is the warm one; another fork shows what must come of it."""
        client = self._deployment.client
        session = prepared.warm
        reference = (await client.fork_session(session)).session_id
        match call:
            case Call.APPEND:
                await client.append(reference, EXTRA)
            case Call.GENERATE:
                await put(client, reference, FIRST)
        num_tokens = (await client.get(reference)).num_tokens
        after = Expected.of(await put(client, reference, QUESTION))
        await client.close_session(reference, purge=True)
        return _Scene(session, num_tokens, after)

    async def _carry_out(self, client: Client, call: Call, scene: _Scene, request_id: str, prepared: Prepared) -> None:
        """The call, once; all that it makes is noted, so that it is closed in the end."""
        made = await carry_out(client, call, scene.session, request_id)
        if made is not None:
            prepared.sessions[made.session] = made.durable_tokens
        if call is Call.CLOSE:
            prepared.sessions.pop(scene.session, None)

    async def _victim(self, fault: ProcessFault, scene: _Scene) -> str:
        match fault.victim:
            case Victim.WORKER:
                return (await self._deployment.client.get(scene.session)).worker_id
            case Victim.GATEWAY:
                return self._deployment.config.gateways[0]
            case Victim.CLIENT:
                return ""

    async def _client_struck(
        self, fault: ProcessFault, scene: _Scene, request_id: str, prepared: Prepared, after_s: float
    ) -> Probe:
        """A client in a process of its own calls, and is struck; another repeats its request elsewhere."""
        gateway = self._deployment.config.gateways[0]
        address, key = self._deployment.processes[gateway].address, self._deployment.keys[TENANT]
        caller = CallerProcess(address, key, fault.call, scene.session, request_id)
        await caller.start()
        try:
            caller.call()
            await asyncio.sleep(CONNECTING_S + after_s)
            caller.send_signal(signal.SIGKILL if fault.blow is Blow.KILL else signal.SIGSTOP)
            probe = await self._settled(fault, scene, request_id, prepared, None)
            if fault.blow is Blow.FREEZE:
                caller.send_signal(signal.SIGCONT)
                # It goes on where it was: its late word must change nothing.
                await caller.ended()
        finally:
            await caller.end()
        return probe

    async def _strike(self, fault: ProcessFault, victim: str) -> Awaitable[None]:
        """Strikes; what is given back heals, in its time."""
        process = self._deployment.processes[victim]
        if fault.blow is Blow.KILL:
            await process.kill()

            async def start() -> None:
                for tries_left in reversed(range(START_TRIES)):
                    try:
                        await process.start()
                        return
                    except Unavailable:
                        # On a machine that is busy enough a server may not answer in time.
                        if not tries_left:
                            raise

            return asyncio.create_task(start())
        process.send_signal(signal.SIGSTOP)

        async def thaw() -> None:
            await asyncio.sleep(FROZEN_S)
            process.send_signal(signal.SIGCONT)

        return asyncio.create_task(thaw())

    async def _settled(
        self, fault: ProcessFault, scene: _Scene, request_id: str, prepared: Prepared, call: asyncio.Task[None] | None
    ) -> Probe:
        """The call is carried out, by itself or by being repeated at a gateway that wasn't struck."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        name, errors = fault.call.value, []
        try:
            async with asyncio.timeout(REPEAT_S + GRACE_S):
                try:
                    if call is not None:
                        await call
                except (KVServiceError, asyncio.CancelledError) as error:
                    errors.append(type(error).__name__)
                while not await self._repeated(fault.call, scene, request_id, prepared, errors):
                    if loop.time() - started > REPEAT_S:
                        return Probe(name, Outcome.ERROR, loop.time() - started, error="; ".join(errors[-3:]))
                    await asyncio.sleep(REPEAT_PAUSE_S)
        except TimeoutError:
            return Probe(name, Outcome.HUNG, loop.time() - started, error="; ".join(errors[-3:]))
        if fault.call is Call.CLOSE:
            prepared.sessions.pop(scene.session, None)
        usual_s = self._usual[fault.call]
        return Probe(name, Outcome.SAME, loop.time() - started, usual_s, error="; ".join(errors[-1:]))

    async def _repeated(
        self, call: Call, scene: _Scene, request_id: str, prepared: Prepared, errors: list[str]
    ) -> bool:
        """Whether the call has been carried out now. After one that went well this gives the outcome that was kept."""
        client = self._deployment.clients[self._deployment.config.gateways[-1]]
        try:
            await self._carry_out(client, call, scene, request_id, prepared)
        except KVServiceError as error:
            errors.append(f"{error.status} {error.reason}: {error.message}"[:120])
            # Carried out, and nobody knows the answer any more: what came of it is looked at later.
            is_closed = isinstance(error, NotFound) and call is Call.CLOSE
            return is_closed or error.reason == "answer_lost"
        return True

    async def _aftermath(self, call: Call, scene: _Scene) -> Probe:
        """What the session holds, and what it answers now."""
        client = self._deployment.client
        if call is Call.CLOSE:
            try:
                info = await client.get(scene.session)
            except NotFound:
                return Probe("afterwards", Outcome.SAME, 0.0)
            return Probe("afterwards", Outcome.WRONG, 0.0, error=f"it is still there with {info.num_tokens} tokens")
        found = await client.get(scene.session)
        if found.num_tokens != scene.num_tokens:
            return Probe(
                "afterwards", Outcome.WRONG, 0.0, error=f"{found.num_tokens} tokens instead of {scene.num_tokens}"
            )
        loop = asyncio.get_running_loop()
        started = loop.time()
        outcome, recomputed, error = await self._examiner.ask(client, scene.session, scene.after)
        return Probe("afterwards", outcome, loop.time() - started, 0.0, recomputed, error)
