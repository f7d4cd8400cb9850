"""`kvservice bench admitted`: sessions that decode at once in one device memory. `bench.admitted` measures."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from kvservice.cli.bench_soak import check_writable
from kvservice.cli.options import DEFAULT_MODEL, HostBytes, JsonFile, KvBytes, Model, Threads, parse_counts, parse_names
from kvservice.cli.output import hint, human_bytes, progress_bar, show_table, write_json
from kvservice.config.recipes import PLAIN_RECIPES, RECIPES
from kvservice.config.worker import WorkerConfig
from kvservice.errors import ConfigError


def admitted(
    recipes: Annotated[
        str, typer.Option("--recipes", metavar="NAME,NAME", help="The first is what the others are compared with.")
    ] = "dense,recall",
    contexts: Annotated[str, typer.Option("--contexts", metavar="N,N", help="Tokens of each session.")] = "6000,8000",
    decode: Annotated[
        bool, typer.Option("--decode/--no-decode", help="Let all of them decode; that fills host memory.")
    ] = True,
    kv_bytes: KvBytes = None,
    host_bytes: HostBytes = None,
    model: Model = DEFAULT_MODEL,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """How many sessions decode at once in the same device memory, recipe by recipe: by arithmetic, and really.

    Keys and values of the contexts are random numbers, so nothing is read; answers mean nothing.
    """
    lengths, names = parse_counts(contexts), parse_names(recipes)
    for name in names:
        if name not in PLAIN_RECIPES:
            raise ConfigError(f"--recipes {name}: choose from {', '.join(PLAIN_RECIPES)}")
    check_writable("--json", json_file)
    from kvservice.bench.admitted import measure_admitted
    from kvservice.cli.compose import open_model
    from kvservice.models.fetch import resolve

    defaults = WorkerConfig()
    budget = {"kv_bytes": kv_bytes or int(defaults.kv_bytes), "host_bytes": host_bytes or int(defaults.host_bytes)}
    measured = open_model(WorkerConfig(model=model, threads=threads), resolve(model, None))
    with progress_bar() as bar:
        rows = [
            measure_admitted(measured, RECIPES[name], length, **budget, decodes=decode)
            for length in bar.track(lengths, description="filling")
            for name in names
        ]
    first = {row.context_tokens: row for row in rows if row.recipe == names[0]}
    columns = ("recipe", "tokens", "device", "host", "fit", "admitted", "decode at once", f"x {names[0]}")
    show_table(
        f"Sessions in {human_bytes(budget['kv_bytes'])} of device, {human_bytes(budget['host_bytes'])} of host memory",
        columns,
        [
            (
                row.recipe,
                f"{row.context_tokens:,}",
                human_bytes(row.device_bytes),
                human_bytes(row.host_bytes),
                str(row.fitting),
                str(row.admitted),
                str(row.decoding_at_once) if decode else "-",
                f"{row.admitted / first[row.context_tokens].admitted:.2f}",
            )
            for row in rows
        ],
        numeric=columns[1:],
    )
    hint("The prefill workspace comes out of the device memory too; a refusal may be for host memory.")
    if json_file is not None:
        settings = {"recipes": names, "contexts": lengths, **budget, "model": model, "decodes": decode}
        write_json(json_file, settings, {"rows": [asdict(row) for row in rows]})
