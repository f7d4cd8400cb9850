"""`kvservice calibrate`: maps that recipes need, made for one model. Measuring is done in `kvservice.evaluation`."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.bench_soak import check_writable
from kvservice.cli.evaluate import Dtype, text_files
from kvservice.cli.options import DEFAULT_MODEL, JsonFile, Model, MoreTextFiles, Threads
from kvservice.cli.output import hint, progress_bar, show_table, write_json
from kvservice.cli.settings import read_file
from kvservice.compression.layer_groups import Linkage, Per, Similarity, group_layers
from kvservice.compression.sharing_map import CalibrationText, Measurement, SharingMap
from kvservice.errors import ConfigError

if TYPE_CHECKING:
    from kvservice.evaluation.calibration import LayerFigures
    from kvservice.models.llama import LlamaModel
    from kvservice.models.tokenizer import Tokenizer

app = typer.Typer(help="Make the maps that some recipes need, for one model.", no_args_is_help=True)

DEFAULT_DELTA = 0.5
"""The paper's."""

SHOWN_DELTAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@app.callback()
def _group() -> None:
    # With one command only, typer would leave out its name.
    pass


@app.command("pod")
def pod(
    text: Annotated[
        list[Path], typer.Option("--text", metavar="FILE|DIR", help="Texts, or folders of them; may be repeated.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="MAP", help="The map, JSON. The heat map goes beside it, as .png.")
    ],
    more_texts: MoreTextFiles = None,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens read of each text.")] = 2048,
    queries: Annotated[
        int, typer.Option("--queries", min=1, help="Tokens at the end of each text whose attention is compared.")
    ] = 64,
    delta: Annotated[
        float | None,
        typer.Option(
            "--delta", min=0, help=f"Least similarity in a group. Unset: {DEFAULT_DELTA}. Above 1: no groups."
        ),
    ] = None,
    save_fraction: Annotated[
        float | None,
        typer.Option(
            "--save-fraction", min=0, max=0.5, help="Instead of --delta: share of distant KV bytes to save, below 0.5."
        ),
    ] = None,
    linkage: Annotated[
        Linkage, typer.Option("--linkage", help="A new layer must resemble the group's lowest layer, or all of it.")
    ] = Linkage.ANCHOR,
    per: Annotated[
        Per, typer.Option("--per", help="Groups for each KV head, or the same ones for all heads of a layer.")
    ] = Per.KV_HEAD,
    mass_weighted: Annotated[
        bool, typer.Option("--mass-weighted", help="Weigh differences by how much attention goes to distant tokens.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the place in each text where reading begins.")] = 7,
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "bf16",
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Which layers attend so alike that a group of them can keep one set of distant keys (PoD)?

    Reads the texts, compares how every two layers attend to distant tokens (1 - Jensen-Shannon divergence), puts
    consecutive layers that are similar enough into a group, and writes the groups as a map for this very model. A table
    says what other values of --delta would give.

    Give texts like those that will be served, and keep some back to evaluate on: how good answers are under a map, only
    an evaluation can say.
    """
    if delta is not None and save_fraction is not None:
        raise typer.BadParameter("--delta and --save-fraction exclude each other: one follows from the other")
    if save_fraction is None and delta is None:
        delta = DEFAULT_DELTA
    picture = out.with_suffix(".png")
    if picture == out:
        raise typer.BadParameter(f"--out {out}: the heat map takes this name; name the map .json")
    check_writable("--out", out)
    check_writable("--json", json_file)
    files = text_files("--text", [*text, *(more_texts or [])])
    from kvservice.bench.plots import plot_layer_groups
    from kvservice.evaluation.calibration import Choice, make_map
    from kvservice.models.sharing import model_facts

    choice = Choice(delta, save_fraction, linkage, per, mass_weighted)
    loaded, excerpts = _prepare(model, dtype, threads, files, context, queries, seed)
    figures = _measure(loaded, excerpts, queries)
    measurement = _measurement(excerpts, context, queries, dtype, seed)
    made = make_map(model_facts(loaded.spec), measurement, figures, choice)
    made.write(out)
    groups, similarity = made.layer_groups, made.grouped_by
    title = f"{made.model.name}: {groups.num_groups} groups of {groups.num_cells} cells, delta {made.grouping.delta:g}"
    title += ", by mass-weighted similarity" if mass_weighted else ""
    plot_layer_groups(picture, similarity, groups, made.distant_mass, title)
    curve = list(_curve(similarity))
    _show(made, curve)
    hint(f"Model {made.model.name}: {made.model.origin}. Map {out}, heat map {picture}.")
    if json_file is not None:
        settings = {
            "model": model,
            "origin": made.model.origin,
            "threads": threads,
            **made.grouping.model_dump(mode="json"),
            **measurement.model_dump(mode="json"),
        }
        results = {
            "delta": made.grouping.delta,
            "num_cells": groups.num_cells,
            "num_groups": groups.num_groups,
            "shared_fraction": groups.shared_fraction,
            "distant_bytes_saved_fraction": groups.saved_fraction(),
            "groups": groups.runs,
            "groups_digest": groups.digest,
            "adjacent_similarity": _adjacent(similarity),
            "distant_mass": [_mean(heads) for heads in zip(*made.distant_mass, strict=True)],
            "curve": [asdict(row) for row in curve],
            "map": str(out),
            "heat_map": str(picture),
        }
        write_json(json_file, settings, results)


@dataclass(frozen=True, slots=True)
class _Excerpt:
    text: CalibrationText
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class _CurveRow:
    """What one `delta` gives."""

    linkage: str
    per: str
    delta: float
    num_groups: int
    shared_fraction: float
    distant_bytes_saved_fraction: float


def _prepare(
    model: str, dtype: str, threads: int | None, files: Sequence[Path], context: int, queries: int, seed: int
) -> tuple[LlamaModel, list[_Excerpt]]:
    """The model with the torch runner, since faster ones don't let their attention be looked at; and what it reads.

    Raises:
        ConfigError: the settings or the texts don't fit together.
        ModelError: the model can't be loaded, or can't share keys.
    """
    import torch

    from kvservice.evaluation.calibration import distant_range
    from kvservice.models.fetch import resolve
    from kvservice.models.llama import LlamaModel
    from kvservice.models.loader import read_model
    from kvservice.models.sharing import check_shareable
    from kvservice.models.tokenizer import Tokenizer

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in dtypes:
        raise ConfigError(f"--dtype {dtype}: choose bf16 or fp32")
    distant_range(context, queries)
    folder = resolve(model, None)
    check_shareable(folder)
    excerpts = list(_excerpts(files, Tokenizer.load(folder), context, seed))
    if not excerpts:
        raise ConfigError(
            f"--text: none of {len(files)} has {context:,} tokens; give longer ones, or a lower --context"
        )
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    spec, weights = read_model(folder, dtypes[dtype])
    if context > spec.shape.max_positions:
        raise ConfigError(f"--context {context}: {spec.name} has {spec.shape.max_positions:,} positions")
    return LlamaModel(spec, weights, torch.device("cpu")), excerpts


def _excerpts(files: Sequence[Path], tokenizer: Tokenizer, context: int, seed: int) -> Iterator[_Excerpt]:
    """A part of each file that is long enough, from a place that depends on the seed and the file's content alone."""
    from kvservice.types import PromptFormat, TextRole

    for path in files:
        content = read_file(path, "--text")
        sha256 = hashlib.sha256(content).hexdigest()
        tokens = tokenizer.encode(content.decode(errors="replace"), TextRole.DOCUMENT, PromptFormat.RAW, first=True)
        if len(tokens) < context:
            hint(f"{path}: skipped, {len(tokens):,} tokens of {context:,}")
            continue
        first = random.Random(f"{seed} {sha256}").randint(0, len(tokens) - context)
        text = CalibrationText(name=path.name, sha256=sha256, first_token=first)
        yield _Excerpt(text, tokens[first : first + context])


def _measure(model: LlamaModel, excerpts: Sequence[_Excerpt], queries: int) -> LayerFigures:
    from kvservice.evaluation.calibration import measure_text, steps_per_text, summarize

    measured = []
    with progress_bar() as bar:
        task = bar.add_task("layers and heads", total=steps_per_text(model) * len(excerpts))
        for excerpt in excerpts:
            bar.update(task, description=excerpt.text.name)
            measured.append(measure_text(model, excerpt.tokens, queries, lambda done: bar.advance(task, done)))
    return summarize(measured)


def _measurement(excerpts: Sequence[_Excerpt], context: int, queries: int, dtype: str, seed: int) -> Measurement:
    from kvservice.evaluation.calibration import distant_range

    distant = distant_range(context, queries)
    return Measurement(
        texts=tuple(excerpt.text for excerpt in excerpts),
        context_tokens=context,
        queries=queries,
        sink_tokens=distant.start,
        distant_tokens=distant.stop - distant.start,
        dtype=dtype,
        seed=seed,
    )


def _curve(similarity: Similarity) -> Iterator[_CurveRow]:
    for per in Per:
        for linkage in Linkage:
            for delta in SHOWN_DELTAS:
                groups = group_layers(similarity, delta, linkage, per)
                saved = groups.saved_fraction()
                yield _CurveRow(linkage.value, per.value, delta, groups.num_groups, groups.shared_fraction, saved)


def _show(made: SharingMap, curve: Sequence[_CurveRow]) -> None:
    columns = ("delta", *(f"{per.value}, {linkage.value}" for per in Per for linkage in Linkage))
    rows = [
        (f"{delta:.1f}", *(f"{row.distant_bytes_saved_fraction:.1%}" for row in curve if row.delta == delta))
        for delta in SHOWN_DELTAS
    ]
    show_table("Share of distant KV bytes that is stored nowhere", columns, rows, numeric=columns[1:])
    groups, grouping = made.layer_groups, made.grouping
    typer.echo(
        f"Chosen: delta {grouping.delta:g}, {grouping.linkage.value}, per {grouping.per.value}. {groups.num_groups} "
        f"groups of {groups.num_cells} cells, {groups.shared_fraction:.1%} of the cells store no distant key, "
        f"{groups.saved_fraction():.1%} of the distant KV is saved."
    )
    for kv_head, runs in enumerate(groups.runs):
        shared = ", ".join(f"{run[0]}-{run[-1]}" for run in runs if len(run) > 1)
        typer.echo(f"KV head {kv_head}: {f'layers {shared}' if shared else 'no layer'} share; {len(runs)} groups.")


def _adjacent(similarity: Similarity) -> list[float]:
    """Of each layer and the next one, the mean over KV heads."""
    layers = range(len(similarity[0]) - 1)
    return [_mean([matrix[layer][layer + 1] for matrix in similarity]) for layer in layers]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
