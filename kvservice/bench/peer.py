"""Speed of transformers on the same model, under the same load: eager, one batch at a time, as a user of it would."""

from __future__ import annotations

import random
import time

from kvservice.bench.engine import EngineRow, Load, medians
from kvservice.bench.load import random_ids
from kvservice.models.peer import Peer


def measure_peer(peer: Peer, vocab_size: int, load: Load, repeats: int) -> EngineRow:
    """Reads the documents as one batch, then times its steps; as often as `repeats` says. Blocks."""
    rng = random.Random(load.seed)
    peer.read([random_ids(rng, 64, vocab_size)])
    peer.step()
    prefill_s, step_s = [], []
    for _ in range(repeats):
        documents = [random_ids(rng, load.prompt_tokens, vocab_size) for _ in range(load.batch)]
        started = time.perf_counter()
        peer.read(documents)
        prefill_s.append(time.perf_counter() - started)
        steps = []
        for _ in range(load.new_tokens):
            started = time.perf_counter()
            peer.step()
            steps.append(time.perf_counter() - started)
        step_s.append(steps)
    return medians(load, prefill_s, step_s)
