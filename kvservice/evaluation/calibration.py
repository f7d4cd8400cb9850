"""Calibration of layer groups (PoD, stage 1): how alike a model's layers attend to distant tokens of some texts.

Of each text the last queries count, over the distant part that all of them see:

    0        16                                window_start(t - q)             t - q           t
    ├─ sinks ─┼─ distant: what is compared ─────────────┼─ windows of the queries ─┼─ queries ─┤

A text needs the memory of one forward pass and of all its keys; never a matrix of all its queries by all its keys.
Knows nothing of files. What groups are made of the figures is up to `kvservice.compression.layer_groups`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvservice import __version__
from kvservice.compression.layer_groups import Linkage, Per, Similarity, delta_for_saving, group_layers
from kvservice.compression.sharing_map import Grouping, Measurement, ModelFacts, SharingMap
from kvservice.config.recipes import EXACT
from kvservice.errors import ConfigError
from kvservice.evaluation.calls import Report, ignore_progress
from kvservice.evaluation.layer_similarity import distant_attention, pairwise_js
from kvservice.models.llama import LlamaModel
from kvservice.types import GROUP_TOKENS, SINK_TOKENS

COMPARED_BYTES = 16 << 20
"""Of all layers' distributions that are held at a time. The comparison holds three times as much."""

DIGITS = 6
"""Of figures in a map. Groups are made of the rounded ones, so that a map's groups follow from its own figures."""


@dataclass(frozen=True, slots=True)
class TextAttention:
    """What was measured on one text, as means over the queries, and the query heads of each KV head; fp32."""

    js: Tensor
    """`[kv, l, l]`: JS divergence."""
    mass_js: Tensor
    """`[kv, l, l]`: JS divergence times the mean of both layers' distant mass."""
    mass: Tensor
    """`[kv, l]`: share of attention that goes to distant tokens."""


@dataclass(frozen=True, slots=True)
class LayerFigures:
    """Means over texts, each weighing the same. Similarity is 1 - divergence."""

    similarity: Similarity
    mass_similarity: Similarity
    distant_mass: tuple[tuple[float, ...], ...]
    """`[kv][l]`."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How groups are chosen: by the least similarity within one, or by what they have to save."""

    delta: float | None
    save_fraction: float | None = None
    """Of distant KV; then `delta` is None."""
    linkage: Linkage = Linkage.ANCHOR
    per: Per = Per.KV_HEAD
    mass_weighted: bool = False


def distant_range(context_tokens: int, queries: int) -> slice:
    """The positions that are distant for each of the last `queries` of `context_tokens` tokens.

    Raises:
        ConfigError: there is less than one group of them.
    """
    distant = slice(SINK_TOKENS, EXACT.window_start(context_tokens - queries))
    if distant.stop <= distant.start:
        least = SINK_TOKENS + GROUP_TOKENS + EXACT.window_tokens + queries
        raise ConfigError(
            f"{context_tokens:,} tokens of context with {queries:,} queries leave no distant token: {least:,} are the "
            "least, and several thousand are better"
        )
    return distant


def steps_per_text(model: LlamaModel) -> int:
    """What `measure_text` reports for one text, in all."""
    return model.spec.shape.num_layers + model.spec.shape.num_kv_heads


@torch.inference_mode()
def measure_text(
    model: LlamaModel, token_ids: Sequence[int], queries: int, report: Report = ignore_progress
) -> TextAttention:
    """Reads a text and compares all layers. Blocks: 4 s for 2,048 tokens and 135M parameters on one core.

    Args:
        model: the torch runner, which lets its attention be looked at.
        token_ids: the text; as long as `distant_range` wants it, and no longer than the model's positions.
        queries: how many of the last ones count.
        report: told of each layer that was computed and each KV head that was compared.
    """
    recorder = _Recorder(queries, report)
    positions = torch.arange(len(token_ids), device=model.device)
    model.forward(model.embed(torch.tensor(token_ids, device=model.device)), positions, recorder)
    distant = distant_range(len(token_ids), queries)
    heads = []
    for kv_head in range(model.spec.shape.num_kv_heads):
        heads.append(_compare(recorder, kv_head, distant))
        report(1)
    js, mass_js, mass = (torch.stack(parts) for parts in zip(*heads, strict=True))
    return TextAttention(js, mass_js, mass)


def summarize(texts: Sequence[TextAttention]) -> LayerFigures:
    """The figures over at least one text."""
    js, mass_js, mass = (
        torch.stack(parts).mean(0).double()
        for parts in zip(*((text.js, text.mass_js, text.mass) for text in texts), strict=True)
    )
    return LayerFigures(
        similarity=tuple(tuple(map(_rounded, matrix)) for matrix in 1 - _symmetric(js)),
        mass_similarity=tuple(tuple(map(_rounded, matrix)) for matrix in 1 - _symmetric(mass_js)),
        distant_mass=tuple(map(_rounded, mass)),
    )


def make_map(model: ModelFacts, measurement: Measurement, figures: LayerFigures, choice: Choice) -> SharingMap:
    """The map of a model with the groups that `choice` asks for.

    Raises:
        ConfigError: no groups save that much.
    """
    similarity = figures.mass_similarity if choice.mass_weighted else figures.similarity
    delta = choice.delta
    if delta is None:
        delta = delta_for_saving(similarity, choice.save_fraction or 0.0, choice.linkage, choice.per)
    return SharingMap(
        tool=f"kvservice {__version__}",
        model=model,
        model_fingerprint=model.fingerprint,
        measurement=measurement,
        text_digest=measurement.text_digest,
        grouping=Grouping(
            delta=delta,
            linkage=choice.linkage,
            per=choice.per,
            similarity="mass" if choice.mass_weighted else "js",
            save_fraction=choice.save_fraction,
        ),
        groups=group_layers(similarity, delta, choice.linkage, choice.per).runs,
        distant_mass=figures.distant_mass,
        similarity=figures.similarity,
        mass_similarity=figures.mass_similarity,
    )


class _Recorder:
    """Causal attention of one whole text that keeps each layer's keys and last queries. An `Attend`."""

    def __init__(self, queries: int, report: Report) -> None:
        self.q: list[Tensor] = []
        """[kv, g, m, d] of each layer."""
        self.k: list[Tensor] = []
        """[kv, t, d] of each layer."""
        self._queries = queries
        self._report = report

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002 -- they come in order
        queries, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        num_kv, dim = k.shape[1:]
        self.q.append(q[-self._queries :].transpose(0, 1).reshape(num_kv, -1, self._queries, dim).clone())
        self.k.append(k.transpose(0, 1).clone())
        self._report(1)
        return out[0].transpose(0, 1)


def _compare(recorder: _Recorder, kv_head: int, distant: slice) -> tuple[Tensor, Tensor, Tensor]:
    """The means of one KV head: JS `[l, l]`, JS times mass `[l, l]`, mass `[l]`."""
    num_layers, (_, heads, num_queries, _) = len(recorder.q), recorder.q[0].shape
    num_distant = distant.stop - distant.start
    at_once = max(1, COMPARED_BYTES // (4 * num_layers * heads * num_distant))
    js_sum = mass_js_sum = mass_sum = torch.zeros(())
    for start in range(0, num_queries, at_once):
        chosen = slice(start, start + at_once)
        # The chosen queries are the last ones of what is left when the text is cut behind them.
        visible = recorder.k[0].shape[1] - num_queries + min(start + at_once, num_queries)
        parts = [
            distant_attention(q[kv_head, :, chosen], k[kv_head, :visible], distant)
            for q, k in zip(recorder.q, recorder.k, strict=True)
        ]
        mass = torch.stack([mass for _, mass in parts]).flatten(1)
        js = pairwise_js(torch.stack([far for far, _ in parts]).flatten(1, 2))
        js_sum = js_sum + js.sum(-1)
        mass_js_sum = mass_js_sum + (js * 0.5 * (mass.unsqueeze(0) + mass.unsqueeze(1))).sum(-1)
        mass_sum = mass_sum + mass.sum(-1)
    count = heads * num_queries
    return js_sum / count, mass_js_sum / count, mass_sum / count


def _symmetric(matrices: Tensor) -> Tensor:
    """Sums that are equal on paper may differ in the last bit: those above the diagonal count."""
    above = matrices.triu(1)
    return above + above.mT


def _rounded(row: Tensor) -> tuple[float, ...]:
    return tuple(min(1.0, max(0.0, round(value, DIGITS))) for value in row.tolist())
