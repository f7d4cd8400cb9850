"""How good and how costly each way to choose distant tokens is, for many budgets, beside oracle and random choices.

Every recipe reads the same texts with the same window, so all choose among exactly the same distant tokens, and nothing
but the choice and its size differs. Tokens are forced one at a time, as decoding would compute them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvservice.config.recipes import DENSE, RECALL, RECIPES
from kvservice.engine import Engine
from kvservice.errors import InvalidRequest
from kvservice.evaluation.bootstrap import bootstrap_interval
from kvservice.evaluation.calls import Report, ignore_progress, read_document
from kvservice.evaluation.quality import SCORED_AT_ONCE, Distances, distances
from kvservice.recall.distant import TILE_TOKENS
from kvservice.types import BLOCK_TOKENS, Distant, KvTelemetry, RecipeSpec, SessionId

COMPARED: tuple[str, ...] = tuple(
    name for name, recipe in RECIPES.items() if recipe.distant is Distant.RECALL and not recipe.shares_keys
)
"""Recipes that choose distant tokens, in each layer its own."""

ORACLE = "recall-oracle"


def with_budgets(names: Iterable[str], budgets: Sequence[int], dtype_bytes: int) -> list[RecipeSpec]:
    """Each recipe with each budget, and all with one window.

    Raises:
        InvalidRequest: a recipe doesn't choose among distant tokens, or a budget doesn't fit recall slots.
    """
    for budget in budgets:
        if budget % BLOCK_TOKENS or not 0 < budget <= TILE_TOKENS:
            raise InvalidRequest(f"a budget of {budget} tokens: must be a multiple of {BLOCK_TOKENS} to {TILE_TOKENS}")
    specs = []
    for name in names:
        recipe = RECIPES[name]
        if name not in COMPARED:
            raise InvalidRequest(f"recipe {name!r} doesn't choose in each layer: choose among {', '.join(COMPARED)}")
        bits = 8 * dtype_bytes if name == ORACLE else recipe.index_bits
        same = replace(recipe, window_tokens=RECALL.window_tokens, index_bits=bits)
        specs += [replace(same, recalled_tokens=budget) for budget in budgets]
    return specs


@dataclass(frozen=True, slots=True)
class Measured:
    """One recipe and budget on one text. `kv` is that of the forced tokens alone, its bytes those at their end."""

    distances: Distances
    nll_dense: Tensor
    kv: KvTelemetry


def measure_text(
    engine: Engine,
    specs: Sequence[RecipeSpec],
    token_ids: Sequence[int],
    context_tokens: int,
    report: Report = ignore_progress,
) -> list[Measured]:
    """Measures recipes on one text, one after the other. Blocks for seconds for each.

    Args:
        engine: has room for one session of this length, dense too.
        specs: what is measured.
        token_ids: the context, the forced tokens, and one more.
        context_tokens: how many are read as a document.
        report: told of every token that was computed.

    Raises:
        KVServiceError: a session doesn't fit in the engine's budget.
    """
    targets = torch.tensor(token_ids[context_tokens + 1 :])
    reference, _ = logits_under(engine, DENSE, token_ids, context_tokens, report)
    dense = distances(reference, reference, targets)
    measured = []
    for spec in specs:
        logits, kv = logits_under(engine, spec, token_ids, context_tokens, report)
        measured.append(Measured(distances(reference, logits, targets), dense.nll, kv))
    return measured


def logits_under(
    engine: Engine, spec: RecipeSpec, token_ids: Sequence[int], context_tokens: int, report: Report
) -> tuple[Tensor, KvTelemetry]:
    """The logits after each forced token, fp32 `[n, vocab]`, and what recalling them took."""
    session_id = SessionId("sweep")
    try:
        read_document(engine, session_id, spec, token_ids[:context_tokens], report)
        streamed = engine.telemetry(session_id).streamed_bytes
        parts = []
        for start in range(context_tokens, len(token_ids) - 1, SCORED_AT_ONCE):
            forced = token_ids[start : min(start + SCORED_AT_ONCE, len(token_ids) - 1)]
            parts.append(engine.score(session_id, forced))
            report(len(forced))
        # A document is read without recalling anything, so all that was recalled was for the forced tokens.
        kv = engine.telemetry(session_id)
        return torch.cat(parts), replace(kv, streamed_bytes=kv.streamed_bytes - streamed)
    finally:
        engine.release(session_id)


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One recipe and budget over all texts, each weighing the same. Bytes are those of one session, or of one token.

    Attributes:
        recipe: its name.
        recalled_tokens: for each KV head and query.
        kl_mean: KL(dense ‖ recipe) of the next token, in nats.
        kl_interval: of 95 %, or None when none was asked for.
        top1_agreement: share of tokens for which both rank the same one first.
        nll_change: of the texts' own tokens, against dense, in nats.
        recalled_bytes_per_token: moved from host to device for a forced token: chosen tokens that weren't in a slot.
        streamed_bytes_per_token: moved besides, to keep the index: ClusterKV reads keys back to cluster them.
        hit_rate: share of chosen tokens that were in a slot.
        index_bytes: on the device.
        slot_bytes: on the device.
        scanned_fraction: of groups that an index that bounds their scores scored token by token; None for others.
    """

    recipe: str
    recalled_tokens: int
    kl_mean: float
    kl_interval: tuple[float, float] | None
    top1_agreement: float
    nll_change: float
    recalled_bytes_per_token: float
    streamed_bytes_per_token: float
    hit_rate: float
    index_bytes: int
    slot_bytes: int
    scanned_fraction: float | None


def summarize(spec: RecipeSpec, texts: Sequence[Measured], *, bootstrap_seed: int | None) -> SweepRow:
    """The figures of one recipe and budget over at least one text; without a seed there is no interval."""
    kl = [text.distances.kl for text in texts]
    kv = [text.kv for text in texts]
    num_tokens = sum(values.shape[0] for values in kl)
    groups, lookups = sum(one.index_groups for one in kv), sum(one.recall_lookups for one in kv)
    return SweepRow(
        recipe=spec.name,
        recalled_tokens=spec.recalled_tokens,
        kl_mean=_mean(kl),
        kl_interval=None if bootstrap_seed is None else bootstrap_interval(kl, bootstrap_seed),
        top1_agreement=_mean([text.distances.agrees for text in texts]),
        nll_change=_mean([text.distances.nll - text.nll_dense for text in texts]),
        recalled_bytes_per_token=sum(one.recalled_bytes for one in kv) / num_tokens,
        streamed_bytes_per_token=sum(one.streamed_bytes for one in kv) / num_tokens,
        hit_rate=sum(one.recall_hits for one in kv) / lookups if lookups else 0.0,
        index_bytes=kv[0].index_bytes,
        slot_bytes=kv[0].slot_bytes,
        scanned_fraction=sum(one.index_groups_scanned for one in kv) / groups if groups else None,
    )


def _mean(texts: Sequence[Tensor]) -> float:
    return float(torch.stack([values.float().mean() for values in texts]).mean())
