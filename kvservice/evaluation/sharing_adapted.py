"""Adapted weights beside the helpers that need no training, in the table of what sharing distant keys costs.

An adapter brings its own groups and mode. It is measured against the dense model as it is, in one pass of each text
like the other cases, and as it is served, with recall on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvservice.compression.sharing import SharingPlan
from kvservice.config.recipes import POD, POD_EXACT
from kvservice.engine import Engine
from kvservice.evaluation.bootstrap import bootstrap_interval
from kvservice.evaluation.calls import Report, ignore_progress
from kvservice.evaluation.one_pass import Variant, last_logits
from kvservice.evaluation.quality import Distances, distances
from kvservice.evaluation.sharing_table import Kept, Row, ServedRow, Text, mean
from kvservice.evaluation.sweep import logits_under
from kvservice.models.adapter import AdapterFacts
from kvservice.models.llama import LlamaModel
from kvservice.types import SINK_TOKENS

SERVED = (POD_EXACT, POD)


@dataclass(frozen=True, slots=True)
class Adapted:
    """An adapter to be measured.

    Attributes:
        name: of its file.
        facts: what it was trained for.
        digest: its own.
    """

    name: str
    facts: AdapterFacts
    digest: str

    @property
    def plan(self) -> SharingPlan:
        """How it shares."""
        return SharingPlan(self.facts.layer_groups, self.facts.mode)

    def key(self, how: str) -> str:
        """Of measurements that are kept."""
        return f"adapter/{self.digest}/{how}"


def measure(model: LlamaModel, adapted: Adapted, text: Text, kept: Kept) -> None:
    """Measures it in one pass, sharing and not, unless that is kept. Blocks for seconds.

    Args:
        model: with the adapter's weights.
        adapted: the adapter.
        text: and what the dense model makes of it.
        kept: takes the measurements.
    """
    for how, plan in (("sharing", adapted.plan), ("unshared", None)):
        if kept.get(adapted.key(how), text.name) is None:
            logits = last_logits(model, text.token_ids[:-1], text.count, Variant(plan))
            kept.put(adapted.key(how), text.name, _distances(text, logits))


def measure_served(engine: Engine, adapted: Adapted, text: Text, kept: Kept, report: Report = ignore_progress) -> None:
    """Measures it as it is served, unless that is kept. Blocks for a minute.

    Args:
        engine: of the adapter's weights and plan.
        adapted: the adapter.
        text: and what the dense model makes of it.
        kept: takes the measurements.
        report: told of every token that was computed.
    """
    context = len(text.token_ids) - 1 - text.count
    for spec in SERVED:
        if kept.get(adapted.key(spec.name), text.name) is None:
            logits, _ = logits_under(engine, spec, text.token_ids, context, report)
            kept.put(adapted.key(spec.name), text.name, _distances(text, logits))


def rows(adapted: Sequence[Adapted], texts: Sequence[Text], kept: Kept, seed: int) -> list[Row]:
    """Two rows for each adapter: sharing, and the same weights where every layer attends by its own keys."""
    num_tokens = len(texts[0].token_ids) - 1
    distant = (Variant().window.window_start(num_tokens) - SINK_TOKENS) / num_tokens
    found = []
    for one in adapted:
        groups, delta = one.facts.layer_groups, one.facts.training.get("map_delta")
        for how in ("sharing", "unshared"):
            figures = _figures(texts, [kept.get(one.key(how), text.name) for text in texts], seed)
            if figures is None:
                continue
            shares = how == "sharing"
            found.append(
                Row(
                    method=f"adapter {one.name}" + ("" if shares else ", unshared"),
                    mode=one.facts.mode.value if shares else "",
                    delta=float(delta) if isinstance(delta, int | float) else 0.0,
                    num_groups=groups.num_groups if shares else 0,
                    saved_fraction=groups.saved_fraction(distant) if shares else 0.0,
                    kl_mean=figures.kl_mean,
                    kl_interval=figures.kl_interval,
                    nll_change=figures.nll_change,
                    top1_agreement=figures.top1_agreement,
                )
            )
    return found


def served_rows(adapted: Sequence[Adapted], texts: Sequence[Text], kept: Kept, seed: int) -> list[ServedRow]:
    """A row for each adapter and recipe that was measured on all texts."""
    found = [
        _figures(
            texts,
            [kept.get(one.key(spec.name), text.name) for text in texts],
            seed,
            f"{spec.name}, adapter {one.name}",
        )
        for one in adapted
        for spec in SERVED
    ]
    return [row for row in found if row is not None]


def _figures(
    texts: Sequence[Text], measured: Sequence[Distances | None], seed: int, name: str = ""
) -> ServedRow | None:
    whole = [one for one in measured if one is not None]
    if len(whole) < len(texts):
        return None
    kl = [one.kl for one in whole]
    return ServedRow(
        recipe=name,
        kl_mean=mean(kl),
        kl_interval=bootstrap_interval(kl, seed),
        nll_change=mean([one.nll - text.nll for one, text in zip(whole, texts, strict=True)]),
        top1_agreement=mean([one.agrees for one in whole]),
    )


def _distances(text: Text, logits: torch.Tensor) -> Distances:
    return distances(text.logits, logits, torch.tensor(text.token_ids[-text.count :]))
