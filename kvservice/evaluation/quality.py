"""How far a recipe's next-token distributions are from dense ones, on texts that the caller gives.

Every text is read to `context` tokens, and the tokens after that are forced, one at a time as decoding would compute
them: under `dense`, under the recipe, and under its two controls, which always stand beside it. The oracle recalls by
the true keys, so it is what the best index of that budget could reach; random is what no index would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvservice.config.recipes import DENSE, RECALL, RECIPES
from kvservice.engine import Engine
from kvservice.evaluation.bootstrap import bootstrap_interval
from kvservice.evaluation.calls import Report, ignore_progress, read_document
from kvservice.types import SINK_TOKENS, KvTelemetry, RecipeSpec, SessionId

SCORED_AT_ONCE = 32
"""Tokens whose logits are held at a time: 6 MB for each session of a vocabulary of 49,152."""


@dataclass(frozen=True, slots=True)
class Distances:
    """One recipe on one text, token by token, each `[n]`."""

    kl: Tensor
    """KL(dense ‖ recipe) in nats, fp32."""
    agrees: Tensor
    """Whether both rank the same token first, bool."""
    nll: Tensor
    """Of the text's next token, in nats, fp32."""


@dataclass(frozen=True, slots=True)
class TextResult:
    """All that was measured on one text. `kv` is the recipe's, at the end of the text."""

    name: str
    recipe: Distances
    oracle: Distances
    random: Distances
    nll_dense: Tensor
    kv: KvTelemetry


def distances(dense_logits: Tensor, logits: Tensor, targets: Tensor) -> Distances:
    """Compares logits, each `[n, vocab]`; `targets` are the tokens that really come next, int64 `[n]`."""
    dense = dense_logits.log_softmax(-1)
    other = logits.log_softmax(-1)
    return Distances(
        kl=(dense.exp() * (dense - other)).sum(-1).clamp_(min=0.0),
        agrees=dense.argmax(-1) == other.argmax(-1),
        nll=-other.gather(1, targets.unsqueeze(1)).squeeze(1),
    )


def controls(recipe: RecipeSpec, dtype_bytes: int) -> tuple[RecipeSpec, RecipeSpec]:
    """The oracle and the random control with the recipe's own window and budget."""
    recalled = recipe.recalled_tokens or RECALL.recalled_tokens
    oracle, random = (
        replace(RECIPES[name], window_tokens=recipe.window_tokens, recalled_tokens=recalled)
        for name in ("recall-oracle", "recall-random")
    )
    return replace(oracle, index_bits=8 * dtype_bytes), random


def tokens_needed(context_tokens: int, new_tokens: int) -> int:
    """The least length of a text: the last forced token needs a next one."""
    return context_tokens + new_tokens + 1


def measure_text(
    engine: Engine,
    recipe: RecipeSpec,
    name: str,
    token_ids: Sequence[int],
    context_tokens: int,
    report: Report = ignore_progress,
) -> TextResult:
    """Measures a recipe on one text. Blocks for minutes.

    Args:
        engine: has room for four sessions of this length, one of them dense.
        recipe: what is measured.
        name: of the text.
        token_ids: the context, the forced tokens, and one more.
        context_tokens: how many are read as a document.
        report: told of every token that was computed.

    Raises:
        KVServiceError: the sessions don't fit in the engine's budget.
    """
    oracle, random = controls(recipe, engine.info.shape.dtype_bytes)
    specs = {"dense": DENSE, "recipe": recipe, "oracle": oracle, "random": random}
    sessions = {role: SessionId(role) for role in specs}
    try:
        for role, spec in specs.items():
            read_document(engine, sessions[role], spec, token_ids[:context_tokens], report)
        parts = [
            _score(engine, sessions, token_ids[start : start + SCORED_AT_ONCE + 1], report)
            for start in range(context_tokens, len(token_ids) - 1, SCORED_AT_ONCE)
        ]
        kv = engine.telemetry(sessions["recipe"])
    finally:
        for session_id in sessions.values():
            engine.release(session_id)
    joined = {role: _join([part[role] for part in parts]) for role in specs}
    return TextResult(name, joined["recipe"], joined["oracle"], joined["random"], joined["dense"].nll, kv)


def _score(
    engine: Engine, sessions: Mapping[str, SessionId], token_ids: Sequence[int], report: Report
) -> dict[str, Distances]:
    """Forces all but the last of the tokens in every session; the first session is the reference."""
    forced, targets = token_ids[:-1], torch.tensor(token_ids[1:])
    compared: dict[str, Distances] = {}
    reference: Tensor | None = None
    for role, session_id in sessions.items():
        logits = engine.score(session_id, forced)
        reference = logits if reference is None else reference
        compared[role] = distances(reference, logits, targets)
        report(len(forced))
    return compared


def _join(parts: Sequence[Distances]) -> Distances:
    return Distances(
        kl=torch.cat([part.kl for part in parts]),
        agrees=torch.cat([part.agrees for part in parts]),
        nll=torch.cat([part.nll for part in parts]),
    )


@dataclass(frozen=True, slots=True)
class TextFigures:
    """Means over the tokens of one text."""

    name: str
    kl_mean: float
    oracle_kl_mean: float
    random_kl_mean: float
    top1_agreement: float
    nll: float
    nll_dense: float


@dataclass(frozen=True, slots=True)
class QualityFigures:
    """What `eval quality --json` promises. Means weigh every text the same; bytes are those of one session.

    Attributes:
        kl_mean: KL(dense ‖ recipe) of the next token, in nats.
        kl_interval: of 95 %, or None when none was asked for.
        top1_agreement: share of tokens for which both rank the same one first.
        nll: of the texts' own tokens under the recipe, in nats.
        nll_dense: under `dense`.
        oracle_kl_mean: of recall by the true keys, with the same window and budget.
        oracle_top1_agreement: its agreement.
        random_kl_mean: of recall of random tokens.
        random_top1_agreement: its agreement.
        device_kv_bytes: window, index and recall slots.
        host_kv_bytes: in the tier.
        dense_kv_bytes: what the same tokens take under `dense`.
        distant_bytes_saved_fraction: share of the distant tokens' KV bytes that is stored nowhere: 0 for every recipe
            that keeps all KV in some tier.
        recalled_tokens_per_kv_head: recalled by each query.
        num_tokens: measured, over all texts.
        texts: text by text.
    """

    kl_mean: float
    kl_interval: tuple[float, float] | None
    top1_agreement: float
    nll: float
    nll_dense: float
    oracle_kl_mean: float
    oracle_top1_agreement: float
    random_kl_mean: float
    random_top1_agreement: float
    device_kv_bytes: int
    host_kv_bytes: int
    dense_kv_bytes: int
    distant_bytes_saved_fraction: float
    recalled_tokens_per_kv_head: int
    num_tokens: int
    texts: tuple[TextFigures, ...]


def summarize(
    texts: Sequence[TextResult], recipe: RecipeSpec, kv_bytes_per_token: int, *, bootstrap_seed: int | None
) -> QualityFigures:
    """The figures over at least one text; without a seed there is no interval."""
    kv = texts[0].kv
    distant_tokens = recipe.window_start(kv.dense_bytes // kv_bytes_per_token) - SINK_TOKENS
    distant_bytes = distant_tokens * kv_bytes_per_token
    kl = [text.recipe.kl for text in texts]
    return QualityFigures(
        kl_mean=_mean(kl),
        kl_interval=None if bootstrap_seed is None else bootstrap_interval(kl, bootstrap_seed),
        top1_agreement=_mean([text.recipe.agrees for text in texts]),
        nll=_mean([text.recipe.nll for text in texts]),
        nll_dense=_mean([text.nll_dense for text in texts]),
        oracle_kl_mean=_mean([text.oracle.kl for text in texts]),
        oracle_top1_agreement=_mean([text.oracle.agrees for text in texts]),
        random_kl_mean=_mean([text.random.kl for text in texts]),
        random_top1_agreement=_mean([text.random.agrees for text in texts]),
        device_kv_bytes=kv.window_bytes + kv.index_bytes + kv.slot_bytes,
        host_kv_bytes=kv.host_bytes,
        dense_kv_bytes=kv.dense_bytes,
        distant_bytes_saved_fraction=max(0.0, 1 - kv.host_bytes / distant_bytes) if distant_bytes else 0.0,
        recalled_tokens_per_kv_head=recipe.recalled_tokens,
        num_tokens=sum(values.shape[0] for values in kl),
        texts=tuple(
            TextFigures(
                name=text.name,
                kl_mean=_mean([text.recipe.kl]),
                oracle_kl_mean=_mean([text.oracle.kl]),
                random_kl_mean=_mean([text.random.kl]),
                top1_agreement=_mean([text.recipe.agrees]),
                nll=_mean([text.recipe.nll]),
                nll_dense=_mean([text.nll_dense]),
            )
            for text in texts
        ),
    )


def _mean(texts: Sequence[Tensor]) -> float:
    """Over texts, each weighing the same."""
    return float(torch.stack([values.float().mean() for values in texts]).mean())
