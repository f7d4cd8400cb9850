"""`python -m kvservice.demo`: exit code 0 when all was as promised, 1 when not."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

import typer
from rich.console import Console

from kvservice.demo.screen import Screen
from kvservice.demo.story import run
from kvservice.errors import KVServiceError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    seed: Annotated[int | None, typer.Option("--seed", help="Of the pass key. Unset: another one each time.")] = None,
    model: Annotated[
        str, typer.Option("--model", metavar="NAME|FOLDER", help="A fetched model's name, or a model folder.")
    ] = "smollm2-135m",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. Unset: the cores.")] = None,
) -> None:
    """A long document, read once and asked three questions under three recipes, by a service started here."""
    serve_arguments = ["--model", model, *(["--threads", str(threads)] if threads is not None else [])]
    screen = Screen(Console(highlight=False))
    try:
        is_well = asyncio.run(run(screen, seed, serve_arguments))
    except KVServiceError as error:
        screen.failure(error.message)
        sys.exit(1)
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    app(prog_name="python -m kvservice.demo")
