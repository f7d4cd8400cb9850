"""`kvservice bench kills` and `bench scale`: workers on Ray that are killed, added and taken away under load.

`bench.replicas` measures.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvservice.cli.bench_soak import PlotFile, check_writable
from kvservice.cli.options import DEFAULT_MODEL, JsonFile, Model, Recipe
from kvservice.cli.output import hint, progress_bar, show_table, write_json
from kvservice.config.recipes import DEFAULT_RECIPE

if TYPE_CHECKING:
    from kvservice.bench.replicas import KillFigures, ScaleFigures
    from kvservice.bench.rounds import RoundsLoad
    from kvservice.client import LocalService

Callers = Annotated[int, typer.Option("--callers", min=1, help="Each with a conversation of its own, over and over.")]
DocTokens = Annotated[int, typer.Option("--doc-tokens", min=1, help="Tokens of each conversation's document.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=2, help="Tokens of each answer.")]
Workers = Annotated[int, typer.Option("--workers", min=2, help="Workers; the most of them where they are scaled.")]
KvBytesOfEach = Annotated[str, typer.Option("--kv-bytes", metavar="SIZE", help="Device memory of each worker.")]
HostBytesOfEach = Annotated[str, typer.Option("--host-bytes", metavar="SIZE", help="Host memory of each worker.")]


def kills(
    num_kills: Annotated[int, typer.Option("--kills", min=1, help="Workers to kill, one after the other.")] = 20,
    workers: Workers = 2,
    callers: Callers = 4,
    doc_tokens: DocTokens = 600,
    new_tokens: NewTokens = 48,
    recipe: Recipe = DEFAULT_RECIPE,
    kv_bytes: KvBytesOfEach = "256MiB",
    host_bytes: HostBytesOfEach = "512MiB",
    model: Model = DEFAULT_MODEL,
    json_file: JsonFile = None,
) -> None:
    """Kill workers with -9 in the middle of their answers, under load, on a local Ray. Exits 1 if anything was wrong.

    Every answer is compared with the one that the same conversation had before the first kill.
    """
    check_writable("--json", json_file)
    load = rounds_load(callers, doc_tokens, new_tokens, recipe)
    scaling = {"replicas": workers}
    figures = asyncio.run(_kills(load, _settings(model, kv_bytes, host_bytes, scaling), workers, num_kills))
    rows = [(name, shown(value)) for name, value in asdict(figures).items() if name != "restart_s"]
    rows.append(("a worker was there again after", f"{max(figures.restart_s):.1f} s at most"))
    show_table(f"{num_kills} kills under {callers} callers", ("what", "figure"), rows, numeric=("figure",))
    if json_file is not None:
        write_json(json_file, {**asdict(load), "workers": workers, "model": model}, asdict(figures))
    if figures.wrong or figures.lost_turns:
        raise typer.Exit(1)


def scale(
    workers: Workers = 3,
    callers: Callers = 6,
    doc_tokens: DocTokens = 600,
    new_tokens: NewTokens = 48,
    queue_s: Annotated[
        float, typer.Option("--queue-s", min=1e-6, help="Seconds of prefill in a worker's queue that one is added at.")
    ] = 0.1,
    hold_s: Annotated[float, typer.Option("--hold-s", min=0.0, help="Of load with all workers there.")] = 20.0,
    down_delay_s: Annotated[float, typer.Option("--down-delay-s", min=0.0, help="Before a worker may go.")] = 10.0,
    timeout_s: Annotated[float, typer.Option("--timeout-s", min=1.0, help="Longest wait for the workers.")] = 300.0,
    recipe: Recipe = DEFAULT_RECIPE,
    kv_bytes: KvBytesOfEach = "256MiB",
    host_bytes: HostBytesOfEach = "512MiB",
    model: Model = DEFAULT_MODEL,
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Have load alone take the workers from one to the most and back, on a local Ray. Exits 1 if anything was wrong."""
    check_writable("--json", json_file)
    check_writable("--plot", plot)
    load = rounds_load(callers, doc_tokens, new_tokens, recipe)
    scaling = {
        "autoscaling": {
            "max_replicas": workers,
            "occupancy": 0.05,
            "queue_s": queue_s,
            "delay_s": 2.0,
            "down_delay_s": down_delay_s,
        }
    }
    settings = _settings(model, kv_bytes, host_bytes, scaling)
    figures = asyncio.run(_scale(load, settings, workers, timeout_s, hold_s))
    rows = [(name, shown(value)) for name, value in asdict(figures).items() if name != "samples"]
    show_table(f"1 to {workers} workers and back, {callers} callers", ("what", "figure"), rows, numeric=("figure",))
    if plot is not None:
        from kvservice.bench.plots import plot_fleet

        plot_fleet(plot, figures.samples, f"1 to {workers} workers and back, {callers} callers")
        hint(f"wrote {plot}")
    if json_file is not None:
        write_json(json_file, {**asdict(load), "workers": workers, "model": model}, asdict(figures))
    if figures.wrong or figures.lost_turns:
        raise typer.Exit(1)


async def _kills(load: RoundsLoad, settings: Mapping[str, Any], workers: int, num_kills: int) -> KillFigures:
    from kvservice.bench.replicas import measure_kills

    with progress_bar() as bar:
        task = bar.add_task("killing", total=num_kills)
        async with _service(settings) as service:
            return await measure_kills(
                service.address,
                service.pid,
                load,
                workers=workers,
                kills=num_kills,
                report=lambda: bar.advance(task),
            )


async def _scale(
    load: RoundsLoad, settings: Mapping[str, Any], workers: int, timeout_s: float, hold_s: float
) -> ScaleFigures:
    from kvservice.bench.replicas import measure_scaling

    async with _service(settings) as service:
        return await measure_scaling(service.address, load, fewest=1, most=workers, timeout_s=timeout_s, hold_s=hold_s)


@asynccontextmanager
async def _service(settings: Mapping[str, Any]) -> AsyncIterator[LocalService]:
    from kvservice.client import LocalService

    hint("starting the service on Ray")
    with tempfile.TemporaryDirectory(prefix="kvservice-ray-") as folder:
        file = Path(folder) / "settings.json"
        file.write_text(json.dumps(settings))
        async with LocalService(["--ray", "--config", str(file)]) as service:
            yield service


def rounds_load(callers: int, doc_tokens: int, new_tokens: int, recipe: str | None) -> RoundsLoad:
    """What the callers send, of the options."""
    from kvservice.bench.rounds import RoundsLoad

    return RoundsLoad(
        callers=callers,
        document_tokens=doc_tokens,
        question_tokens=16,
        turns=3,
        new_tokens=new_tokens,
        recipe=recipe or DEFAULT_RECIPE,
        seed=7,
    )


def worker_settings(model: str, kv_bytes: str, host_bytes: str) -> dict[str, Any]:
    """Settings of one of several workers whose answers are compared."""
    return {
        "model": model,
        "kv_bytes": kv_bytes,
        "host_bytes": host_bytes,
        "threads": 1,
        # Else an answer that was computed again might not be the same, and nobody could say whether it is right.
        "deterministic": True,
    }


def _settings(model: str, kv_bytes: str, host_bytes: str, scaling: Mapping[str, Any]) -> dict[str, Any]:
    worker = {**worker_settings(model, kv_bytes, host_bytes), "drain_grace_s": 10}
    deployment = {"name": "bench", "worker": worker, "num_cpus": 0.25, "health_check_period_s": 1, **scaling}
    return {"ray": {"deployments": [deployment]}, "log_level": "WARNING"}


def shown(value: object) -> str:
    """A figure, as tables have it."""
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, dict):
        return ", ".join(f"{count} x {what}" for what, count in value.items()) or "none"
    return str(value)
