"""`kvservice eval methods`: all that drop tokens, or look at few, side by side. Measuring is elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.bench_soak import check_writable
from kvservice.cli.evaluate import Dtype, load_engine, read_texts
from kvservice.cli.options import DEFAULT_MODEL, JsonFile, Model, MoreTextFiles, TextFiles, Threads
from kvservice.cli.output import hint, human_bytes, progress_bar, show_table, write_json
from kvservice.errors import ConfigError
from kvservice.types import BLOCK_TOKENS

if TYPE_CHECKING:
    from kvservice.evaluation.methods_table import MethodFigures

PNG = "methods.png"


def methods(
    texts: TextFiles,
    more_texts: MoreTextFiles = None,
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", help="May be repeated. Unset: every method, floors and ceiling.")
    ] = None,
    shares: Annotated[
        str, typer.Option("--shares", metavar="N,N,...", help="Budgets: one Nth of the context's tokens.")
    ] = "2,4,8,16",
    context: Annotated[int, typer.Option("--context", min=64, help="Tokens read before the measured ones.")] = 3072,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Measured tokens of each text.")] = 128,
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="Keeps what is measured; a second run goes on from it.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the intervals.")] = 7,
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "bf16",
    threads: Threads = None,
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="DIR", help=f"Also draw {PNG}. Needs the extra `plots`.")
    ] = None,
) -> None:
    """Distance from dense at equal device bytes, for every method that drops tokens or looks at few of them.

    All read the same texts. Takes seconds to minutes for each text, method and budget.
    """
    check_writable("--json", json_file)
    check_writable("--log", log)
    if plot is not None:
        if not plot.is_dir():
            raise ConfigError(f"--plot {plot}: there is no such folder")
        import kvservice.bench.plots
    from kvservice.evaluation.methods_table import COMPARED, LEAST_TOKENS, Log, measure_text, summarize

    budgets = _budgets(shares, context, LEAST_TOKENS)
    names = list(dict.fromkeys(recipe or COMPARED))
    for name in names:
        if name not in COMPARED:
            raise ConfigError(f"--recipe {name}: choose among {', '.join(COMPARED)}")
    wanted = [(name, kept) for name in names for kept in budgets]
    chosen, skipped = read_texts([*texts, *(more_texts or [])], context, new_tokens, model)
    engine, kept_log = load_engine(model, dtype, threads), Log(log)
    info = engine.info
    measured = []
    with progress_bar() as bar:
        task = bar.add_task("tokens", total=(1 + len(wanted)) * (context + new_tokens) * len(chosen))
        for text in chosen:
            bar.update(task, description=text[0])
            report = functools.partial(bar.advance, task)
            measured.append(measure_text(engine, kept_log, wanted, text, context, report))
    rows = [summarize(texts_of, seed) for texts_of in zip(*measured, strict=True)]
    _show(context, new_tokens * len(chosen), rows)
    hint(f"Model {info.name}: {info.origin}. Its figures say nothing about another model: measure yours.")
    if json_file is not None:
        settings = {
            "recipes": names,
            "budgets": budgets,
            "model": model,
            "origin": info.origin,
            "dtype": dtype,
            "context": context,
            "new_tokens": new_tokens,
            "texts": [name for name, _ in chosen],
            "skipped_texts": skipped,
            "seed": seed,
            "threads": threads,
        }
        write_json(json_file, settings, {"rows": [asdict(row) for row in rows]})
    if plot is not None:
        title = f"{info.name} after {context:,} tokens: {new_tokens * len(chosen):,} tokens of {len(chosen)} text(s)"
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            lines.setdefault(row.recipe, []).append((row.kept_tokens, row.kl_mean))
        kvservice.bench.plots.plot_recall(plot / PNG, lines, "tokens of a KV head that are kept, or looked at", title)


def _budgets(shares: str, context: int, least: int) -> list[int]:
    """Tokens of each budget, the largest first, in whole blocks."""
    try:
        parts = sorted({int(part) for part in shares.split(",")})
    except ValueError:
        raise typer.BadParameter(f"--shares {shares}: write whole numbers, such as 2,4,8,16") from None
    budgets = [context // part // BLOCK_TOKENS * BLOCK_TOKENS for part in parts if part >= 1]
    if not budgets or min(budgets) < least:
        raise typer.BadParameter(f"--shares {shares} of {context} tokens: at least {least} tokens must be kept")
    return budgets


def _show(context: int, num_tokens: int, rows: Sequence[MethodFigures]) -> None:
    columns = ("recipe", "tokens", "KL", "95 %", "top-1", "NLL change", "device", "of dense", "ms/token")
    show_table(
        f"Distance from dense after {context:,} tokens, {num_tokens:,} tokens measured",
        columns,
        [
            (
                row.recipe,
                str(row.kept_tokens),
                f"{row.kl_mean:.4f}",
                f"{row.kl_interval[0]:.4f}-{row.kl_interval[1]:.4f}",
                f"{row.top1_agreement:.1%}",
                f"{row.nll_change:+.3f}",
                human_bytes(row.device_bytes),
                f"{row.device_share:.1%}",
                f"{row.ms_per_token:.1f}",
            )
            for row in rows
        ],
        numeric=columns[1:],
    )
