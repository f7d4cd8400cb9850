"""`kvservice bench kernels`: speed of the Triton kernels and the runner on a GPU. Measuring is in `bench.kernels`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.options import JsonFile, parse_counts, parse_names
from kvservice.cli.output import hint, progress_bar, show_table, write_json
from kvservice.errors import ConfigError

if TYPE_CHECKING:
    from kvservice.bench.kernels import KernelRow, SkippedSize

GIB = 1 << 30
INTERPRETED_COPY_BYTES = 1 << 20


def kernels(
    device: Annotated[str, typer.Option("--device", help="cuda; cpu interprets the kernels: for tests only.")] = "cuda",
    models: Annotated[
        str, typer.Option("--models", metavar="NAME,NAME", help="Shapes: smollm2-135m, llama-3.1-8b, tiny.")
    ] = "smollm2-135m,llama-3.1-8b",
    context: Annotated[
        str, typer.Option("--context", metavar="N,N", help="Tokens that sequences hold.")
    ] = "4096,16384,65536",
    batch: Annotated[str, typer.Option("--batch", metavar="N,N", help="Sequences at a time.")] = "1,8",
    prefill_tokens: Annotated[int, typer.Option("--prefill-tokens", min=1, help="Of a prefilled chunk.")] = 2048,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Figures are medians over as many runs.")] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Of random weights and KV.")] = 7,
    json_file: JsonFile = None,
) -> None:
    """Decode, prefill, and decode attention beside a plain copy, with random weights in bf16 and random KV."""
    import torch

    from kvservice.kernels import triton

    place = torch.device(device)
    if place.type == "cpu" and triton.is_installed():
        triton.use_interpreter()
    if (place.type == "cuda" and not torch.cuda.is_available()) or not triton.can_run(place):
        raise ConfigError(
            f"--device {device}: the kernels need Triton (pip install 'kvservice[cuda]') and a CUDA device of compute "
            "capability 8.0 or later; --device cpu interprets them"
        )
    from kvservice.bench.kernels import SHAPES, KernelLoad, KernelRow, copy_bytes_per_s, measure

    names = parse_names(models)
    for name in names:
        if name not in SHAPES:
            raise typer.BadParameter(f"{name!r}: must be one of {', '.join(SHAPES)}", param_hint="--models")
    copy_bytes = GIB if place.type == "cuda" else INTERPRETED_COPY_BYTES
    load = KernelLoad(parse_counts(context), parse_counts(batch), prefill_tokens, repeats, copy_bytes, seed)
    results: list[tuple[str, KernelRow | SkippedSize]] = []
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=len(names) * len(load.contexts) * len(load.batches))
        for name in names:
            for result in measure(SHAPES[name], torch.bfloat16, place, load):
                results.append((name, result))
                bar.advance(task)
    copied = copy_bytes_per_s(copy_bytes, place, repeats)
    rows = [(name, result) for name, result in results if isinstance(result, KernelRow)]
    skipped = [(name, result) for name, result in results if not isinstance(result, KernelRow)]
    hardware = torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu, interpreted"
    _show(hardware, copied, rows)
    for name, size in skipped:
        hint(f"Skipped: {name}, {size.batch} x {size.context_tokens:,} tokens: {size.reason}.")
    if json_file is not None:
        settings = {"models": names, "dtype": "bf16", **asdict(load)}
        found: dict[str, object] = {"copy_gb_per_s": copied / 1e9}
        found["rows"] = [{"model": name, **asdict(row)} for name, row in rows]
        found["skipped"] = [{"model": name, **asdict(size)} for name, size in skipped]
        write_json(json_file, settings, found, hardware)


def _show(hardware: str, copied: float, rows: list[tuple[str, KernelRow]]) -> None:
    columns = (
        "shape",
        "context",
        "batch",
        "prefill tok/s",
        "decode ms/token",
        "output tok/s",
        "attention GB/s",
        "of copy",
    )
    show_table(
        f"Kernels on {hardware}; a copy reads and writes {copied / 1e9:,.0f} GB/s",
        columns,
        [
            (
                name,
                f"{row.context_tokens:,}",
                str(row.batch),
                f"{row.prefill_tokens_per_s:,.0f}",
                f"{row.decode_ms_per_token:.2f}",
                f"{row.output_tokens_per_s:,.1f}",
                f"{row.attention_gb_per_s:,.1f}",
                f"{row.copy_fraction:.0%}",
            )
            for name, row in rows
        ],
        numeric=columns[1:],
    )
