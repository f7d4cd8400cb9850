"""`kvservice bench context`: what longer contexts cost a decode step. Measuring is done in `kvservice.bench`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.bench_soak import PlotFile, check_writable
from kvservice.cli.options import DEFAULT_MODEL, JsonFile, Model, Threads, parse_counts, parse_names
from kvservice.cli.output import hint, progress_bar, show_table, write_json
from kvservice.config.recipes import PLAIN_RECIPES, RECIPES
from kvservice.config.worker import WorkerConfig
from kvservice.errors import ConfigError

if TYPE_CHECKING:
    from kvservice.bench.context import ContextRow


def context(
    recipes: Annotated[
        str, typer.Option("--recipes", metavar="NAME,NAME", help=f"Of {', '.join(PLAIN_RECIPES)}.")
    ] = "dense,recall",
    contexts: Annotated[
        str, typer.Option("--contexts", metavar="N,N", help="Tokens of each sequence's context.")
    ] = "4096,16384,32768,65536",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences.")] = 1,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Timed decode steps.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Figures are medians over as many runs.")] = 3,
    model: Model = DEFAULT_MODEL,
    threads: Threads = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Time of a decode step over contexts of any length, also beyond the model's positions: speed alone.

    Keys and values of the contexts are random numbers; answers mean nothing. Memory is taken as needed: a dense
    context of 65,536 tokens of the small model takes 1.5 GB.
    """
    lengths, names = parse_counts(contexts), parse_names(recipes)
    for name in names:
        if name not in PLAIN_RECIPES:
            raise ConfigError(f"--recipes {name}: choose from {', '.join(PLAIN_RECIPES)}")
    check_writable("--plot", plot)
    check_writable("--json", json_file)
    from kvservice.bench.context import measure_contexts
    from kvservice.cli.compose import open_model
    from kvservice.models.fetch import resolve

    measured = open_model(WorkerConfig(model=model, threads=threads), resolve(model, None))
    rows: dict[str, list[ContextRow]] = {}
    with progress_bar() as bar:
        for name in bar.track(names, description="measuring"):
            rows[name] = measure_contexts(measured, RECIPES[name], lengths, batch, new_tokens, repeats)
    columns = ("recipe", "context tokens", "batch", "ms/token", "ms per 1,000 tokens more")
    show_table(
        "A decode step by context length (random KV: speed alone)",
        columns,
        [
            (
                name,
                f"{row.context_tokens:,}",
                str(row.batch),
                f"{row.decode_ms_per_token:.1f}",
                "-" if row.marginal_ms_per_1000_tokens is None else f"{row.marginal_ms_per_1000_tokens:.3f}",
            )
            for name in names
            for row in rows[name]
        ],
        numeric=columns[1:],
    )
    if plot is not None:
        from kvservice.bench.plots import plot_contexts

        plot_contexts(plot, rows, f"A decode step of batch {batch}, {measured.spec.name}")
        hint(f"wrote {plot}")
    if json_file is not None:
        settings = {
            "recipes": names,
            "contexts": lengths,
            "batch": batch,
            "new_tokens": new_tokens,
            "repeats": repeats,
            "model": model,
            "threads": threads,
        }
        write_json(json_file, settings, {"rows": {name: [asdict(row) for row in rows[name]] for name in names}})
