"""`kvservice bench soak`: a full, mixed load on an engine in this process. Measuring is done in `kvservice.bench`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.options import DEFAULT_MODEL, HostBytes, JsonFile, KvBytes, Model, Threads
from kvservice.cli.output import complain, hint, human_bytes, progress_bar, show_table, write_json
from kvservice.config.recipes import PLAIN_RECIPES, RECIPES
from kvservice.config.worker import WorkerConfig
from kvservice.errors import ConfigError

if TYPE_CHECKING:
    from kvservice.bench.soak import MemoryTerms, SoakResult
    from kvservice.bench.steps import StepFigures
    from kvservice.types import RecipeSpec

MIXED = "mixed"
ANSWERS_A_SESSION = 3
"""The most answers to one question; so many may be under way at a time."""

PlotFile = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.png", help="Also draw it. Needs the extra `plots`.")
]


def parse_range(text: str) -> tuple[int, int]:
    """Two whole numbers from words such as `500-6000`, or one for both."""
    words = [word.strip() for word in text.split("-")]
    if len(words) > 2 or not all(word.isdigit() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"{text!r}: write two whole numbers of at least 1 with a dash, such as 500-6000")
    low, high = int(words[0]), int(words[-1])
    if low > high:
        raise typer.BadParameter(f"{text!r}: the shorter length comes first")
    return low, high


def check_writable(option: str, path: Path | None) -> None:
    """Refuses a file in a folder that isn't there: better now than after the measurement.

    Raises:
        ConfigError: there is no such folder.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.absolute().parent}")


def soak(
    sessions: Annotated[int, typer.Option("--sessions", min=1, help="Callers, each with a session at a time.")] = 16,
    minutes: Annotated[float, typer.Option("--minutes", min=0.01, help="How long they make new calls.")] = 10.0,
    doc_tokens: Annotated[
        str, typer.Option("--doc-tokens", metavar="N-N", help="The shortest and the longest document.")
    ] = "500-6000",
    recipe: Annotated[
        str, typer.Option("--recipe", help=f"{MIXED}: one of {', '.join(PLAIN_RECIPES)} at random; or one of these.")
    ] = MIXED,
    seed: Annotated[int, typer.Option("--seed", help="Of all that is random.")] = 7,
    model: Model = DEFAULT_MODEL,
    kv_bytes: KvBytes = None,
    host_bytes: HostBytes = None,
    threads: Threads = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Does anything drift, leak or fail under a full, mixed load? Exits 1 if so.

    Callers read documents, ask, fork, cancel and go at random points. Their documents take more than the arena now and
    then, so that sequences have to make room. Also says where a step's time goes. One engine in this process.
    """
    lengths, recipes = parse_range(doc_tokens), _recipes(recipe)
    check_writable("--json", json_file)
    check_writable("--plot", plot)
    if plot is not None:
        import kvservice.bench.plots
    from kvservice.bench.callers import SoakLoad
    from kvservice.bench.process import read_memory
    from kvservice.bench.soak import Limits, run_soak
    from kvservice.cli.compose import load_libraries, make_engine
    from kvservice.models.fetch import resolve
    from kvservice.models.tokenizer import Tokenizer

    defaults = WorkerConfig()
    config = WorkerConfig(
        model=model,
        kv_bytes=kv_bytes or defaults.kv_bytes,
        host_bytes=host_bytes or defaults.host_bytes,
        max_batch=max(defaults.max_batch, sessions * ANSWERS_A_SESSION),
        threads=threads,
    )
    folder = resolve(model, None)
    tokenizer = Tokenizer.load(folder)
    load_libraries()
    limits = Limits(config.kv_bytes, config.step_tokens, config.max_batch, read_memory().anonymous_bytes)
    engine = make_engine(config, folder, None)
    info = engine.info
    load = SoakLoad(sessions, lengths, recipes, seed)
    hint("measuring the overhead of a full batch, then the soak")
    with progress_bar() as bar:
        task = bar.add_task("seconds", total=round(minutes * 60))
        result = run_soak(
            engine, load, limits, tokenizer.stream, minutes * 60, lambda gone: bar.update(task, completed=round(gone))
        )
    engine.close()
    _show(result)
    hint(f"Model {info.name}: {info.origin}.")
    if json_file is not None:
        settings = {
            "sessions": sessions,
            "minutes": minutes,
            "document_tokens": lengths,
            "recipes": [spec.name for spec in recipes],
            "model": model,
            "origin": info.origin,
            "dtype": config.dtype,
            "kv_bytes": config.kv_bytes,
            "host_bytes": config.host_bytes,
            "step_tokens": config.step_tokens,
            "max_batch": config.max_batch,
            "seed": seed,
            "threads": threads,
        }
        write_json(json_file, settings, _results(result))
    if plot is not None:
        title = f"{sessions} sessions of {lengths[0]:,} to {lengths[1]:,} tokens, recipe {recipe}, model {info.name}"
        kvservice.bench.plots.plot_soak(plot, result.samples, config.kv_bytes, result.memory, title)
    for fault in result.faults:
        complain(fault)
    if result.faults:
        raise typer.Exit(1)


def _recipes(name: str) -> tuple[RecipeSpec, ...]:
    if name == MIXED:
        return tuple(RECIPES[served] for served in PLAIN_RECIPES)
    if name not in PLAIN_RECIPES:
        raise typer.BadParameter(f"unknown recipe {name!r}: choose {MIXED} or one of {', '.join(PLAIN_RECIPES)}")
    return (RECIPES[name],)


def _results(result: SoakResult) -> dict[str, object]:
    samples = result.samples
    return {
        "seconds": result.seconds,
        "faults": list(result.faults),
        "left": result.left,
        "checks": result.num_checks,
        "counts": asdict(result.counts),
        "preemptions": _preemptions(result),
        "drift_mib_per_min": asdict(result.drift),
        "memory": {**asdict(result.memory), "bound_bytes": result.memory.bound_bytes},
        "steps": asdict(result.steps),
        "full_batch_steps": asdict(result.full_batch),
        "overhead": asdict(result.overhead),
        "samples": {name: [getattr(sample, name) for sample in samples] for name in _sample_names(result)},
    }


def _sample_names(result: SoakResult) -> list[str]:
    return list(asdict(result.samples[0])) if result.samples else []


def _preemptions(result: SoakResult) -> dict[str, int]:
    stats = result.stats
    return {
        "swapped_out": stats.swapped_out,
        "forgotten": stats.forgotten,
        "idle_swapped_out": stats.idle_swapped_out,
        "idle_dropped": stats.idle_dropped,
    }


def _show(result: SoakResult) -> None:
    counts = result.counts
    cancelled = counts.cancelled_waiting + counts.cancelled_reading + counts.cancelled_answering
    rows = [
        ("time, with the drain", f"{result.seconds:,.0f} s, {result.steps.num_steps:,} steps"),
        ("tokens", f"{counts.tokens_read:,} read, {counts.tokens_generated:,} generated"),
        ("tokens not read", f"{counts.tokens_reused:,}: another session had their KV"),
        ("tokens read again", f"{counts.tokens_recomputed:,}: their KV was held no more"),
        ("sessions", f"{counts.sessions:,}, {counts.forks:,} of them forked; {counts.released_busy:,} released busy"),
        ("calls that ended by themselves", f"{counts.finished:,}"),
        (
            "calls cancelled",
            f"{cancelled:,}: {counts.cancelled_waiting:,} before they began, {counts.cancelled_reading:,} while "
            f"reading, {counts.cancelled_answering:,} while answering; by the drain {counts.cancelled_at_end:,}",
        ),
        ("calls that found no room at first", f"{counts.refused:,}"),
        ("calls too large, or over their deadline", f"{counts.too_large:,}, {counts.expired:,}"),
        ("made room", ", ".join(f"{name} {count:,}" for name, count in _preemptions(result).items())),
        ("checks passed", f"{result.num_checks:,}"),
        ("left after everything was released", str(result.left or "nothing")),
        ("drift of RSS, MiB/min", "{:+.2f}; second half {:+.2f}".format(*result.drift.rss)),
        ("drift of other memory, MiB/min", "{:+.2f}; second half {:+.2f}".format(*result.drift.other)),
    ]
    show_table("Soak", ("what", "figure"), rows)
    _show_memory(result.memory)
    _show_steps("Where the time of the soak's steps goes", result.steps)
    if result.full_batch.num_steps:
        _show_steps("Steps of a full batch among them", result.full_batch)
    overhead = result.overhead
    _show_steps(
        f"{overhead.batch} sessions that only decode, after {overhead.document_tokens:,} tokens each", overhead.steps
    )


def _show_memory(memory: MemoryTerms) -> None:
    rows = [
        ("before the model was loaded", memory.before_model_bytes),
        ("weights", memory.weight_bytes),
        ("--kv-bytes", memory.kv_bytes),
        ("host tier, touched", memory.host_touched_bytes),
        ("activations and logits", memory.activation_bytes),
        ("allowance", memory.allowance_bytes),
        ("bound: the sum", memory.bound_bytes),
        ("measured, at most", memory.peak_bytes),
        ("of that beside process, weights and touched KV", memory.other_bytes),
    ]
    show_table(
        "Anonymous memory", ("term", "size"), [(name, human_bytes(size)) for name, size in rows], numeric=("size",)
    )


def _show_steps(title: str, figures: StepFigures) -> None:
    columns = ("part", "wall ms, p50", "wall ms, p99", "thread CPU ms, p50", "thread CPU ms, p99")
    rows = [
        (
            phase.name,
            f"{phase.wall_ms_p50:.3f}",
            f"{phase.wall_ms_p99:.3f}",
            f"{phase.cpu_ms_p50:.3f}",
            f"{phase.cpu_ms_p99:.3f}",
        )
        for phase in figures.phases
    ]
    show_table(f"{title}: {figures.num_steps:,} steps", columns, rows, numeric=columns[1:])
