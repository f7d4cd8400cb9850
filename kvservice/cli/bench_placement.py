"""`kvservice bench placement`: which worker is asked first, tried on simulated fleets. `bench.fleet_sim` simulates."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.bench_soak import check_writable
from kvservice.cli.options import JsonFile, parse_names
from kvservice.cli.output import hint, progress_bar, show_table, write_json

if TYPE_CHECKING:
    from kvservice.bench.fleet_sim import PolicyRow


def placement(
    workers: Annotated[int, typer.Option("--workers", min=1, help="Workers of the fleet.")] = 1000,
    sessions: Annotated[int, typer.Option("--sessions", min=1, help="Sessions, all in all.")] = 100_000,
    tenants: Annotated[int, typer.Option("--tenants", min=1, help="Tenants; the k-th has 1/k^skew of them.")] = 500,
    skew: Annotated[float, typer.Option("--skew", min=0, help="Exponent, of tenants and of their documents.")] = 1.1,
    utilisation: Annotated[
        float, typer.Option("--utilisation", min=0.01, help="Share of prefill time if nothing were ever held.")
    ] = 0.9,
    stale_s: Annotated[float, typer.Option("--stale-s", min=0, help="Age of a gateway's hints, at most.")] = 0.5,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Recorded turns: CSV of time_s,session,document,document_tokens."),
    ] = None,
    policies: Annotated[
        str, typer.Option("--policies", metavar="NAME,NAME", help="Which to try.")
    ] = "placement,random,least_loaded,consistent_hash",
    seed: Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")] = 7,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Also draw it, as a PNG.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Placement against chance, the shortest queue and consistent hashing. A simulation, all of it.

    Time to first token, bytes read from the kv Redis, and the busiest worker over the mean.
    """
    check_writable("--json", json_file)
    check_writable("--plot", plot)
    from kvservice.bench.fleet_sim import FleetLoad, recorded_turns, simulate, synthetic_turns

    load = FleetLoad(
        workers=workers,
        sessions=sessions,
        tenants=tenants,
        skew=skew,
        utilisation=utilisation,
        stale_s=stale_s,
        seed=seed,
    )
    turns = synthetic_turns(load) if trace is None else recorded_turns(trace)
    if trace is not None:
        load = replace(load, sessions=len({turn.session for turn in turns}))
    rows: list[PolicyRow] = []
    with progress_bar() as bar:
        for policy in bar.track(parse_names(policies), description="simulating"):
            rows.append(simulate(load, turns, policy))
    _show(rows, f"{load.workers:,} simulated workers, {load.sessions:,} sessions, {len(turns):,} turns")
    if plot is not None:
        from kvservice.bench.plots import plot_placement

        plot_placement(plot, rows, f"Placement on {load.workers:,} simulated workers")
        hint(f"drawn: {plot}")
    if json_file is not None:
        settings = asdict(load) | {"trace": None if trace is None else str(trace)}
        write_json(json_file, settings, {"rows": [asdict(row) for row in rows]})


def _show(rows: list[PolicyRow], title: str) -> None:
    columns = (
        *("policy", "TTFT mean s", "p50 s", "p99 s", "moved GB", "computed Mtokens", "found on worker"),
        "busiest / mean",
    )
    show_table(
        title,
        columns,
        [
            (
                row.policy,
                f"{row.ttft_mean_s:.3f}",
                f"{row.ttft_p50_s:.3f}",
                f"{row.ttft_p99_s:.3f}",
                f"{row.moved_bytes / 1e9:,.0f}",
                f"{row.computed_tokens / 1e6:,.1f}",
                f"{row.found_fraction:.1%}",
                f"{row.imbalance:.2f}",
            )
            for row in rows
        ],
        numeric=columns[1:],
    )
