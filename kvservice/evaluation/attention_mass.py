"""How much of dense attention falls on what a recipe attends to. Knows nothing of texts or tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvservice.compression.methods import EMPTY, Held, Scorer, Seen
from kvservice.config.recipes import RECIPES
from kvservice.engine import Engine
from kvservice.evaluation.calls import Report, ignore_progress, read_document
from kvservice.recall.memory import SequenceMemory
from kvservice.types import RecipeSpec, SessionId

EVERY = 4
"""Of the forced tokens, one in so many is looked at."""


@dataclass(frozen=True)
class Recorder(Scorer):
    """Ranks nothing: notes how the queries of an answer attend, averaged over the query heads of a KV head."""

    layers: list[Tensor] = field(default_factory=list)

    def watches(self, num_after: int) -> bool:  # noqa: ARG002 -- part of the protocol
        """See `Scorer`."""
        return True

    def observe(self, seen: Seen, remembered: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Scorer`."""
        self.layers.append(seen.probs[:, :, -1].mean(1))
        return remembered

    def score(self, held: Held) -> Tensor:
        """See `Scorer`."""
        return held.positions.float()


def dense_weights(
    engine: Engine, token_ids: Sequence[int], context_tokens: int, report: Report = ignore_progress
) -> dict[int, Tensor]:
    """How every fourth of the forced tokens attends when nothing is dropped: fp16 `[layers * kv, t]` by its position.

    Args:
        engine: has room for one more dense session.
        token_ids: the context, the forced tokens, and one more.
        context_tokens: how many are read as a document.
        report: told of every token that was computed.
    """
    session_id, spec = SessionId("weights"), RECIPES["drop-random"]
    assert spec.eviction is not None
    whole = replace(spec.eviction, kept_tokens=len(token_ids), read_tokens=2 * len(token_ids))
    weights: dict[int, Tensor] = {}
    try:
        read_document(engine, session_id, replace(spec, eviction=whole), token_ids[:context_tokens], report)
        held = engine.memory_of(session_id).held
        assert held is not None
        recorder = Recorder()
        held.stages = replace(held.stages, scorer=recorder)
        for position in range(context_tokens, len(token_ids) - 1):
            recorder.layers.clear()
            engine.score(session_id, token_ids[position : position + 1])
            if (position - context_tokens) % EVERY == 0:
                weights[position] = torch.cat(recorder.layers).half()
            report(1)
    finally:
        engine.release(session_id)
    return weights


def kept_mass(memory: SequenceMemory, weights: Tensor) -> float | None:
    """Of a query's dense weights, the share that falls on what a session holds and the query's own token, on average.

    None for a session that drops nothing.
    """
    if memory.held is None:
        return None
    positions = memory.held.positions.to(weights.device)
    there = weights.float().gather(1, positions.clamp(min=0)).masked_fill(positions == EMPTY, 0)
    return float((there.sum(1) + weights[:, -1].float()).mean())


def most_mass(weights: Tensor, kept_tokens: int) -> float:
    """What the best choice of so many tokens for each KV head would reach."""
    count = min(kept_tokens, weights.shape[1])
    return float(weights.float().topk(count, dim=1).values.sum(1).mean())


def tokens_read(memory: SequenceMemory, recipe: RecipeSpec) -> float:
    """Tokens whose KV the queries of an answer read, for each KV head of a layer, on average."""
    total = memory.state.num_computed
    if memory.held is not None:
        return float((memory.held.positions != EMPTY).sum(1).float().mean())
    if memory.looking is not None:
        looked, reused = memory.looking.num_looked, memory.looking.num_reused
        few = min(total, memory.looking.plan.tokens)
        return (looked * total + reused * few) / max(1, looked + reused)
    if recipe.recalled_tokens:
        return float(memory.state.num_resident + min(recipe.recalled_tokens, memory.state.num_distant))
    return float(total)
