"""`kvservice bench start`: from nothing to a first token. Measuring is done in `kvservice.bench`."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import asdict
from typing import Annotated

import typer

from kvservice.cli.options import DEFAULT_MODEL, JsonFile, Model, Threads
from kvservice.cli.output import hint, progress_bar, show_table, write_json


def start(
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Starts; figures are medians.")] = 3,
    model: Model = DEFAULT_MODEL,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Time from `kvservice serve` to readiness and to a caller's first token, redis-servers and all; model cached."""
    from kvservice.bench.start import measure_start
    from kvservice.models.fetch import resolve

    resolve(model, None)
    arguments = ["--log-level", "WARNING", "--model", model]
    if threads is not None:
        arguments += ["--threads", str(threads)]
    with progress_bar() as bar:
        starts = [
            asyncio.run(measure_start(arguments)) for _ in bar.track(range(repeats), description="starting the service")
        ]
    columns = ("until", "seconds, median", "at most")
    rows = [
        (name, f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}")
        for name, seconds in (
            ("ready", [one.ready_s for one in starts]),
            ("first token", [one.first_token_s for one in starts]),
        )
    ]
    show_table("From the command on", columns, rows, numeric=columns[1:])
    hint(f"Model {model}; {repeats} starts.")
    if json_file is not None:
        settings = {"model": model, "repeats": repeats, "threads": threads}
        write_json(json_file, settings, {"starts": [asdict(one) for one in starts]})
