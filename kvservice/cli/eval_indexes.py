"""`kvservice eval indexes`: all ways to choose distant tokens side by side. Measuring is in `kvservice.evaluation`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.bench_soak import check_writable
from kvservice.cli.evaluate import Dtype, load_engine, read_texts
from kvservice.cli.options import DEFAULT_MODEL, JsonFile, Model, MoreTextFiles, TextFiles, Threads, check_recipe
from kvservice.cli.output import hint, human_bytes, progress_bar, show_table, write_json
from kvservice.errors import ConfigError

if TYPE_CHECKING:
    from kvservice.evaluation.sweep import SweepRow

TOKENS_PNG = "recall-tokens.png"
BYTES_PNG = "recall-bytes.png"


def indexes(
    texts: TextFiles,
    more_texts: MoreTextFiles = None,
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", help="May be repeated. Unset: every one that recalls tokens.")
    ] = None,
    budgets: Annotated[
        str, typer.Option("--budgets", metavar="N,N,...", help="Recalled tokens for each KV head.")
    ] = "32,64,128,256,512,1024",
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens read before the measured ones.")] = 4096,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Measured tokens of each text.")] = 256,
    bootstrap: Annotated[bool, typer.Option("--bootstrap", help="Also 95 % intervals of the KL.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap.")] = 7,
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "bf16",
    threads: Threads = None,
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="DIR", help=f"Also draw {TOKENS_PNG} and {BYTES_PNG}. Needs the extra `plots`."),
    ] = None,
) -> None:
    """Distance from dense against recalled tokens and bytes moved, for every index and baseline.

    All choose among exactly the same distant tokens of your texts. Takes seconds for each text, recipe and budget.
    """
    sizes = _parse_budgets(budgets)
    check_writable("--json", json_file)
    if plot is not None:
        if not plot.is_dir():
            raise ConfigError(f"--plot {plot}: there is no such folder")
        import kvservice.bench.plots
    from kvservice.evaluation.sweep import COMPARED, measure_text, summarize, with_budgets

    names = list(dict.fromkeys(recipe or COMPARED))
    for name in names:
        check_recipe(name)
    chosen, skipped = read_texts([*texts, *(more_texts or [])], context, new_tokens, model)
    engine = load_engine(model, dtype, threads)
    info = engine.info
    specs = with_budgets(names, sizes, info.shape.dtype_bytes)
    measured = []
    with progress_bar() as bar:
        task = bar.add_task("tokens", total=(1 + len(specs)) * (context + new_tokens) * len(chosen))
        for name, tokens in chosen:
            bar.update(task, description=name)
            measured.append(measure_text(engine, specs, tokens, context, lambda count: bar.advance(task, count)))
    rows = [
        summarize(spec, texts_of, bootstrap_seed=seed if bootstrap else None)
        for spec, texts_of in zip(specs, zip(*measured, strict=True), strict=True)
    ]
    _show(context, new_tokens * len(chosen), rows)
    hint(f"Model {info.name}: {info.origin}. Its figures say nothing about another model: measure yours.")
    if json_file is not None:
        settings = {
            "recipes": names,
            "budgets": sizes,
            "model": model,
            "origin": info.origin,
            "dtype": dtype,
            "context": context,
            "new_tokens": new_tokens,
            "texts": [name for name, _ in chosen],
            "skipped_texts": skipped,
            "window_tokens": specs[0].window_tokens,
            "seed": seed,
            "threads": threads,
        }
        write_json(json_file, settings, {"rows": [asdict(row) for row in rows]})
    if plot is not None:
        title = f"{info.name} after {context:,} tokens: {new_tokens * len(chosen):,} tokens of {len(chosen)} text(s)"
        by_tokens = _lines(rows, lambda row: row.recalled_tokens)
        by_bytes = _lines(rows, lambda row: row.recalled_bytes_per_token / (1 << 20))
        kvservice.bench.plots.plot_recall(plot / TOKENS_PNG, by_tokens, "recalled tokens for each KV head", title)
        kvservice.bench.plots.plot_recall(plot / BYTES_PNG, by_bytes, "MiB recalled for a token", title)


def _parse_budgets(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise typer.BadParameter(f"--budgets {text}: write numbers of tokens, such as 64,128,256") from None


def _lines(rows: Sequence[SweepRow], x: Callable[[SweepRow], float]) -> dict[str, list[tuple[float, float]]]:
    """A line for each recipe, points of (x, KL)."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row.recipe, []).append((x(row), row.kl_mean))
    return lines


def _show(context: int, num_tokens: int, rows: Sequence[SweepRow]) -> None:
    columns = ("recipe", "tokens", "KL", "top-1", "NLL change", "recalled a token", "hits", "index", "scanned")
    show_table(
        f"Distance from dense after {context:,} tokens, {num_tokens:,} tokens measured",
        columns,
        [
            (
                row.recipe,
                str(row.recalled_tokens),
                f"{row.kl_mean:.4f}",
                f"{row.top1_agreement:.1%}",
                f"{row.nll_change:+.3f}",
                human_bytes(row.recalled_bytes_per_token),
                f"{row.hit_rate:.1%}",
                human_bytes(row.index_bytes),
                "" if row.scanned_fraction is None else f"{row.scanned_fraction:.1%}",
            )
            for row in rows
        ],
        numeric=columns[1:],
    )
