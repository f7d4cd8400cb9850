"""`kvservice config check|schema`: settings files, looked at without a service. Starts nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvservice.cli.settings import overlay, read_secret, read_settings, service_config
from kvservice.config.service import ServiceConfig

app = typer.Typer(help="Look at settings files.", no_args_is_help=True)

PLACEHOLDER = "no secret is kept in a settings file"


@app.command("check")
def check(file: Annotated[Path, typer.Argument(metavar="FILE", help="Settings, as JSON or TOML.")]) -> None:
    """Check a settings file; exit code 2 and a sentence if it can't be used. No file that it names is looked at.

    The service's secret need not be in it: it comes from the environment or a file of its own.
    """
    settings = read_settings(file)
    table = settings.get("gateway")
    if isinstance(table, dict) and "secret" not in table:
        settings = overlay(settings, {"gateway": {"secret": read_secret(None) or PLACEHOLDER}})
    config = service_config(settings)
    parts = [f"model {deployment.worker.model} ({deployment.name})" for deployment in config.ray_deployments()]
    typer.echo(f"{file}: fine; {', '.join(parts)}")


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of settings files."""
    typer.echo(json.dumps(ServiceConfig.model_json_schema(), indent=2))
