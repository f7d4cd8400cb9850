"""Every method that drops tokens, or looks at few, on the same texts at the same budgets, beside ceiling and floors.

Every text is read to `context` tokens, and the tokens after that are forced, one at a time as decoding would compute
them. What was measured is kept as it comes, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kvservice.config.recipes import DENSE, EVICTING, RECIPES, REUSING
from kvservice.engine import Engine
from kvservice.errors import ConfigError
from kvservice.evaluation.bootstrap import bootstrap_interval
from kvservice.evaluation.calls import Report, ignore_progress, read_document
from kvservice.evaluation.quality import SCORED_AT_ONCE, distances
from kvservice.recall.distant import TILE_TOKENS
from kvservice.types import BLOCK_TOKENS, GROUP_TOKENS, SINK_TOKENS, RecipeSpec, SessionId

FLOORS = ("drop-random", "drop-recency")
CEILING = "recall-oracle"
COMPARED = (*(recipe.name for recipe in (*EVICTING, *REUSING)), *FLOORS, CEILING)
LEAST_TOKENS = 2 * (SINK_TOKENS + GROUP_TOKENS)
"""Of a budget: the ceiling needs a window."""


def with_budget(name: str, kept_tokens: int, dtype_bytes: int) -> RecipeSpec:
    """A recipe whose queries attend to about so many tokens."""
    recipe = RECIPES[name]
    if recipe.eviction is not None:
        # What is read beyond the budget is read in the same way.
        beyond = max(recipe.eviction.read_tokens - recipe.eviction.kept_tokens, BLOCK_TOKENS)
        reads = kept_tokens + beyond if recipe.eviction.positions else max(recipe.eviction.read_tokens, 2 * kept_tokens)
        return replace(recipe, eviction=replace(recipe.eviction, kept_tokens=kept_tokens, read_tokens=reads))
    if recipe.reuse is not None:
        return replace(recipe, reuse=replace(recipe.reuse, params=(("tokens", kept_tokens),)))
    recalled = (kept_tokens - SINK_TOKENS - GROUP_TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS
    return replace(
        recipe,
        window_tokens=GROUP_TOKENS,
        recalled_tokens=min(recalled, TILE_TOKENS),
        index_bits=8 * dtype_bytes,
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """One recipe and budget on one text; lists have a number for each forced token."""

    text: str
    recipe: str
    kept_tokens: int
    context: int
    kl: list[float]
    agrees: list[bool]
    nll: list[float]
    nll_dense: list[float]
    device_bytes: int
    dense_bytes: int
    ms_per_token: float


class Log:
    """What has been measured, a line of JSON for each.

    Args:
        path: of the file; None: nothing is kept.

    Raises:
        ConfigError: the file holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.measured: list[Measured] = []
        if path is not None and path.exists():
            try:
                self.measured = [Measured(**json.loads(line)) for line in path.read_text().splitlines()]
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{path} isn't a log of this command ({error}): name another file") from None

    def find(self, text: str, recipe: str, kept_tokens: int, context: int, num_tokens: int) -> Measured | None:
        """What was measured before."""
        wanted = (text, recipe, kept_tokens, context, num_tokens)
        for one in self.measured:
            if (one.text, one.recipe, one.kept_tokens, one.context, len(one.kl)) == wanted:
                return one
        return None

    def add(self, measured: Measured) -> None:
        """Keeps one more."""
        self.measured.append(measured)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(measured)) + "\n")


def measure_text(
    engine: Engine,
    log: Log,
    budgets: Sequence[tuple[str, int]],
    text: tuple[str, Sequence[int]],
    context_tokens: int,
    report: Report = ignore_progress,
) -> list[Measured]:
    """Measures recipes on one text, one after the other; those in the log aren't measured again. Blocks.

    Args:
        engine: has room for one session of this length, dense too.
        log: of earlier runs; gets what is measured.
        budgets: recipes by name, and how many tokens each may keep.
        text: its name; and the context, the forced tokens, and one more.
        context_tokens: how many are read as a document.
        report: told of every token that was computed.

    Raises:
        KVServiceError: a session doesn't fit in the engine's budget.
    """
    name, token_ids = text
    targets = torch.tensor(token_ids[context_tokens + 1 :])
    reference: Tensor | None = None
    found = []
    for recipe, kept in budgets:
        one = log.find(name, recipe, kept, context_tokens, targets.numel())
        if one is None:
            if reference is None:
                reference = _forced(engine, DENSE, token_ids, context_tokens, report)[0]
            dense = distances(reference, reference, targets)
            spec = with_budget(recipe, kept, engine.info.shape.dtype_bytes)
            logits, device_bytes, dense_bytes, ms = _forced(engine, spec, token_ids, context_tokens, report)
            other = distances(reference, logits, targets)
            one = Measured(
                text=name,
                recipe=recipe,
                kept_tokens=kept,
                context=context_tokens,
                kl=other.kl.tolist(),
                agrees=other.agrees.tolist(),
                nll=other.nll.tolist(),
                nll_dense=dense.nll.tolist(),
                device_bytes=device_bytes,
                dense_bytes=dense_bytes,
                ms_per_token=ms,
            )
            log.add(one)
        else:
            report(len(token_ids) - 1)
        found.append(one)
    return found


def _forced(
    engine: Engine,
    spec: RecipeSpec,
    token_ids: Sequence[int],
    context_tokens: int,
    report: Report,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Tensor, int, int, float]:
    """Logits after each forced token, the session's device bytes and what dense would take, and ms a token."""
    session_id = SessionId("methods")
    try:
        read_document(engine, session_id, spec, token_ids[:context_tokens], report)
        parts, seconds = [], 0.0
        for start in range(context_tokens, len(token_ids) - 1, SCORED_AT_ONCE):
            forced = token_ids[start : min(start + SCORED_AT_ONCE, len(token_ids) - 1)]
            started = clock()
            parts.append(engine.score(session_id, forced))
            seconds += clock() - started
            report(len(forced))
        kv = engine.telemetry(session_id)
        device = kv.window_bytes + kv.index_bytes + kv.slot_bytes
        return torch.cat(parts), device, kv.dense_bytes, 1e3 * seconds / sum(map(len, parts))
    finally:
        engine.release(session_id)


@dataclass(frozen=True, slots=True)
class MethodFigures:
    """One recipe and budget over all texts, each weighing the same.

    Attributes:
        recipe: its name.
        kept_tokens: that a KV head may keep, or that a query looks at.
        kl_mean: KL(dense ‖ recipe) of the next token, in nats.
        kl_interval: of 95 %.
        top1_agreement: share of tokens for which both rank the same one first.
        nll_change: of the texts' own tokens, against dense, in nats.
        device_bytes: measured, of one session, with what its method remembers.
        device_share: of what dense takes.
        ms_per_token: of one session alone.
    """

    recipe: str
    kept_tokens: int
    kl_mean: float
    kl_interval: tuple[float, float]
    top1_agreement: float
    nll_change: float
    device_bytes: int
    device_share: float
    ms_per_token: float


def summarize(texts: Iterable[Measured], seed: int) -> MethodFigures:
    """The figures of one recipe and budget over at least one text."""
    some = list(texts)
    kl = [torch.tensor(one.kl) for one in some]
    count = len(some)
    return MethodFigures(
        recipe=some[0].recipe,
        kept_tokens=some[0].kept_tokens,
        kl_mean=sum(float(each.mean()) for each in kl) / count,
        kl_interval=bootstrap_interval(kl, seed),
        top1_agreement=sum(sum(one.agrees) / len(one.agrees) for one in some) / count,
        nll_change=sum((sum(one.nll) - sum(one.nll_dense)) / len(one.nll) for one in some) / count,
        device_bytes=some[0].device_bytes,
        device_share=some[0].device_bytes / some[0].dense_bytes,
        ms_per_token=sum(one.ms_per_token for one in some) / count,
    )
