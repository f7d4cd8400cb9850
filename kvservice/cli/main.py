"""The command `kvservice`: its groups, and what an error is to a shell. Knows nothing of what the commands do."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from kvservice import __version__
from kvservice.cli import (
    adapt,
    bench,
    calibrate,
    catalogue,
    chat,
    config,
    doctor,
    drain_worker,
    drill,
    eval_indexes,
    eval_methods,
    eval_precision,
    eval_sharing,
    evaluate,
    model,
    serve,
    sessions,
    size,
    stats,
    tenants,
    usage,
)
from kvservice.cli.output import complain
from kvservice.errors import ConfigError, KVServiceError, ModelError

FAILED = 1
BAD_USAGE = 2

SPIN_COUNT = "5000"
"""Turns that a thread of torch's OpenMP pool spins before it sleeps. Its default of 300,000 makes steps several times
slower as soon as gateway or Redis take a core (docs/decisions/011-short-spins.md)."""

app = typer.Typer(
    name="kvservice",
    help="Distributed LLM inference for long-document sessions of many tenants.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(model.app, name="model")
app.command("serve")(serve.serve)
app.command("gateway")(serve.gateway)
app.command("worker")(serve.worker)
app.command("ray")(serve.ray)
app.command("drain-worker")(drain_worker.drain_worker)
app.add_typer(config.app, name="config")
app.command("chat")(chat.chat)
app.add_typer(sessions.app, name="sessions")
app.add_typer(tenants.app, name="tenants")
app.command("stats")(stats.stats)
app.command("usage")(usage.usage)
app.command("methods")(catalogue.methods)
app.command("recipes")(catalogue.recipes)
app.command("size")(size.size)
app.command("drill")(drill.drill)
app.command("churn")(drill.churn)
app.command("fuzz")(drill.fuzz)
app.command("doctor")(doctor.doctor)

app.add_typer(bench.app, name="bench")
evaluate.app.command("indexes")(eval_indexes.indexes)
evaluate.app.command("methods")(eval_methods.methods)
evaluate.app.command("precision")(eval_precision.precision)
evaluate.app.command("sharing")(eval_sharing.sharing)
app.add_typer(evaluate.app, name="eval")
app.add_typer(calibrate.app, name="calibrate")
app.add_typer(adapt.app, name="adapt")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    del version


def exit_code(error: KVServiceError) -> int:
    """What the shell is told: 2 for a setting or a model that can't be used, 1 for a call that failed."""
    return BAD_USAGE if isinstance(error, ConfigError | ModelError) else FAILED


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and exits: 0 fine, 1 failed, 2 bad usage. An error of the service is a sentence."""
    # Read when torch is first imported, which commands do later.
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        app(args=arguments, prog_name="kvservice")
    except KVServiceError as error:
        complain(error.message)
        sys.exit(exit_code(error))
    sys.exit(0)
