"""`kvservice bench methods`: decode steps of batches by recipe, and of a mixed one. Measuring is elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from kvservice.cli.bench_soak import check_writable
from kvservice.cli.options import DEFAULT_MODEL, JsonFile, Model, Threads, parse_names
from kvservice.cli.output import hint, progress_bar, show_table, write_json
from kvservice.config.recipes import DENSE, EVICTING, REUSING
from kvservice.errors import ConfigError

NAMES = tuple(recipe.name for recipe in (DENSE, *EVICTING, *REUSING))
DEFAULT = "dense,h2o,scissorhands,keyformer,streaming_llm,cascading_kv,d2o,more_tokens"


def methods(
    recipes: Annotated[str, typer.Option("--recipes", metavar="NAME,NAME", help=f"Of {', '.join(NAMES)}.")] = DEFAULT,
    context: Annotated[int, typer.Option("--context", min=32, help="Tokens of each session's document.")] = 1024,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sessions that answer at a time.")] = 8,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=8, help="Tokens of each answer.")] = 24,
    max_ratio: Annotated[
        float | None,
        typer.Option("--max-ratio", help="Exit 1 when a mixed batch takes more of the slowest one's time."),
    ] = None,
    model: Model = DEFAULT_MODEL,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """A decode step of a batch of each recipe, and of one whose sessions have one recipe each."""
    check_writable("--json", json_file)
    names = list(dict.fromkeys(parse_names(recipes)))
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"--recipes {name}: choose from {', '.join(NAMES)}")
    from kvservice.bench.methods import MIXED, measure_batches, slowest
    from kvservice.cli.evaluate import load_engine
    from kvservice.config.recipes import RECIPES

    engine = load_engine(model, "bf16", threads)
    # Which tokens they are makes no difference to time; the same ones again and again would to what is kept.
    document = [(token * 7919 + 11) % 40_000 for token in range(context)]
    with progress_bar() as bar:
        task = bar.add_task("batches", total=len(names) + 1)
        times = measure_batches(
            engine, [RECIPES[name] for name in names], document, batch, new_tokens, lambda: bar.advance(task)
        )
    by_name = {one.name: one for one in times}
    last, mixed = slowest(times, names[:batch]), by_name[MIXED]
    dense = by_name.get(DENSE.name)
    columns = ("batch of", "ms a step", "CPU ms a step", "of dense", "of the slowest")
    show_table(
        f"Decode steps of {batch} sessions after {context:,} tokens",
        columns,
        [
            (
                one.name,
                f"{one.wall_ms:.1f}",
                f"{one.cpu_ms:.1f}",
                "" if dense is None else f"{one.cpu_ms / dense.cpu_ms:.2f}",
                f"{one.cpu_ms / last.cpu_ms:.2f}",
            )
            for one in times
        ],
        numeric=columns[1:],
    )
    ratio = mixed.cpu_ms / last.cpu_ms
    hint(f"A mixed batch takes {ratio:.2f} of the time of one of {last.name}, the slowest in it, by CPU time.")
    if json_file is not None:
        settings = {
            "recipes": names,
            "context": context,
            "batch": batch,
            "new_tokens": new_tokens,
            "model": model,
            "threads": threads,
        }
        write_json(json_file, settings, {"ratio": ratio, "rows": [asdict(one) for one in times]})
    if max_ratio is not None and ratio > max_ratio:
        hint(f"More than --max-ratio {max_ratio:g}.")
        raise typer.Exit(1)
