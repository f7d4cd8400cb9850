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
        stale_s: age of the hints that a gateway decides by, at most.
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
    nodes = ((index, node) for index in range(workers) for node in range(VIRTUAL_NODES))
    return sorted((_point(f"worker {index} {node}"), index) for index, node in nodes)


def _point(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
