"""`kvservice drill` and `kvservice fuzz`: what breaks when things break. The breaking is done in `kvservice.drill`."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.progress import TaskID

from kvservice.cli.options import JsonFile, api_key, client_tls, parse_names
from kvservice.cli.output import complain, hint, human_bytes, progress_bar, show_table, write_json

if TYPE_CHECKING:
    from kvservice.drill.outcomes import FaultReport, Probe

T = TypeVar("T")

TINY = "tiny"
FAILED = 1


def drill(
    reduced: Annotated[bool, typer.Option("--reduced", help="The short form, as CI runs it.")] = False,
    part: Annotated[
        str,
        typer.Option(
            "--part",
            metavar="NAME,NAME",
            help="tier, state, machine, input, process, network: where faults strike. The last one needs a network "
            "namespace of its own: `unshare --net --map-root-user`.",
        ),
    ] = "tier,state,machine,input,process",
    only: Annotated[
        str | None, typer.Option("--only", metavar="NAME,NAME", help="Faults whose names have one of these in them.")
    ] = None,
    model: Annotated[
        str,
        typer.Option("--model", metavar="NAME|FOLDER", help=f"{TINY}: random weights, for speed; or as of `serve`."),
    ] = TINY,
    recipe: Annotated[str, typer.Option("--recipe", help="Of the sessions: one that stores KV.")] = "recall",
    seed: Annotated[int, typer.Option("--seed", help="Of all that is random.")] = 7,
    json_file: JsonFile = None,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="HOST:PORT", help="Drill the service that runs there, from outside."),
    ] = None,
    kv_url: Annotated[str | None, typer.Option("--kv-url", metavar="URL", help="With --address: its kv Redis.")] = None,
    state_url: Annotated[
        str | None, typer.Option("--state-url", metavar="URL", help="Its state Redis; unset: that is left alone.")
    ] = None,
    tenant: Annotated[str, typer.Option("--tenant", help="With --address: whose key it is.")] = "local",
    may_lose_kv: Annotated[
        bool, typer.Option("--may-lose-kv", help="With --address: all stored KV may be deleted, every tenant's.")
    ] = False,
) -> None:
    """Break things on purpose and say what happened to answers, speed, coverage and data. Exits 1 if any isn't right.

    Starts a deployment of its own: two redis-servers behind proxies, two gateways, two workers. Every answer under a
    fault is compared with the fault-free one, bit for bit. With --address it is a service that runs: nothing of it is
    lost, and answers are compared by their tokens.
    """
    if address is not None:
        _drill_attached(address, kv_url, state_url, tenant, recipe, seed, json_file, may_lose_kv=may_lose_kv)
        return
    from kvservice.drill.deployment import DrillConfig
    from kvservice.drill.run import plan, run_drill
    from kvservice.models.tiny import write_tiny_checkpoint

    wanted = plan(reduced=reduced, parts=parse_names(part), only=parse_names(only) if only else ())
    with tempfile.TemporaryDirectory(prefix="kvservice-drill-") as folder, progress_bar() as bar:
        place = Path(folder)
        name = str(write_tiny_checkpoint(place / "model")) if model == TINY else model
        config = DrillConfig(name, place, dtype="fp32" if model == TINY else "bf16", seed=seed)
        task = bar.add_task("faults", total=len(wanted.names) + 1)

        settings = {"model": model, "recipe": recipe, "seed": seed, "reduced": reduced, "faults": list(wanted.names)}
        so_far: list[FaultReport] = []

        def note(found: FaultReport) -> None:
            bar.advance(task)
            _note(found)
            so_far.append(found)
            _write(so_far, settings, json_file)

        reports = _run(run_drill(config, recipe, wanted, note))
    _conclude(reports, settings, json_file)


def _drill_attached(
    address: str,
    kv_url: str | None,
    state_url: str | None,
    tenant: str,
    recipe: str,
    seed: int,
    json_file: Path | None,
    *,
    may_lose_kv: bool,
) -> None:
    from kvservice.client import Client
    from kvservice.drill.attached import AttachedConfig, run_attached

    if kv_url is None:
        raise typer.BadParameter("--address needs --kv-url: the Redis that stores the service's KV")
    config = AttachedConfig(kv_url, state_url, tenant, may_lose_kv, seed)

    async def run() -> list[FaultReport]:
        async with Client(address, api_key(), tls=client_tls()) as client:
            return await run_attached(config, client, recipe, _note)

    settings = {"address": address, "tenant": tenant, "recipe": recipe, "seed": seed, "may_lose_kv": may_lose_kv}
    _conclude(_run(run()), settings, json_file)


def _note(found: FaultReport) -> None:
    """Says of a fault how it went, as it is through."""
    if found.passed:
        back = "" if found.recovered_s is None else f", back after {found.recovered_s:.1f} s"
        hint(f"{found.name}: passed{back}")
    else:
        complain(f"{found.name}: {'; '.join(found.findings)}")


def _write(reports: list[FaultReport], settings: dict[str, object], json_file: Path | None) -> None:
    """Written after each fault: who stops a drill has what it found."""
    if json_file is not None:
        write_json(json_file, settings, {"faults": [_result(found) for found in reports]})


def _conclude(reports: list[FaultReport], settings: dict[str, object], json_file: Path | None) -> None:
    _show(reports)
    _write(reports, settings, json_file)
    failed = [found for found in reports if not found.passed]
    hint(f"{len(reports) - len(failed)} of {len(reports)} passed")
    if failed:
        raise typer.Exit(FAILED)


def churn(
    sessions: Annotated[int, typer.Option("--sessions", min=1, help="Short sessions, eight at a time.")] = 10_000,
    model: Annotated[
        str, typer.Option("--model", metavar="NAME|FOLDER", help=f"{TINY}: random weights; or as of `serve`.")
    ] = TINY,
    recipe: Annotated[str, typer.Option("--recipe", help="Of the sessions: one that stores KV.")] = "recall",
    seed: Annotated[int, typer.Option("--seed", help="Of all that is random.")] = 7,
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Also draw it. Needs the extra `plots`.")
    ] = None,
) -> None:
    """Begin thousands of short sessions, cancel, cut off, fork, move and leave them, and look for what stays.

    Exits 1 if a session, call, block, byte, lease, descriptor or thread is left, or a call fails that shouldn't.
    """
    if plot is not None:
        import kvservice.bench.plots
    from kvservice.drill.churn import REQUEST_MEMORY_S, Churn, ChurnReport
    from kvservice.drill.deployment import Deployment, DrillConfig
    from kvservice.models.tiny import write_tiny_checkpoint

    async def run(config: DrillConfig, note: Callable[[int], None]) -> ChurnReport:
        async with Deployment(config) as deployment:
            return await Churn(deployment, recipe).run(sessions, note)

    with tempfile.TemporaryDirectory(prefix="kvservice-churn-") as folder, progress_bar() as bar:
        place = Path(folder)
        name = str(write_tiny_checkpoint(place / "model")) if model == TINY else model
        limits = {"request_memory_s": REQUEST_MEMORY_S}
        config = DrillConfig(name, place / "data", dtype="fp32" if model == TINY else "bf16", seed=seed, limits=limits)
        task = bar.add_task("sessions", total=sessions)
        found = _run(run(config, lambda begun: bar.update(task, completed=begun)))
    first, last = found.samples[0].processes, found.samples[-1].processes
    rows = [
        ("sessions", f"{found.sessions:,} in {found.seconds:,.0f} s"),
        ("actions", ", ".join(f"{name} {count:,}" for name, count in sorted(found.actions.items()))),
        ("calls that failed", ", ".join(f"{name} {count:,}" for name, count in sorted(found.errors.items())) or "none"),
        *(
            (
                name,
                f"{first[name].files} to {now.files} descriptors, {first[name].threads} to {now.threads} threads, "
                f"{human_bytes(first[name].rss_bytes)} to {human_bytes(now.rss_bytes)}",
            )
            for name, now in last.items()
        ),
        ("left", "; ".join(found.findings) or "nothing"),
    ]
    show_table("Churn", ("what", "figure"), rows)
    if json_file is not None:
        settings = {"sessions": sessions, "model": model, "recipe": recipe, "seed": seed}
        write_json(json_file, settings, asdict(found))
    if plot is not None:
        quantities = {"descriptors": ("files", 1), "threads": ("threads", 1), "RSS, MiB": ("rss_bytes", 1 << 20)}
        panels = {
            label: {
                process: [getattr(sample.processes[process], name) / unit for sample in found.samples]
                for process in first
            }
            for label, (name, unit) in quantities.items()
        }
        panels["sessions held"] = {"by workers": [sample.held_sessions for sample in found.samples]}
        panels["KV held, MiB"] = {"by workers": [sample.held_bytes / (1 << 20) for sample in found.samples]}
        panels["keys"] = {
            "state": [sample.state_keys for sample in found.samples],
            "kv": [sample.kv_keys for sample in found.samples],
        }
        minutes = [sample.time_s / 60 for sample in found.samples]
        kvservice.bench.plots.plot_churn(plot, minutes, panels, f"{found.sessions:,} short sessions")
    if found.findings:
        raise typer.Exit(FAILED)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`; a SIGTERM ends it as Ctrl-C does, so that no process that was started outlives it."""

    async def main() -> T:
        task = asyncio.ensure_future(work)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await task

    return asyncio.run(main())


def _result(found: FaultReport) -> dict[str, object]:
    probes = [asdict(probe) | {"outcome": probe.outcome.value} for probe in found.probes]
    return asdict(found) | {"probes": probes, "passed": found.passed}


def _show(reports: list[FaultReport]) -> None:
    rows = [
        (
            found.name,
            ", ".join(_answer(probe) for probe in found.probes) or "-",
            ", ".join(_slower(probe) for probe in found.probes if probe.usual_s) or "-",
            ", ".join(f"{reason} {count}" for reason, count in sorted(found.misses.items())) or "-",
            _data(found),
            "-" if found.recovered_s is None else f"{found.recovered_s:.1f} s",
            "passed" if found.passed else "; ".join(found.findings),
        )
        for found in reports
    ]
    columns = ("fault", "answers", "time, x usual", "frames missed", "data", "back after", "verdict")
    show_table("Fault drill", columns, rows)


def _answer(probe: Probe) -> str:
    tokens = f" {probe.recomputed_tokens:,}" if probe.recomputed_tokens else ""
    return f"{probe.name} {probe.outcome.value}{tokens}"


def _slower(probe: Probe) -> str:
    return f"{probe.seconds / probe.usual_s:.1f}"


def _data(found: FaultReport) -> str:
    data = found.data
    words = [f"{data.checked_frames} frames"]
    words += [
        f"{count} {word}" for count, word in ((data.missing_frames, "gone"), (data.corrupt_frames, "damaged")) if count
    ]
    return ", ".join(words)


def fuzz(
    target: Annotated[
        str | None, typer.Option("--target", metavar="NAME,NAME", help="What to feed. Unset: all there is.")
    ] = None,
    inputs: Annotated[int, typer.Option("--inputs", min=1, help="For each target.")] = 100_000,
    corpus: Annotated[
        Path | None,
        typer.Option("--corpus", metavar="DIR", help="Where inputs that reach something new are kept, and taken from."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of all that is random.")] = 7,
    json_file: JsonFile = None,
) -> None:
    """Feed mutated bytes to all that reads frames, replies, messages and files. Exits 1 if any does what it must not.

    A parser may refuse with a reason, or accept what is right. It may not raise anything else, and no frame may be
    accepted that isn't, byte for byte, what was written.
    """
    from kvservice.drill.fuzz import Fuzzer
    from kvservice.drill.fuzz_targets import targets

    with tempfile.TemporaryDirectory(prefix="kvservice-fuzz-") as folder, progress_bar() as bar:
        known = {each.name: each for each in targets(Path(folder))}
        names = parse_names(target) if target else list(known)
        if unknown := set(names) - known.keys():
            raise typer.BadParameter(f"unknown targets {', '.join(sorted(unknown))}: there are {', '.join(known)}")
        reports = []
        for name in names:
            task = bar.add_task(name, total=inputs)

            def note(done: int, task: TaskID = task) -> None:
                bar.update(task, completed=done)

            reports.append(Fuzzer(known[name], seed, corpus).run(inputs, note))
    rows = [
        (
            found.target,
            f"{found.inputs:,}",
            f"{found.inputs / max(found.seconds, 1e-9):,.0f}",
            f"{sum(count for verdict, count in found.verdicts.items() if verdict.startswith('accepted')):,}",
            f"{sum(count for verdict, count in found.verdicts.items() if verdict.startswith('refused')):,}",
            f"{len(found.verdicts):,}",
            f"{found.corpus:,}",
            f"{found.lines:,}",
            f"{len(found.findings):,}",
        )
        for found in reports
    ]
    columns = ("target", "inputs", "a second", "accepted", "refused", "verdicts", "corpus", "lines", "findings")
    show_table("Fuzzing", columns, rows, numeric=columns[1:])
    if json_file is not None:
        settings = {"targets": names, "inputs": inputs, "seed": seed, "corpus": str(corpus) if corpus else None}
        results = [asdict(found) | {"findings": [finding.what for finding in found.findings]} for found in reports]
        write_json(json_file, settings, {"targets": results})
    findings = [(found.target, finding) for found in reports for finding in found.findings]
    for name, finding in findings:
        complain(f"{name}: {finding.what}; the input begins with {finding.data[:80]!r}")
    if findings:
        raise typer.Exit(FAILED)
