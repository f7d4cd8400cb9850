"""`kvservice bench roofline`: a decode step's parts beside the machine's limits. Measuring is in `kvservice.bench`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.options import DEFAULT_MODEL, JsonFile, Model, Threads, parse_counts
from kvservice.cli.output import hint, progress_bar, show_table, write_json
from kvservice.config.worker import WorkerConfig
from kvservice.errors import ConfigError

if TYPE_CHECKING:
    from kvservice.bench.roofline import Limits, StepParts


def roofline(
    batch: Annotated[str, typer.Option("--batch", metavar="N,N", help="Sequences, one number a step.")] = "1,1,16",
    contexts: Annotated[
        str, typer.Option("--contexts", metavar="N,N", help="Tokens of each sequence's context, one number a step.")
    ] = "512,8000,2048",
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Timed decode steps.")] = 48,
    model: Model = DEFAULT_MODEL,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Where a dense decode step's time goes, beside what its bytes and products take at this machine's limits."""
    batches, lengths = parse_counts(batch), parse_counts(contexts)
    if len(batches) != len(lengths):
        raise ConfigError(f"--batch has {len(batches)} numbers, --contexts {len(lengths)}: give as many of each")
    from kvservice.bench.roofline import measure_limits, measure_steps
    from kvservice.cli.compose import open_model
    from kvservice.models.fetch import resolve

    limits = measure_limits()  # before the model takes torch's threads
    measured = open_model(WorkerConfig(model=model, threads=threads), resolve(model, None))
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=len(batches))
        steps = measure_steps(measured, list(zip(batches, lengths, strict=True)), new_tokens, lambda: bar.advance(task))
    for step in steps:
        _show(step, limits)
    hint(
        f"Limits measured here: {limits.bytes_per_s / 1e9:.1f} GB/s read, {limits.flops_per_s / 1e12:.2f} TFLOP/s "
        "in bf16."
    )
    if json_file is not None:
        settings = {"batch": batches, "contexts": lengths, "new_tokens": new_tokens, "model": model, "threads": threads}
        write_json(json_file, settings, {"limits": asdict(limits), "steps": [asdict(step) for step in steps]})


def _show(step: StepParts, limits: Limits) -> None:
    columns = ("part", "ms", "MB", "byte time, ms", "GFLOP", "product time, ms")
    rows = [
        (
            part.name,
            f"{part.ms:.2f}",
            f"{part.num_bytes / 1e6:.1f}",
            f"{part.byte_ms(limits):.2f}",
            f"{part.flops / 1e9:.2f}",
            f"{part.flop_ms(limits):.2f}",
        )
        for part in (*step.parts, step.whole)
    ]
    show_table(f"A decode step: {step.batch} x {step.context_tokens:,} tokens", columns, rows, numeric=columns[1:])
