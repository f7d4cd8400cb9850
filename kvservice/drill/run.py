"""A whole drill: a deployment, the faults one after another, and what they did. Prints nothing.

A fault from which the deployment doesn't recover gets a finding, and the next one a new deployment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from kvservice.drill.deployment import Deployment, DrillConfig, KvKind
from kvservice.drill.examine import Examiner
from kvservice.drill.faults import FAULTS, STATE, TIER, Fault
from kvservice.drill.faults_of_callers import INPUT, caller_faults
from kvservice.drill.faults_of_clusters import CLUSTER_FAULTS
from kvservice.drill.faults_of_machines import (
    MACHINE,
    MACHINE_FAULTS,
    NETWORK,
    NETWORK_FAULTS,
    has_own_network,
    open_own_network,
)
from kvservice.drill.faults_of_ray import RAY_FAULTS
from kvservice.drill.faults_of_threads import thread_faults
from kvservice.drill.outcomes import FaultReport
from kvservice.drill.processes import (
    PROCESS,
    PROCESS_FAULTS,
    REDUCED_PROCESS_FAULTS,
    ProcessExaminer,
    ProcessFault,
)
from kvservice.drill.stillness import TRIES, Stillness, found_in_peace
from kvservice.drill.writers import WritersFault, examine_writers
from kvservice.errors import ConfigError, KVServiceError

logger = logging.getLogger(__name__)

PARTS = (TIER, STATE, MACHINE, INPUT, PROCESS, NETWORK)


DEFAULT_PARTS = PARTS[:-1]
"""What needs no network of the drill's own."""


@dataclass(frozen=True, slots=True)
class DrillPlan:
    """What is tried, in this order."""

    faults: tuple[Fault, ...]
    process_faults: tuple[ProcessFault | WritersFault, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of all faults."""
        return (*(fault.name for fault in self.faults), *(fault.name for fault in self.process_faults))


def plan(*, reduced: bool, parts: Sequence[str] = DEFAULT_PARTS, only: Sequence[str] = ()) -> DrillPlan:
    """The faults to try.

    Args:
        reduced: the short form.
        parts: of the service that are struck.
        only: names; empty: all. A part of a name stands for all that have it.

    Raises:
        ConfigError: there is no such part or fault, or networks are to be cut that others may use.
    """
    if unknown := set(parts) - set(PARTS):
        raise ConfigError(f"unknown parts {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if NETWORK in parts and not has_own_network():
        raise ConfigError(
            f"part {NETWORK}: networks are cut in a namespace of the drill's own: run it by "
            f"`unshare --net --map-root-user kvservice drill --part {NETWORK}`"
        )
    known_faults = (
        *(*FAULTS, *MACHINE_FAULTS, *caller_faults(), *CLUSTER_FAULTS, *thread_faults()),
        *(*RAY_FAULTS, *NETWORK_FAULTS),
    )
    of_servers = [fault for fault in known_faults if fault.part in parts and (fault.reduced or not reduced)]
    of_processes: list[ProcessFault | WritersFault] = []
    if PROCESS in parts:
        of_processes += REDUCED_PROCESS_FAULTS if reduced else (WritersFault(), *PROCESS_FAULTS)
    found = DrillPlan(
        tuple(fault for fault in of_servers if _wanted(fault.name, only)),
        tuple(fault for fault in of_processes if _wanted(fault.name, only)),
    )
    if not found.names:
        known = ", ".join(DrillPlan(tuple(of_servers), tuple(of_processes)).names)
        raise ConfigError(f"no fault is called {', '.join(only)}: there are {known}")
    return found


async def run_drill(
    config: DrillConfig, recipe: str, wanted: DrillPlan, report: Callable[[FaultReport], None]
) -> list[FaultReport]:
    """Tries one fault after another; the first report is that of no fault. Takes seconds for each.

    Args:
        config: of the deployment.
        recipe: of the sessions.
        wanted: the faults.
        report: told of each fault as it is through.

    Raises:
        KVServiceError: the deployment can't be started, or doesn't work without a fault.
    """
    drill = _Drill(config, recipe)
    reports: list[FaultReport] = []

    if any(fault.part == NETWORK for fault in wanted.faults):
        await open_own_network()

    def note(found: FaultReport) -> None:
        reports.append(found)
        report(found)

    try:
        note(await drill.usual())
        for fault in wanted.faults:
            note(await drill.strike(fault))
        for process_fault in wanted.process_faults:
            note(await drill.strike(process_fault))
    finally:
        await drill.aclose()
    return reports


class _Drill:
    def __init__(self, config: DrillConfig, recipe: str) -> None:
        self._config = config
        self._recipe = recipe
        self._stack = AsyncExitStack()
        self._num_deployments = 0
        self._kind = (KvKind.ONE, False)
        self._examiner: Examiner | None = None
        self._processes: ProcessExaminer | None = None

    async def begin(self, kv: KvKind = KvKind.ONE, *, on_ray: bool = False) -> FaultReport:
        self._num_deployments += 1
        self._kind = (kv, on_ray)
        folder = self._config.folder / f"deployment-{self._num_deployments}"
        config = replace(self._config, folder=folder, kv=kv, on_ray=on_ray, has_keys=True)
        deployment = await self._stack.enter_async_context(Deployment(config))
        self._examiner = Examiner(deployment, self._recipe)
        self._processes = None
        self._deployment = deployment
        return await self._examiner.without_fault()

    async def usual(self) -> FaultReport:
        """What no fault does."""
        for tries_left in reversed(range(TRIES)):
            async with Stillness() as still:
                try:
                    return await self.begin()
                except (KVServiceError, TimeoutError):
                    await self.aclose()
                    if not (tries_left and still.is_long):
                        raise
        raise AssertionError("the last try returns or raises")

    async def strike(self, fault: Fault | ProcessFault | WritersFault) -> FaultReport:
        """One fault; again, where it was found wanting while the machine stood still."""
        return await found_in_peace(lambda: self._struck(fault))

    async def _struck(self, fault: Fault | ProcessFault | WritersFault) -> FaultReport:
        try:
            kv, on_ray = (fault.kv, fault.on_ray) if isinstance(fault, Fault) else (KvKind.ONE, False)
            if (kv, on_ray) != self._kind:
                await self.aclose()
            if self._examiner is None:
                await self.begin(kv, on_ray=on_ray)
            found = await self._strike(fault)
        except (KVServiceError, TimeoutError) as error:
            logger.exception("drill_broken")
            part = fault.part if isinstance(fault, Fault) else PROCESS
            found = FaultReport(fault.name, part, findings=(f"the deployment was broken: {error}"[:300],))
        if not found.passed:
            # What it left behind must not be the next one's.
            await self.aclose()
        return found

    async def _strike(self, fault: Fault | ProcessFault | WritersFault) -> FaultReport:
        assert self._examiner is not None
        if isinstance(fault, Fault):
            deployment = self._deployment
            return await self._examiner.examine(fault, lambda: fault.inject(deployment), lambda: fault.heal(deployment))
        if isinstance(fault, WritersFault):
            return await examine_writers(self._deployment, self._examiner)
        if self._processes is None:
            self._processes = ProcessExaminer(self._deployment, self._examiner)
        return await self._processes.examine(fault)

    async def aclose(self) -> None:
        self._examiner = self._processes = None
        await self._stack.aclose()
        self._stack = AsyncExitStack()


def _wanted(name: str, only: Sequence[str]) -> bool:
    return not only or any(word in name for word in only)
