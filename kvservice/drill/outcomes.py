"""What a drill finds: of each call under a fault, of each fault, and whether that is as it must be. Knows no service.

same        the fault-free answer, bit for bit
recomputed  the same bits, computed anew, and flagged as such
flagged     other bits, but flagged as recomputed: allowed to a lossy recipe without replay
error       refused, with a status and a reason
wrong       other bits without a flag; a kind of its own
hung        nothing by the deadline and a grace
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class Outcome(enum.Enum):
    """What became of one call."""

    SAME = "same"
    RECOMPUTED = "recomputed"
    FLAGGED = "flagged"
    ERROR = "error"
    WRONG = "wrong"
    HUNG = "hung"


NEVER = frozenset({Outcome.WRONG, Outcome.HUNG})
"""What no fault excuses."""

MAX_RECOVERY_S = 10.0
"""Full speed must be back so soon after a fault ends."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One call that was made under a fault.

    Attributes:
        name: what was called.
        seconds: that it took.
        usual_s: that it takes without a fault.
        recomputed_tokens: as the answer says.
        error: its reason, and what it says; empty without one.
    """

    name: str
    outcome: Outcome
    seconds: float
    usual_s: float = 0.0
    recomputed_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class DataReport:
    """What there is of the tenant after a fault, and once all its sessions are closed with purge.

    Attributes:
        short_sessions: sessions that hold fewer tokens than were reported durable, or are gone.
        checked_frames: that manifests name and that are there.
        missing_frames: that manifests name and that are gone: time, no data.
        corrupt_frames: that fail their checks: found out, so time, no data.
        left_frames: after the purge.
        left_bytes: charged or reserved after the purge.
    """

    short_sessions: int = 0
    checked_frames: int = 0
    missing_frames: int = 0
    corrupt_frames: int = 0
    left_frames: int = 0
    left_bytes: int = 0


@dataclass(frozen=True, slots=True)
class FaultReport:
    """What one fault did.

    Attributes:
        name: of the fault.
        part: where it struck: tier, state or process.
        probes: calls made under it.
        misses: frames not read under it, by reason; `write:…` those not written.
        recovered_s: from the end of the fault until a session was read, stored, moved and answered as ever; None: not.
        findings: sentences on what isn't as it must be; empty: passed.
        paused_s: the longest time in which the drill itself didn't get to run.
    """

    name: str
    part: str
    probes: tuple[Probe, ...] = ()
    misses: Mapping[str, int] = field(default_factory=dict)
    recovered_s: float | None = None
    data: DataReport = field(default_factory=DataReport)
    findings: tuple[str, ...] = ()
    paused_s: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all is as it must be."""
        return not self.findings


def judge(
    probes: tuple[Probe, ...],
    recovered_s: float | None,
    data: DataReport,
    misses: Mapping[str, int],
    *,
    expects: frozenset[str] = frozenset(),
    may_fail: bool = False,
    max_recovery_s: float = MAX_RECOVERY_S,
    most_s: float = 0.0,
) -> tuple[str, ...]:
    """What isn't as it must be, in sentences.

    Args:
        probes: made under the fault.
        recovered_s: see `FaultReport`.
        data: after the fault.
        misses: by reason.
        expects: reasons of which at least one must have been counted; empty: none need be.
        may_fail: a clear error is as good an answer as a right one.
        max_recovery_s: within which full speed must be back.
        most_s: so long a call may take; 0: however long.
    """
    findings = []
    for probe in probes:
        if probe.outcome in NEVER or (probe.outcome is Outcome.ERROR and not may_fail):
            findings.append(f"{probe.name}: {probe.outcome.value}{f' ({probe.error})' if probe.error else ''}")
    for probe in probes:
        if most_s and probe.seconds > most_s:
            findings.append(f"{probe.name} took {probe.seconds:.1f} s: more than {most_s:.0f}")
    if recovered_s is None:
        findings.append("it did not recover")
    elif recovered_s > max_recovery_s:
        findings.append(f"full speed was back after {recovered_s:.1f} s: more than {max_recovery_s:.0f}")
    if data.short_sessions:
        findings.append(f"{data.short_sessions} sessions hold less than was durable")
    if data.left_frames or data.left_bytes:
        findings.append(f"after the purge {data.left_frames} frames and {data.left_bytes} bytes were left")
    if expects and not expects & misses.keys():
        findings.append(f"no miss was counted as one of {', '.join(sorted(expects))}: {dict(misses) or 'none at all'}")
    return tuple(findings)
