"""What sharing distant keys between layers costs in quality, against the bytes it saves, beside others at equal bytes.

    similarity    groups of layers that attend alike, by their anchors' scores or by their own queries
    per layer     the same, with one grouping for all KV heads; saves other bytes
    random        as many groups, drawn evenly from all there are
    uniform       as many groups, of lengths as equal as can be
    mass          as many groups or fewer, by mass-weighted similarity
    offset        similarity and scores, with one number for each follower: see `sharing_helpers`
    key map       similarity and keys, with one matrix for each follower: see `sharing_helpers`
    adapter       trained weights with their own groups: see `sharing_adapted`
    streaming     nothing is shared: as many bytes hold sinks and a longer window, and nothing else

Everything is measured in one pass of each text (`one_pass`), recipes besides as they are served. A measurement of one
case on one text takes seconds, and is kept as soon as it is made, so that a long table can be gone on with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvservice.compression.layer_groups import (
    LayerGroups,
    Per,
    delta_for_saving,
    group_layers,
    random_groups,
    uniform_groups,
)
from kvservice.compression.sharing import SharingMode, SharingPlan
from kvservice.compression.sharing_map import SharingMap
from kvservice.config.engine import EngineConfig
from kvservice.config.recipes import EXACT, POD, POD_EXACT, RECALL
from kvservice.engine import Engine
from kvservice.engine.ports import NoWriter
from kvservice.errors import ConfigError
from kvservice.evaluation import sweep
from kvservice.evaluation.bootstrap import bootstrap_interval
from kvservice.evaluation.calls import Report, ignore_progress, read_document
from kvservice.evaluation.one_pass import DENSE_VARIANT, Variant, last_logits
from kvservice.evaluation.quality import Distances, distances
from kvservice.evaluation.sharing_helpers import Fit, key_maps, offsets
from kvservice.models.llama import LlamaModel
from kvservice.types import GROUP_TOKENS, SINK_TOKENS, SessionId

SIMILARITY, PER_LAYER, RANDOM, UNIFORM, MASS = "similarity", "per layer", "random", "uniform", "mass"
OFFSET, KEY_MAP, STREAMING = "offset", "key map", "streaming"

BYTES_TOKENS = SINK_TOKENS + EXACT.window_tokens + 8 * GROUP_TOKENS
"""Of the text that is read to measure bytes: groups are all of one size."""


@dataclass(frozen=True, slots=True)
class Case:
    """One way to save bytes.

    Attributes:
        method: one of those above.
        delta: whose bytes it is to have.
        mode: of those that share.
        groups: likewise; None: streaming.
        window_tokens: of the window.
    """

    method: str
    delta: float
    mode: SharingMode | None
    groups: LayerGroups | None
    window_tokens: int = EXACT.window_tokens

    @property
    def key(self) -> str:
        """The same for cases that compute the same."""
        mode = self.mode.value if self.mode else ""
        helper = self.method if self.needs_fit else ""
        return f"{mode}/{self.groups.digest if self.groups else ''}/{helper}/{self.window_tokens}"

    @property
    def needs_fit(self) -> bool:
        """Whether it has a helper that was fitted on other texts."""
        return self.method in (OFFSET, KEY_MAP)

    def distant_tokens(self, num_tokens: int) -> int:
        """What lies between sinks and window after so many tokens."""
        return self._variant().window.window_start(num_tokens) - SINK_TOKENS

    def saved_fraction(self, num_tokens: int) -> float:
        """Share of the KV bytes of so many tokens that is stored nowhere."""
        distant = self.distant_tokens(num_tokens) / num_tokens
        return distant if self.groups is None else self.groups.saved_fraction(distant)

    def variant(self, fit: Fit | None) -> Variant:
        """What to measure; `fit` is needed by helpers."""
        variant = self._variant()
        if self.groups is None or fit is None:
            return variant
        return Variant(
            plan=variant.plan,
            offsets=offsets(fit, self.groups) if self.method == OFFSET else {},
            key_maps=key_maps(fit, self.groups) if self.method == KEY_MAP else {},
        )

    def _variant(self) -> Variant:
        if self.groups is None or self.mode is None:
            return Variant(window_tokens=self.window_tokens, drops_distant=True)
        return Variant(plan=SharingPlan(self.groups, self.mode))


def make_cases(sharing_map: SharingMap, deltas: Sequence[float], seeds: Sequence[int], num_tokens: int) -> list[Case]:
    """All cases, the most telling first.

    Args:
        sharing_map: has the similarities; its own groups don't matter.
        deltas: the least similarities within a group.
        seeds: of random groups.
        num_tokens: of the texts.
    """
    grouping = sharing_map.grouping
    layers, heads = sharing_map.model.num_layers, sharing_map.model.num_kv_heads
    by_delta = {delta: group_layers(sharing_map.similarity, delta, grouping.linkage, grouping.per) for delta in deltas}
    score, key = SharingMode.SCORE, SharingMode.KEY
    cases = [Case(SIMILARITY, delta, score, groups) for delta, groups in by_delta.items()]
    cases += [_random(delta, groups, seeds[0]) for delta, groups in by_delta.items()]
    for case in cases[: len(by_delta)]:
        window = _window_of_bytes(1 - case.saved_fraction(num_tokens), num_tokens)
        cases.append(Case(STREAMING, case.delta, None, None, window))
    for method, mode in ((SIMILARITY, key), (OFFSET, score), (KEY_MAP, key)):
        cases += [Case(method, delta, mode, groups) for delta, groups in by_delta.items()]
    for delta, groups in by_delta.items():
        cases.append(Case(UNIFORM, delta, score, uniform_groups(layers, heads, groups.num_groups)))
    for delta in deltas:
        by_layer = group_layers(sharing_map.similarity, delta, grouping.linkage, Per.LAYER)
        cases.append(Case(PER_LAYER, delta, score, by_layer))
    cases += [_random(delta, groups, seed) for seed in seeds[1:] for delta, groups in by_delta.items()]
    for delta, groups in by_delta.items():
        least = delta_for_saving(sharing_map.mass_similarity, groups.saved_fraction(), grouping.linkage, grouping.per)
        by_mass = group_layers(sharing_map.mass_similarity, least, grouping.linkage, grouping.per)
        cases.append(Case(MASS, delta, score, by_mass))
    return cases


def _random(delta: float, groups: LayerGroups, seed: int) -> Case:
    drawn = random_groups(groups.num_layers, groups.num_kv_heads, groups.num_groups, seed)
    return Case(RANDOM, delta, SharingMode.SCORE, drawn)


def _window_of_bytes(kept_fraction: float, num_tokens: int) -> int:
    """The shortest window, of whole groups, that holds at least this share of the tokens with the sinks."""
    return max(1, -int(-(kept_fraction * num_tokens - SINK_TOKENS) // GROUP_TOKENS)) * GROUP_TOKENS


@dataclass(frozen=True, slots=True)
class Text:
    """One text, and what dense attention makes of it."""

    name: str
    token_ids: Sequence[int]
    """The context, the forced tokens, and one more."""
    logits: Tensor
    """After each forced token, fp32 `[n, vocab]`."""
    nll: Tensor
    """Of the tokens after those, `[n]`."""

    @property
    def count(self) -> int:
        """Measured tokens."""
        return int(self.nll.shape[0])


def read_text(model: LlamaModel, name: str, token_ids: Sequence[int], count: int) -> Text:
    """Reads a text densely; its last `count` tokens but one are measured."""
    logits = last_logits(model, token_ids[:-1], count, DENSE_VARIANT)
    dense = distances(logits, logits, torch.tensor(token_ids[-count:]))
    return Text(name, token_ids, logits, dense.nll)


def measure(model: LlamaModel, text: Text, case: Case, fit: Fit | None) -> Distances:
    """One case on one text. Blocks for seconds."""
    logits = last_logits(model, text.token_ids[:-1], text.count, case.variant(fit))
    return distances(text.logits, logits, torch.tensor(text.token_ids[-text.count :]))


class Kept:
    """Measurements in a file, one a line, so that a table that was cut off can be gone on with.

    Args:
        path: None: they are kept in memory alone.
        settings: what they depend on besides case and text.

    Raises:
        ConfigError: the file is of other settings, or can't be read or written.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, object]) -> None:
        self._path = path
        self._measured: dict[tuple[str, str], Distances] = {}
        if path is None:
            return
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()
        try:
            lines = path.read_text().splitlines() if path.exists() else []
            if not lines:
                path.write_text(json.dumps({"settings": digest}) + "\n")
                return
            if json.loads(lines[0]) != {"settings": digest}:
                raise ConfigError(f"{path}: has measurements of other texts or settings; name another file")
            for line in lines[1:]:
                self._take(json.loads(line))
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{path}: can't be gone on with: {error}; name another file") from error

    def get(self, key: str, text: str) -> Distances | None:
        """What was measured, if it was."""
        return self._measured.get((key, text))

    def put(self, key: str, text: str, measured: Distances) -> None:
        """Keeps a measurement."""
        self._measured[key, text] = measured
        if self._path is None:
            return
        record = {
            "key": key,
            "text": text,
            "kl": measured.kl.tolist(),
            "agrees": measured.agrees.tolist(),
            "nll": measured.nll.tolist(),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _take(self, record: Mapping[str, list[float]]) -> None:
        measured = Distances(
            kl=torch.tensor(record["kl"]),
            agrees=torch.tensor(record["agrees"], dtype=torch.bool),
            nll=torch.tensor(record["nll"]),
        )
        self._measured[str(record["key"]), str(record["text"])] = measured


@dataclass(frozen=True, slots=True)
class Row:
    """One case over all texts, each weighing the same; of random groups, the mean over seeds.

    Attributes:
        method: see the module.
        mode: score or key; empty where nothing is shared.
        delta: whose bytes it has.
        num_groups: over all KV heads; 0 where nothing is shared.
        saved_fraction: of the KV bytes of a text of this length.
        kl_mean: KL(dense ‖ case) of the next token, in nats.
        kl_interval: of 95 %, over texts and tokens; of random groups the least and the greatest of the seeds.
        nll_change: of the texts' own tokens, against dense, in nats.
        top1_agreement: share of tokens for which both rank the same one first.
    """

    method: str
    mode: str
    delta: float
    num_groups: int
    saved_fraction: float
    kl_mean: float
    kl_interval: tuple[float, float]
    nll_change: float
    top1_agreement: float


def summarize(cases: Sequence[Case], texts: Sequence[Text], kept: Kept, seed: int) -> list[Row]:
    """A row for each case that was measured on all texts, and one for all seeds of random groups."""
    rows: dict[tuple[str, str, float], list[Row]] = {}
    for case in cases:
        measured = [kept.get(case.key, text.name) for text in texts]
        found = [one for one in measured if one is not None]
        if len(found) < len(texts):
            continue
        row = _row(case, texts, found, seed)
        rows.setdefault((row.method, row.mode, row.delta), []).append(row)
    return [_over_seeds(each) for each in rows.values()]


def _row(case: Case, texts: Sequence[Text], measured: Sequence[Distances], seed: int) -> Row:
    changes = [one.nll - text.nll for one, text in zip(measured, texts, strict=True)]
    return Row(
        method=case.method,
        mode=case.mode.value if case.mode else "",
        delta=case.delta,
        num_groups=case.groups.num_groups if case.groups else 0,
        saved_fraction=case.saved_fraction(len(texts[0].token_ids) - 1),
        kl_mean=mean([one.kl for one in measured]),
        kl_interval=bootstrap_interval([one.kl for one in measured], seed),
        nll_change=mean(changes),
        top1_agreement=mean([one.agrees for one in measured]),
    )


def _over_seeds(rows: Sequence[Row]) -> Row:
    if len(rows) == 1:
        return rows[0]
    kl = [row.kl_mean for row in rows]
    first = rows[0]
    return Row(
        method=first.method,
        mode=first.mode,
        delta=first.delta,
        num_groups=first.num_groups,
        saved_fraction=first.saved_fraction,
        kl_mean=sum(kl) / len(rows),
        kl_interval=(min(kl), max(kl)),
        nll_change=sum(row.nll_change for row in rows) / len(rows),
        top1_agreement=sum(row.top1_agreement for row in rows) / len(rows),
    )


@dataclass(frozen=True, slots=True)
class SavedBytes:
    """What an engine stores of the distant tokens of one session, and what the identity says.

    Attributes:
        delta: of the groups.
        whole_bytes: in host memory under `exact`.
        shared_bytes: under `pod-exact`.
        saved_fraction: of those.
        identity: ½ · (1 - groups / cells).
        rounding: share of the bytes that is lost to whole rows: of an odd number of followers, half a row each token.
    """

    delta: float
    whole_bytes: int
    shared_bytes: int
    saved_fraction: float
    identity: float
    rounding: float


def measure_bytes(
    model: LlamaModel, delta: float, groups: LayerGroups, token_ids: Sequence[int], report: Report = ignore_progress
) -> SavedBytes:
    """Reads the beginning of a text under `exact` and under `pod-exact`, and counts. Blocks for seconds."""
    config = EngineConfig(kv_bytes=256 << 20, host_bytes=256 << 20)
    engine = Engine(model, config, NoWriter(), sharing=SharingPlan(groups))
    stored = []
    for recipe in (EXACT, POD_EXACT):
        session_id = SessionId(recipe.name)
        read_document(engine, session_id, recipe, token_ids[:BYTES_TOKENS], report)
        stored.append(engine.telemetry(session_id).host_bytes)
        engine.release(session_id)
    engine.close()
    whole, shared = stored
    is_odd = (groups.num_cells - groups.num_groups) % 2
    return SavedBytes(
        delta=delta,
        whole_bytes=whole,
        shared_bytes=shared,
        saved_fraction=1 - shared / whole,
        identity=groups.saved_fraction(),
        rounding=is_odd / (2 * groups.num_cells),
    )


SERVED = (EXACT, RECALL, POD_EXACT, POD)


@dataclass(frozen=True, slots=True)
class ServedRow:
    """A recipe as it is served: a document read, then tokens forced one at a time. Figures as those of `Row`."""

    recipe: str
    kl_mean: float
    kl_interval: tuple[float, float]
    nll_change: float
    top1_agreement: float


def measure_served(
    engine: Engine, groups: LayerGroups, text: Text, kept: Kept, report: Report = ignore_progress
) -> None:
    """Measures recipes that share and those that don't on one text, unless that is kept. Blocks for a minute.

    Args:
        engine: shares by `groups`.
        groups: which layers share.
        text: the text.
        kept: takes the measurements.
        report: told of every token that was computed.
    """
    if kept.get(_served_key(SERVED[-1].name, groups), text.name) is not None:
        return
    context = len(text.token_ids) - 1 - text.count
    measured = sweep.measure_text(engine, SERVED, text.token_ids, context, report)
    nll = measured[0].nll_dense
    same = Distances(torch.zeros_like(nll), torch.ones_like(nll, dtype=torch.bool), nll)
    kept.put(_served_key("dense", groups), text.name, same)
    for spec, one in zip(SERVED, measured, strict=True):
        kept.put(_served_key(spec.name, groups), text.name, one.distances)


def served_rows(groups: LayerGroups, texts: Sequence[Text], kept: Kept, seed: int) -> list[ServedRow]:
    """A row for each recipe that was measured on all texts."""
    rows = []
    for name in ("dense", *(spec.name for spec in SERVED)):
        pairs = [
            (kept.get(_served_key(name, groups), text.name), kept.get(_served_key("dense", groups), text.name))
            for text in texts
        ]
        found = [(one, dense) for one, dense in pairs if one is not None and dense is not None]
        if len(found) < len(texts):
            continue
        kl = [one.kl for one, _ in found]
        rows.append(
            ServedRow(
                recipe=name,
                kl_mean=mean(kl),
                kl_interval=bootstrap_interval(kl, seed),
                nll_change=mean([one.nll - dense.nll for one, dense in found]),
                top1_agreement=mean([one.agrees for one, _ in found]),
            )
        )
    return rows


def _served_key(name: str, groups: LayerGroups) -> str:
    return f"served/{name}/{groups.digest}"


def mean(texts: Sequence[Tensor]) -> float:
    """Of all tokens of each text, each text weighing the same."""
    return float(torch.stack([values.float().mean() for values in texts]).mean())
