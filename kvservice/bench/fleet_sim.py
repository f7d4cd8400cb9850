"""Placement tried on simulated fleets: turns of sessions in order of time, a queue and KV for each worker.

    turns (synthetic, or recorded) ─► policy chooses a worker ─► its queue · fetch · prefill ─► time to first token
                                      by hints that are old

The policy `placement` is `gateway.placement.place` itself, on views as a gateway has them. A worker is one queue of
prefills and a bounded set of sessions, the least recently used of which goes first; all KV is in the kv Redis too.
Not simulated: decoding, beyond the slots it takes, and the time of the decision itself.
"""

from __future__ import annotations

import csv
import hashlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvservice.config.recipes import DENSE
from kvservice.errors import ConfigError
from kvservice.gateway.placement import PlacementRequest, WorkerView, place
from kvservice.types import Headroom, Load, ModelInfo, ModelShape, WorkerId

SHAPE = ModelShape(
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    hidden_size=4096,
    intermediate_size=14336,
    vocab_size=128_256,
    max_positions=131_072,
)
"""Of an 8B model: 131,072 bytes of KV a token."""
MODEL = ModelInfo("simulated", SHAPE, (DENSE.name,), DENSE.name, "a simulation")

Floats = NDArray[np.float64]

QUESTION_TOKENS = 64
ANSWER_TOKENS = 192
VIRTUAL_NODES = 100
"""Of a worker on the ring of consistent hashing."""
DRAWN = 2
"""Workers beside the holders and the least busy one that a call is ranked on: a gateway with few workers ranks all."""
TRACE_COLUMNS = ("time_s", "session", "document", "document_tokens")


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """A synthetic fleet and its load.

    Attributes:
        workers: how many.
        sessions: how many, all in all.
        tenants: whose sizes are skewed: the k-th has 1/k^skew of the sessions.
        documents_a_tenant: that its sessions are about, skewed alike.
        skew: exponent of both.
        turns: mean number of calls of a session; the first one reads the document.
        think_s: mean time between two of them.
        document_tokens: median length of a document; lengths are log-normal.
        prefill_tokens_per_s: of a worker.
        fetch_bytes_per_s: of a worker, from the kv Redis.
        held_tokens: whose KV a worker holds at most.
        utilisation: share of the workers' time that prefill would take if every turn were computed whole.
        gateways: that sessions are shared out between. Admission tells a gateway of the worker it has chosen.
        stale_s: age of its other hints, at most.
        seed: of everything that is drawn.
    """

    workers: int = 1000
    sessions: int = 100_000
    tenants: int = 500
    documents_a_tenant: int = 40
    skew: float = 1.1
    turns: float = 2.5
    think_s: float = 60.0
    document_tokens: int = 6000
    prefill_tokens_per_s: float = 8000.0
    fetch_bytes_per_s: float = 1.5e9
    held_tokens: int = 400_000
    utilisation: float = 0.9
    gateways: int = 4
    stale_s: float = 0.5
    seed: int = 7


@dataclass(frozen=True, slots=True)
class Turn:
    """One call of a session."""

    time_s: float
    session: int
    document: int
    document_tokens: int


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """How one policy did.

    Attributes:
        policy: its name.
        turns: calls placed.
        ttft_mean_s: time to the first token, queue and all.
        ttft_p50_s: of half of the calls, at most.
        ttft_p99_s: of 99 in a hundred, at most.
        moved_bytes: read from the kv Redis.
        computed_tokens: by prefill.
        found_fraction: of the tokens given, those whose KV was on the worker.
        imbalance: prefill and fetch time of the busiest worker over the mean.
    """

    policy: str
    turns: int
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    moved_bytes: int
    computed_tokens: int
    found_fraction: float
    imbalance: float


def synthetic_turns(load: FleetLoad) -> list[Turn]:
    """The turns of a load, in order of time. Sessions begin at a steady rate that gives the utilisation asked for."""
    draw = np.random.default_rng(load.seed)
    tenants = draw.choice(load.tenants, load.sessions, p=_zipf(load.tenants, load.skew))
    ranks = draw.choice(load.documents_a_tenant, load.sessions, p=_zipf(load.documents_a_tenant, load.skew))
    documents = tenants * load.documents_a_tenant + ranks
    lengths = np.exp(draw.normal(np.log(load.document_tokens), 0.5, load.tenants * load.documents_a_tenant))
    tokens = np.clip(lengths, 256, 60_000).astype(np.int64)
    counts = draw.geometric(1.0 / load.turns, load.sessions)
    given = tokens[documents] * counts + (QUESTION_TOKENS + ANSWER_TOKENS) * counts * (counts + 1) // 2
    horizon_s = float(given.sum()) / load.prefill_tokens_per_s / (load.workers * load.utilisation)
    starts = np.sort(draw.uniform(0.0, horizon_s, load.sessions))
    sessions = np.repeat(np.arange(load.sessions), counts)
    waits = draw.exponential(load.think_s, len(sessions))
    firsts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    waits[firsts] = 0.0
    since_start = np.cumsum(waits)
    times = starts[sessions] + since_start - since_start[firsts][sessions]
    order = np.argsort(times, kind="stable")
    found = zip(
        times[order].tolist(),
        sessions[order].tolist(),
        documents[sessions[order]].tolist(),
        tokens[documents[sessions[order]]].tolist(),
        strict=True,
    )
    return [Turn(*each) for each in found]


def recorded_turns(path: Path) -> list[Turn]:
    """The turns of a file of comma-separated columns `time_s, session, document, document_tokens`.

    Raises:
        ConfigError: it can't be read, or a column is missing or no number.
    """
    try:
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            missing = set(TRACE_COLUMNS) - set(rows.fieldnames or ())
            if missing:
                raise ConfigError(f"--trace {path}: no column {', '.join(sorted(missing))}")
            turns = [
                Turn(float(row["time_s"]), int(row["session"]), int(row["document"]), int(row["document_tokens"]))
                for row in rows
            ]
    except OSError as error:
        raise ConfigError(f"--trace {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--trace {path}: {error}") from None
    return sorted(turns, key=lambda turn: turn.time_s)


class _Worker:
    """A queue of prefills, and the sessions whose KV is held."""

    def __init__(self, index: int, load: FleetLoad) -> None:
        self.index = index
        self.busy_s = 0.0
        self.held: OrderedDict[int, tuple[int, int]] = OrderedDict()
        """Tokens and document by session, the least recently used first."""
        self.held_tokens = 0
        self.documents: dict[int, int] = {}
        """Sessions held by document."""
        self._capacity_tokens = load.held_tokens

    def hold(self, session: int, tokens: int, document: int) -> list[int]:
        """Holds a session's KV from now on; gives the documents that are gone with the sessions dropped for it."""
        if session in self.held:
            self._drop(session)
        self.held[session] = (tokens, document)
        self.held_tokens += tokens
        self.documents[document] = self.documents.get(document, 0) + 1
        gone = []
        while self.held_tokens > self._capacity_tokens and len(self.held) > 1:
            dropped = self._drop(next(iter(self.held)))
            if dropped not in self.documents:
                gone.append(dropped)
        return gone

    def found_tokens(self, turn: Turn) -> int:
        """Leading tokens of a turn whose KV is here."""
        own = self.held.get(turn.session)
        if own is not None:
            return own[0]
        return turn.document_tokens if turn.document in self.documents else 0

    def _drop(self, session: int) -> int:
        tokens, document = self.held.pop(session)
        self.held_tokens -= tokens
        self.documents[document] -= 1
        if not self.documents[document]:
            del self.documents[document]
        return document


class Simulation:
    """One run of one policy over a load's turns."""

    def __init__(self, load: FleetLoad, turns: Sequence[Turn]) -> None:
        self.load = load
        self.workers = [_Worker(index, load) for index in range(load.workers)]
        self.free_at = np.zeros(load.workers)
        """When each worker's queue is empty."""
        self._shown_free_at = np.zeros((load.gateways, load.workers))
        self.holder: dict[int, int] = {}
        """The worker of each session's last turn."""
        self.document_holders: dict[int, dict[int, None]] = {}
        self.draw = np.random.default_rng(load.seed + 1)
        self._turns = turns
        self._shown_at = -load.stale_s

    def run(self, choose: Callable[[Simulation, Turn, int], int], policy: str) -> PolicyRow:
        """Places every turn by `choose`, which is given the turn and its number of tokens before the question."""
        load = self.load
        base: dict[int, int] = {}
        waits: list[float] = []
        moved_bytes = computed_tokens = found_tokens = given_tokens = 0
        for turn in self._turns:
            if turn.time_s - self._shown_at >= load.stale_s:
                self._shown_at = turn.time_s
                self._shown_free_at[:] = self.free_at
            before = base.get(turn.session, 0)
            given = (before or turn.document_tokens) + QUESTION_TOKENS
            worker = self.workers[choose(self, turn, before)]
            found = min(worker.found_tokens(turn), given)
            fetched, spent_s = self._spend(max(0, before - found), given - found)
            start_s = max(turn.time_s, float(self.free_at[worker.index]))
            self.free_at[worker.index] = start_s + spent_s
            self.shown(turn)[worker.index] = self.free_at[worker.index]
            worker.busy_s += spent_s
            waits.append(start_s + spent_s - turn.time_s)
            moved_bytes += fetched * SHAPE.kv_bytes_per_token
            computed_tokens += given - found - fetched
            found_tokens += found
            given_tokens += given
            base[turn.session] = given + ANSWER_TOKENS
            self._hold(worker, turn, given + ANSWER_TOKENS)
        busy = np.array([worker.busy_s for worker in self.workers])
        return PolicyRow(
            policy=policy,
            turns=len(waits),
            ttft_mean_s=float(np.mean(waits)),
            ttft_p50_s=float(np.percentile(waits, 50)),
            ttft_p99_s=float(np.percentile(waits, 99)),
            moved_bytes=moved_bytes,
            computed_tokens=computed_tokens,
            found_fraction=found_tokens / given_tokens,
            imbalance=float(busy.max() / busy.mean()),
        )

    def shown(self, turn: Turn) -> Floats:
        """When each worker's queue is empty, as the turn's gateway knows it."""
        row: Floats = self._shown_free_at[turn.session % self.load.gateways]
        return row

    def _spend(self, stored: int, missing: int) -> tuple[int, float]:
        """Tokens that are fetched of the `stored` ones, and the seconds for all that is `missing`."""
        fetch_s = stored * SHAPE.kv_bytes_per_token / self.load.fetch_bytes_per_s
        if fetch_s >= stored / self.load.prefill_tokens_per_s:
            return 0, missing / self.load.prefill_tokens_per_s
        return stored, fetch_s + (missing - stored) / self.load.prefill_tokens_per_s

    def _hold(self, worker: _Worker, turn: Turn, tokens: int) -> None:
        self.holder[turn.session] = worker.index
        self.document_holders.setdefault(turn.document, {})[worker.index] = None
        for document in worker.hold(turn.session, tokens, turn.document):
            self.document_holders[document].pop(worker.index, None)


def by_placement(simulation: Simulation, turn: Turn, before: int) -> int:
    """`place`, on the session's holder, the least busy holder of its document, the least busy worker, and a few."""
    free_at = simulation.shown(turn)
    shortlist = {int(np.argmin(free_at)), *simulation.draw.integers(len(free_at), size=DRAWN).tolist()}
    holder = simulation.holder.get(turn.session, -1)
    if holder >= 0:
        shortlist.add(holder)
    if holders := simulation.document_holders.get(turn.document):
        shortlist.add(min(holders, key=free_at.__getitem__))
    given = (before or turn.document_tokens) + QUESTION_TOKENS
    request = PlacementRequest(
        MODEL.name,
        DENSE,
        given + ANSWER_TOKENS,
        str(holder) if holder >= 0 and turn.session in simulation.workers[holder].held else "",
        0,
        base_tokens=before,
        given_tokens=given,
        stored_tokens=before,
        prefixes={turn.document: turn.document_tokens},
    )
    return int(place(request, [_view(simulation, index, turn) for index in shortlist])[0])


def by_chance(simulation: Simulation, turn: Turn, before: int) -> int:
    """Any worker."""
    del turn, before
    return int(simulation.draw.integers(simulation.load.workers))


def by_least_load(simulation: Simulation, turn: Turn, before: int) -> int:
    """The worker with the shortest queue, as far as gateways know; of several any."""
    del before
    queues = np.maximum(simulation.shown(turn), turn.time_s)
    shortest = np.flatnonzero(queues == queues.min())
    return int(shortest[simulation.draw.integers(len(shortest))])


def by_session_hash(ring: Sequence[tuple[int, int]]) -> Callable[[Simulation, Turn, int], int]:
    """The session's place on a ring of workers: always the same one."""
    points = [point for point, _ in ring]

    def choose(simulation: Simulation, turn: Turn, before: int) -> int:
        del simulation, before
        return ring[bisect_left(points, _point(f"session {turn.session}")) % len(ring)][1]

    return choose


POLICIES = ("placement", "random", "least_loaded", "consistent_hash")


def simulate(load: FleetLoad, turns: Sequence[Turn], policy: str) -> PolicyRow:
    """Runs one of POLICIES over the turns."""
    choices: dict[str, Callable[[], Callable[[Simulation, Turn, int], int]]] = {
        "placement": lambda: by_placement,
        "random": lambda: by_chance,
        "least_loaded": lambda: by_least_load,
        "consistent_hash": lambda: by_session_hash(_ring(load.workers)),
    }
    if policy not in choices:
        raise ConfigError(f"policy {policy!r}: choose of {', '.join(POLICIES)}")
    return Simulation(load, turns).run(choices[policy](), policy)


def _view(simulation: Simulation, index: int, turn: Turn) -> WorkerView:
    load, worker = simulation.load, simulation.workers[index]
    queue_s = max(0.0, float(simulation.shown(turn)[index]) - turn.time_s)
    # Sessions that nobody calls give way, so what is held is no obstacle, and its loss is in the hit rate.
    room = load.held_tokens * SHAPE.kv_bytes_per_token
    return WorkerView(
        WorkerId(str(index)),
        0,
        "",
        MODEL,
        Headroom(
            device_capacity_bytes=room,
            device_free_bytes=room,
            device_freeable_bytes=room,
            load=Load(
                waiting_tokens=int(queue_s * load.prefill_tokens_per_s),
                prefill_tokens_per_s=load.prefill_tokens_per_s,
                fetch_bytes_per_s=load.fetch_bytes_per_s,
                prefixes=(turn.document,) if turn.document in worker.documents else (),
            ),
        ),
    )


def _zipf(count: int, skew: float) -> Floats:
    weights: Floats = np.arange(1, count + 1, dtype=np.float64)
    weights **= -skew
    weights /= weights.sum()
    return weights


def _ring(workers: int) -> list[tuple[int, int]]:
    nodes = ((index, node) for index in range(workers) for node in range(VIRTUAL_NODES))
    return sorted((_point(f"worker {index} {node}"), index) for index, node in nodes)


def _point(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
