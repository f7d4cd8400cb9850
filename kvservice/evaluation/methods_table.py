"""Every method that drops tokens, or looks at few, on the same texts at the same budgets, beside ceiling and floors.

Every text is read to `context` tokens, and the tokens after that are forced, one at a time as decoding would compute
them. Pass keys are asked for apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kvservice.compression.methods import METHODS
from kvservice.config.recipes import DENSE, EVICTING, RECIPES, REUSING
from kvservice.engine import Engine
from kvservice.evaluation.attention_mass import dense_weights, kept_mass, most_mass, tokens_read
from kvservice.evaluation.bootstrap import bootstrap_interval
from kvservice.evaluation.calls import Report, converse, ignore_progress, read_document
from kvservice.evaluation.controls import CONTROLS, Control
from kvservice.evaluation.haystack import PasskeyCase
from kvservice.evaluation.methods_log import Asked, Log, Measured
from kvservice.evaluation.passkey import answer_case, is_all_found
from kvservice.evaluation.quality import distances
from kvservice.models.tokenizer import Tokenizer
from kvservice.recall.distant import TILE_TOKENS
from kvservice.types import BLOCK_TOKENS, GROUP_TOKENS, SINK_TOKENS, RecipeSpec, SessionId

FLOORS = ("drop-random", "drop-recency")
CEILING = "recall-oracle"
COMPARED = (DENSE.name, *(recipe.name for recipe in (*EVICTING, *REUSING)), *FLOORS, CEILING)
LEAST_TOKENS = 96
"""Of a budget."""
CEILING_TOKENS = 2 * (SINK_TOKENS + GROUP_TOKENS)
"""Of the ceiling's: it needs a window."""


class Case(NamedTuple):
    """What is measured beside others."""

    recipe: str
    kept_tokens: int
    seed: int = 0
    control: bool = False
    """The method's broken twin."""


def cases(names: Iterable[str], budgets: Sequence[int], num_seeds: int, *, controls: bool = False) -> list[Case]:
    """All that is measured on a text: each recipe at each budget, and those that draw numbers with several seeds.

    With `controls`, also each method's broken twin.
    """
    found = []
    for name in names:
        if name == DENSE.name:
            found.append(Case(name, 0))
            continue
        least = CEILING_TOKENS if name == CEILING else LEAST_TOKENS
        seeds = range(num_seeds if _draws(RECIPES[name]) else 1)
        found += [Case(name, kept, seed) for kept in budgets if kept >= least for seed in seeds]
        if controls and name in CONTROLS:
            found += [Case(name, kept, 0, control=True) for kept in budgets if kept >= least]
    return found


def _draws(recipe: RecipeSpec) -> bool:
    scorer = METHODS.get(recipe.eviction.scorer).scorer if recipe.eviction else None
    return hasattr(scorer, "seed")


def spec_of(case: Case, dtype_bytes: int) -> RecipeSpec:
    """A recipe whose queries attend to about so many tokens, or which keeps the bytes of so many."""
    recipe, kept = RECIPES[case.recipe], case.kept_tokens
    if recipe == DENSE:
        return recipe
    if (limits := recipe.eviction) is not None:
        # What is read beyond the budget is read in the same way.
        beyond = max(limits.read_tokens - limits.kept_tokens, BLOCK_TOKENS)
        reads = kept + beyond if limits.positions else max(limits.read_tokens, 2 * kept)
        params = (*limits.params, *((("seed", case.seed),) if case.seed else ()))
        return replace(recipe, eviction=replace(limits, kept_tokens=kept, read_tokens=reads, params=params))
    if recipe.reuse is not None:
        return replace(recipe, reuse=replace(recipe.reuse, params=(("tokens", kept),)))
    recalled = (kept - SINK_TOKENS - GROUP_TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS
    return replace(
        recipe,
        window_tokens=GROUP_TOKENS,
        recalled_tokens=min(recalled, TILE_TOKENS),
        index_bits=8 * dtype_bytes,
    )


class _Reference(NamedTuple):
    """What dense gives: logits, and weights by position."""

    logits: Tensor
    weights: dict[int, Tensor]


def measure_text(
    engine: Engine,
    log: Log,
    wanted: Sequence[Case],
    text: tuple[str, Sequence[int]],
    context_tokens: int,
    report: Report = ignore_progress,
) -> list[Measured]:
    """Measures recipes on one text, one after the other; those in the log aren't measured again. Blocks.

    Args:
        engine: has room for one session of this length, dense too.
        log: of earlier runs; gets what is measured.
        wanted: recipes and budgets.
        text: its name; and the context, the forced tokens, and one more.
        context_tokens: how many are read as a document.
        report: told of every token that was computed.

    Raises:
        KVServiceError: a session doesn't fit in the engine's budget.
    """
    name, token_ids = text
    num_forced = len(token_ids) - 1 - context_tokens
    reference: _Reference | None = None
    found = []
    for case in wanted:
        one = log.measured(name, *case, context_tokens, num_forced)
        if one is None:
            if reference is None:
                logits = _Run(engine, DENSE, token_ids, context_tokens).logits
                reference = _Reference(logits, dense_weights(engine, token_ids, context_tokens))
            one = _measure(engine, case, text, context_tokens, reference)
            log.add(one)
        report(len(token_ids) - 1)
        found.append(one)
    return found


class _Run:
    """A recipe on one text, forced token by forced token.

    Attributes:
        logits: after each, fp32 `[n, vocab]`.
        mass: of dense weights, what falls on held tokens.
        seconds: that forcing took.
    """

    def __init__(
        self,
        engine: Engine,
        spec: RecipeSpec,
        token_ids: Sequence[int],
        context_tokens: int,
        *,
        weights: dict[int, Tensor] | None = None,
        control: Control | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        session_id = SessionId("methods")
        self.mass: list[float] = []
        self.seconds, parts = 0.0, []
        try:
            self._read(engine, session_id, spec, token_ids[:context_tokens], control)
            for position in range(context_tokens, len(token_ids) - 1):
                memory = engine.memory_of(session_id)
                if weights and position in weights and (mass := kept_mass(memory, weights[position])) is not None:
                    self.mass.append(mass)
                started = clock()
                parts.append(engine.score(session_id, token_ids[position : position + 1]))
                self.seconds += clock() - started
            self.kv = engine.telemetry(session_id)
            self.tokens_read = tokens_read(engine.memory_of(session_id), spec)
        finally:
            engine.release(session_id)
        self.logits = torch.cat(parts)

    @staticmethod
    def _read(
        engine: Engine, session_id: SessionId, spec: RecipeSpec, document: Sequence[int], control: Control | None
    ) -> None:
        first = 0
        if control is not None:
            # There must be a sequence before anything in it can be broken.
            first = 1
            read_document(engine, session_id, spec, document[:first])
            control.change(engine.memory_of(session_id))
        read_document(engine, session_id, spec, document[first:], base=document[:first])


def _measure(
    engine: Engine, case: Case, text: tuple[str, Sequence[int]], context_tokens: int, reference: _Reference
) -> Measured:
    name, token_ids = text
    targets = torch.tensor(token_ids[context_tokens + 1 :])
    spec = spec_of(case, engine.info.shape.dtype_bytes)
    control = CONTROLS[case.recipe] if case.control else None
    run = _Run(engine, spec, token_ids, context_tokens, weights=reference.weights, control=control)
    dense = distances(reference.logits, reference.logits, targets)
    other = distances(reference.logits, run.logits, targets)
    mass, kv = run.mass, run.kv
    if case.recipe == CEILING:
        mass = [most_mass(weights, case.kept_tokens) for weights in reference.weights.values()]
    return Measured(
        text=name,
        recipe=case.recipe,
        kept_tokens=case.kept_tokens,
        seed=case.seed,
        control=case.control,
        context=context_tokens,
        kl=other.kl.tolist(),
        agrees=other.agrees.tolist(),
        nll=other.nll.tolist(),
        nll_dense=dense.nll.tolist(),
        mass=mass,
        device_bytes=kv.window_bytes + kv.index_bytes + kv.slot_bytes,
        dense_bytes=kv.dense_bytes,
        tokens_read=run.tokens_read,
        tier_bytes=kv.recalled_bytes / len(targets),
        ms_per_token=1e3 * run.seconds / len(targets),
    )


def ask_all(
    engine: Engine,
    tokenizer: Tokenizer,
    log: Log,
    wanted: Sequence[Case],
    asked: Sequence[PasskeyCase],
    *,
    num_tokens: int,
    report: Callable[[], None] = lambda: None,
) -> dict[Case, list[bool]]:
    """Which of the hidden numbers each recipe finds; those in the log aren't asked for again. Blocks.

    Args:
        engine: without sessions.
        tokenizer: of its model.
        log: of earlier runs; gets the answers.
        wanted: recipes and budgets.
        asked: the texts.
        num_tokens: of each.
        report: told of each answer.
    """
    found: dict[Case, list[bool]] = {}
    for case in wanted:
        for number, one in enumerate(asked):
            known = log.asked(number, case.recipe, case.kept_tokens, num_tokens, case.seed)
            if known is None:
                spec = spec_of(case, engine.info.shape.dtype_bytes)
                told = next(iter(converse(engine, [answer_case(engine, tokenizer, spec, one)], at_once=1)))
                known = Asked(number, *case[:2], num_tokens, case.seed, is_all_found(told, one))
                log.add(known)
            found.setdefault(case, []).append(known.is_correct)
            report()
    return found


@dataclass(frozen=True, slots=True)
class MethodFigures:
    """One recipe and budget over all texts and seeds, each weighing the same.

    Attributes:
        recipe: its name, and of a broken twin what is broken.
        kept_tokens: whose bytes a KV head may keep, or that a query looks at; 0 of dense.
        kl_mean: KL(dense ‖ recipe) of the next token, in nats.
        kl_interval: of 95 %.
        kl_of_seeds: the least and the greatest mean of a seed, of recipes that draw numbers.
        top1_agreement: share of tokens for which both rank the same one first.
        nll_change: of the texts' own tokens, against dense, in nats.
        mass: share of dense attention that falls on held tokens; of the ceiling, on the best ones; None: not measured.
        found: pass keys found, of those that dense finds; None: dense finds none, or none were asked for.
        device_bytes: measured, of one session, with what its method remembers.
        device_share: of what dense takes.
        tokens_read: by a query in a KV head of a layer.
        tier_bytes: fetched from host memory for a token.
        ms_per_token: of one session alone.
    """

    recipe: str
    kept_tokens: int
    kl_mean: float
    kl_interval: tuple[float, float]
    kl_of_seeds: tuple[float, float] | None
    top1_agreement: float
    nll_change: float
    mass: float | None
    found: tuple[int, int] | None
    device_bytes: int
    device_share: float
    tokens_read: float
    tier_bytes: float
    ms_per_token: float


def summarize(
    measured: Iterable[Measured], answers: dict[Case, list[bool]], bootstrap_seed: int
) -> list[MethodFigures]:
    """The figures of all recipes and budgets, in the order in which they came."""
    rows: dict[tuple[str, int, bool], list[Measured]] = {}
    for one in measured:
        rows.setdefault((one.recipe, one.kept_tokens, one.control), []).append(one)
    return [_figures(some, _found(answers, *row), bootstrap_seed) for row, some in rows.items()]


def _found(answers: dict[Case, list[bool]], recipe: str, kept_tokens: int, control: bool) -> tuple[int, int] | None:
    """Keys found, of those that dense finds, over all seeds."""
    by_dense = answers.get(Case(DENSE.name, 0), [])
    own = [told for case, told in answers.items() if (*case[:2], case.control) == (recipe, kept_tokens, control)]
    if not any(by_dense) or not own:
        return None
    hits = [is_found for told in own for is_found, counts in zip(told, by_dense, strict=True) if counts]
    return sum(hits), len(hits)


def _figures(some: Sequence[Measured], found: tuple[int, int] | None, seed: int) -> MethodFigures:
    kl = [torch.tensor(one.kl) for one in some]
    seeds = sorted({one.seed for one in some})
    by_seed = [_mean(sum(one.kl) / len(one.kl) for one in some if one.seed == each) for each in seeds]
    masses = [_mean(one.mass) for one in some if one.mass]
    return MethodFigures(
        recipe=f"{some[0].recipe}, {CONTROLS[some[0].recipe].what}" if some[0].control else some[0].recipe,
        kept_tokens=some[0].kept_tokens,
        kl_mean=_mean(by_seed),
        kl_interval=bootstrap_interval(kl, seed),
        kl_of_seeds=(min(by_seed), max(by_seed)) if len(seeds) > 1 else None,
        top1_agreement=_mean(_mean(one.agrees) for one in some),
        nll_change=_mean((sum(one.nll) - sum(one.nll_dense)) / len(one.nll) for one in some),
        mass=_mean(masses) if masses else None,
        found=found,
        device_bytes=some[0].device_bytes,
        device_share=some[0].device_bytes / some[0].dense_bytes,
        tokens_read=_mean(one.tokens_read for one in some),
        tier_bytes=_mean(one.tier_bytes for one in some),
        ms_per_token=_mean(one.ms_per_token for one in some),
    )


def _mean(numbers: Iterable[float]) -> float:
    some = list(numbers)
    return sum(some) / len(some)
