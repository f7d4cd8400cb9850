"""How commands print: tables and progress for people, JSON for programs. Knows nothing of what is printed.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvservice.errors import ConfigError

PIPED_WIDTH = 160
"""Width of a table that doesn't go to a terminal."""

REPORTED_PACKAGES = ("kvservice", "torch", "triton", "transformers", "grpcio", "redis", "numpy")


def complain(message: str) -> None:
    """One sentence on standard error."""
    typer.echo(f"kvservice: {message}", err=True)


def hint(message: str) -> None:
    """A line for people, on standard error."""
    typer.echo(message, err=True)


def show_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Iterable[str] = ()
) -> None:
    """Prints a table to standard output; `numeric` names the columns to align to the right."""
    right = set(numeric)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        # Names stay whole: people copy them, and programs look for them.
        table.add_column(
            column,
            justify="right" if column in right else "left",
            overflow="fold",
            no_wrap=index == 0 or column in right,
        )
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=PIPED_WIDTH)
    console.print(table)


def progress_bar() -> Progress:
    """A progress bar on standard error, shown only when that is a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def human_bytes(num_bytes: float) -> str:
    """`num_bytes` with a binary unit, such as `21.3 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def environment(device: str = "cpu") -> dict[str, object]:
    """Where a result was measured: device, versions, threads, commit."""
    return {
        "device": device,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: installed for name in REPORTED_PACKAGES if (installed := _installed(name))},
        "cpus": os.cpu_count(),
        "threads": len(os.sched_getaffinity(0)),
        "commit": _commit(),
    }


def write_json(path: Path, config: Mapping[str, object], results: Mapping[str, object], device: str = "cpu") -> None:
    """Writes the one object that a measuring command's `--json` promises.

    Raises:
        ConfigError: the file can't be written.
    """
    report = {"config": config, "environment": environment(device), "results": results}
    try:
        path.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"--json {path}: can't be written: {error.strerror}. Name a file in a folder that exists"
        ) from error


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit of the checkout this runs from, or nothing for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return answer.stdout.strip()
