"""What is amiss with a deployment, and what to do about it. Facts in, findings out: knows no connection.

The order of findings is that of the facts; each says what it looked at, what it found, and, if that isn't good, what to
do.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvservice.client import ServiceStats, WorkerReport
from kvservice.store.servers import Problem, ServerFacts, problems_of_kv, problems_of_state

SLOW_MS = 5.0
"""A round trip to a Redis on the same network takes a fraction of this."""
MAX_CLOCK_S = 1.0
"""Leases and expiries are compared across machines; they are seconds to days."""
LEAST_FILES = 4096
LEAST_SHARED_BYTES = 64 << 20
FULL = 0.9


class Level(enum.Enum):
    """How bad it is."""

    FINE = "fine"
    NOTE = "note"
    WARNING = "warning"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    level: Level
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class RedisFacts:
    """What one server says, and how fast.

    Attributes:
        role: that it has for us: state or kv.
        where: its URL without secrets.
        error: why nothing is known of it; the rest is empty then.
        run_id: of the server's process.
        replication: master or slave.
        facts: see `ServerFacts`.
        used_bytes: of its memory.
        is_on_disk: every write is fsynced before it is answered.
        num_replicas: connected to it.
        is_encrypted: the connection is.
        is_local: the server is on this machine.
        round_trip_ms: the median of a few.
        clock_ahead_s: of its clock before ours.
        evicted_keys: since it started.
        read_gb_per_s: of frames, read and checked; None: not measured.
    """

    role: str
    where: str
    error: str = ""
    run_id: str = ""
    replication: str = ""
    facts: ServerFacts = field(default_factory=ServerFacts)
    used_bytes: int = 0
    is_on_disk: bool = False
    num_replicas: int = 0
    is_encrypted: bool = False
    is_local: bool = True
    round_trip_ms: float = 0.0
    clock_ahead_s: float = 0.0
    evicted_keys: int = 0
    read_gb_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What this machine allows a process. `memory_bytes`: available now; `needed_bytes`: what a worker may take."""

    open_files: int
    shared_bytes: int
    memory_bytes: int
    needed_bytes: int = 0


def of_redis(facts: RedisFacts) -> list[Finding]:
    """Findings on one server."""
    subject = f"{facts.role} Redis"
    if facts.error:
        advice = "start it, or give the right URL; without it " + (
            "nothing is served" if facts.role == "state" else "sessions are computed again wherever they go on"
        )
        return [Finding(subject, Level.BROKEN, f"{facts.where}: {facts.error}", advice)]
    version = ".".join(map(str, facts.facts.version)) or "unknown"
    found = [Finding(subject, Level.FINE, f"{facts.where}: version {version}, {facts.used_bytes >> 20:,} MiB in use")]
    problems = problems_of_state if facts.role == "state" else problems_of_kv
    found += [_problem(subject, problem) for problem in problems(facts.facts, facts.where)]
    if facts.replication not in ("", "master"):
        advice = "name the primary, or its sentinels (redis+sentinel://…)"
        found.append(
            Finding(subject, Level.BROKEN, f"it is a replica ({facts.replication}): it takes no writes", advice)
        )
    if not facts.is_encrypted and not facts.is_local:
        advice = "use rediss://, or a network that nobody else is on: a bit that flips on the way into a record is kept"
        found.append(Finding(subject, Level.WARNING, "the connection isn't encrypted, and leaves this machine", advice))
    if facts.round_trip_ms > SLOW_MS:
        advice = "put it nearer, or look what else its machine does: each call pays three round trips to state"
        found.append(Finding(subject, Level.WARNING, f"a round trip takes {facts.round_trip_ms:.1f} ms", advice))
    if abs(facts.clock_ahead_s) > MAX_CLOCK_S:
        advice = "run a time service (chrony, systemd-timesyncd) on both machines"
        found.append(Finding(subject, Level.WARNING, f"its clock is {facts.clock_ahead_s:+.1f} s from ours", advice))
    found += _of_state(subject, facts) if facts.role == "state" else _of_kv(subject, facts)
    return found


def _problem(subject: str, problem: Problem) -> Finding:
    said, _, advice = problem.message.partition(". ")
    return Finding(subject, Level.BROKEN if problem.fatal else Level.WARNING, said, advice or "see docs/sessions.md")


def _of_state(subject: str, facts: RedisFacts) -> list[Finding]:
    if facts.is_on_disk:
        return [Finding(subject, Level.FINE, "every write is fsynced before it is answered: tokens are durable")]
    advice = "set appendonly yes and appendfsync always, else sessions end with the server and durable_tokens is 0"
    replicas = f", {facts.num_replicas} replicas" if facts.num_replicas else ""
    return [Finding(subject, Level.WARNING, f"writes aren't fsynced{replicas}", advice)]


def _of_kv(subject: str, facts: RedisFacts) -> list[Finding]:
    found = []
    most = facts.facts.maxmemory_bytes or 0
    if most and facts.used_bytes > FULL * most:
        said = f"{facts.used_bytes / most:.0%} of its memory is in use, {facts.evicted_keys:,} keys were evicted"
        found.append(Finding(subject, Level.NOTE, said, "give it more maxmemory if sessions are often computed again"))
    return found


def of_speed(facts: RedisFacts, break_even_gb_per_s: float | None) -> list[Finding]:
    """Whether reading KV back is faster than computing it."""
    if facts.read_gb_per_s is None:
        return []
    said = f"frames are read at {facts.read_gb_per_s:.2f} GB/s"
    if break_even_gb_per_s is None:
        advice = "give --address of a service that has worked, to compare it with the speed of its prefill"
        return [Finding("tier speed", Level.NOTE, said, advice)]
    said += f"; break-even with prefill is {break_even_gb_per_s:.2f}"
    if facts.read_gb_per_s >= break_even_gb_per_s:
        return [Finding("tier speed", Level.FINE, said)]
    advice = "workers compute what they could fetch: use a faster link or server, or codec zstd where the link is slow"
    return [Finding("tier speed", Level.WARNING, said, advice)]


def of_both(state: RedisFacts, kv: RedisFacts) -> list[Finding]:
    """Findings on the two servers together."""
    if not state.run_id or state.run_id != kv.run_id:
        return []
    advice = "give each a server of its own: kv evicts, and state must not"
    return [Finding("state and kv", Level.BROKEN, "both are one server", advice)]


def of_machine(facts: MachineFacts) -> list[Finding]:
    """Findings on the machine that this runs on."""
    found = []
    if facts.open_files < LEAST_FILES:
        advice = f"raise it to {LEAST_FILES} or more (ulimit -n, LimitNOFILE): each caller and link takes one"
        found.append(Finding("open files", Level.WARNING, f"a process may have {facts.open_files:,}", advice))
    if facts.shared_bytes < LEAST_SHARED_BYTES:
        advice = "mount a larger /dev/shm: Ray keeps its object store there"
        found.append(Finding("shared memory", Level.NOTE, f"{facts.shared_bytes >> 20:,} MiB are free", advice))
    if facts.needed_bytes > facts.memory_bytes:
        said = f"{facts.memory_bytes >> 20:,} MiB are free, a worker is told to use {facts.needed_bytes >> 20:,}"
        found.append(Finding("memory", Level.WARNING, said, "lower --kv-bytes or --host-bytes, or free memory"))
    return found or [Finding("this machine", Level.FINE, f"{facts.memory_bytes >> 20:,} MiB of memory free")]


def of_service(stats: ServiceStats) -> list[Finding]:
    """Findings on a running service."""
    found = [_of_fleet(stats), *(finding for worker in stats.workers for finding in _of_worker(worker))]
    by_model: dict[str, set[str]] = {}
    for worker in stats.workers:
        # Together, so that a worker without a map is told from those that have one.
        if worker.ledger.kv_fingerprint:
            kinds = f"{worker.ledger.kv_fingerprint} {worker.ledger.sharing_fingerprint}"
            by_model.setdefault(worker.model, set()).add(kinds)
    for model, fingerprints in by_model.items():
        if len(fingerprints) > 1:
            advice = "give all workers of a model the same weights, dtype and map: what one stores no other has use for"
            found.append(Finding(f"model {model}", Level.WARNING, f"{len(fingerprints)} kinds of stored KV", advice))
    for tenant in stats.tenants:
        if tenant.refused:
            advice = "raise its quota (kvservice tenants quota), or have it call less"
            said = f"{tenant.refused:,} of {tenant.requests:,} calls were refused for a quota"
            found.append(Finding(f"tenant {tenant.tenant}", Level.NOTE, said, advice))
    return found


def _of_worker(worker: WorkerReport) -> list[Finding]:
    found = []
    subject = f"worker {worker.worker_id}"
    if not worker.tier.connected:
        advice = "look whether the kv Redis is up and the worker's --redis-url right; until then nothing is stored"
        found.append(Finding(subject, Level.WARNING, "it is not in touch with the kv Redis", advice))
    if worker.tier.failures:
        found.append(Finding(subject, Level.NOTE, f"frames not written: {_counts(worker.tier.failures)}"))
    if worker.ledger.misses:
        found.append(Finding(subject, Level.NOTE, f"frames not read: {_counts(worker.ledger.misses)}"))
    if worker.ledger.failures:
        advice = "look at the state Redis and at the worker's log (not_published)"
        found.append(Finding(subject, Level.WARNING, f"not published: {_counts(worker.ledger.failures)}", advice))
    return found


def _of_fleet(stats: ServiceStats) -> Finding:
    said = f"version {stats.version}, {len(stats.workers)} workers, {stats.sessions} sessions held"
    if stats.draining:
        return Finding("service", Level.WARNING, f"{said}; it drains", "start it again, or call another gateway")
    if not stats.workers:
        advice = "start workers with the same state Redis, and look at their logs"
        return Finding("service", Level.BROKEN, said, advice)
    return Finding("service", Level.FINE, said)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()))


def worst(findings: Sequence[Finding]) -> Level:
    """The worst level among them."""
    order = list(Level)
    return max((finding.level for finding in findings), key=order.index, default=Level.FINE)
