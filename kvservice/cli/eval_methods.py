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
    from kvservice.evaluation.haystack import PasskeyCase
    from kvservice.evaluation.methods_table import MethodFigures
    from kvservice.models.tokenizer import Tokenizer

PNG = "methods.png"
COLUMNS = (
    *("recipe", "tokens", "device", "of dense", "KL", "95 %", "seeds"),
    *("top-1", "NLL", "mass", "keys", "read", "ms"),
)
MEANING = (
    "tokens: whose bytes a KV head may keep, or that a query looks at. mass: of dense attention, what falls on held "
    "tokens; of the ceiling, on the best ones. keys: pass keys found, of those that dense finds. read: tokens whose KV "
    "a query reads. ms: for a token of one session alone."
)


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
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Of recipes that draw numbers.")] = 3,
    passkey_cases: Annotated[
        int, typer.Option("--passkey-cases", min=0, help="Pass keys hidden in noise, that each is asked for.")
    ] = 5,
    passkey_tokens: Annotated[int, typer.Option("--passkey-tokens", min=128, help="Of their texts.")] = 1024,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also each method with what sets it apart broken: it should be worse.")
    ] = False,
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="Keeps what is measured; a second run goes on from it.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the intervals, and of pass keys.")] = 7,
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "bf16",
    threads: Threads = None,
    json_file: JsonFile = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Also the table as documents have it.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="DIR", help=f"Also draw {PNG}. Needs the extra `plots`.")
    ] = None,
) -> None:
    """Distance from dense at equal device bytes, for every method that drops tokens or looks at few of them.

    All read the same texts. Takes seconds to minutes for each text, method and budget.
    """
    for option, path in (("--json", json_file), ("--log", log), ("--markdown", markdown_file)):
        check_writable(option, path)
    if plot is not None:
        if not plot.is_dir():
            raise ConfigError(f"--plot {plot}: there is no such folder")
        import kvservice.bench.plots
    from kvservice.evaluation.methods_log import Log
    from kvservice.evaluation.methods_table import COMPARED, LEAST_TOKENS, ask_all, cases, measure_text, summarize

    budgets = _budgets(shares, context, LEAST_TOKENS)
    names = list(dict.fromkeys(recipe or COMPARED))
    for name in names:
        if name not in COMPARED:
            raise ConfigError(f"--recipe {name}: choose among {', '.join(COMPARED)}")
    chosen, skipped = read_texts([*texts, *(more_texts or [])], context, new_tokens, model)
    engine, kept_log = load_engine(model, dtype, threads), Log(log)
    info, wanted = engine.info, cases(names, budgets, seeds, controls=controls)
    tokenizer, asked = _passkeys(model, passkey_cases, passkey_tokens, seed)
    measured = []
    with progress_bar() as bar:
        task = bar.add_task("tokens", total=len(wanted) * (context + new_tokens) * len(chosen))
        for text in chosen:
            bar.update(task, description=text[0])
            measured += measure_text(engine, kept_log, wanted, text, context, functools.partial(bar.advance, task))
        task = bar.add_task("pass keys", total=len(wanted) * len(asked))
        whole = [case for case in wanted if not case.control]
        answers = ask_all(
            engine,
            tokenizer,
            kept_log,
            whole,
            asked,
            num_tokens=passkey_tokens,
            report=functools.partial(bar.advance, task),
        )
    rows = summarize(measured, answers, seed)
    title = f"{info.name} after {context:,} tokens: {new_tokens * len(chosen):,} tokens of {len(chosen)} text(s)"
    lines = [_line(row, is_asked=bool(asked)) for row in rows]
    show_table(title, COLUMNS, lines, numeric=COLUMNS[1:])
    hint(MEANING)
    hint(f"Model {info.name}: {info.origin}. Its figures say nothing about another model: measure yours.")
    if markdown_file is not None:
        markdown_file.write_text(_markdown(lines))
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
            "seeds": seeds,
            "passkey_cases": passkey_cases,
            "passkey_tokens": passkey_tokens,
            "seed": seed,
            "threads": threads,
        }
        write_json(json_file, settings, {"rows": [asdict(row) for row in rows]})
    if plot is not None:
        x_label = "share of dense KV that is kept on the device; of tidal_decode, recycled_attention, oracle: looked at"
        kvservice.bench.plots.plot_recall(plot / PNG, _points(rows, context), x_label, title)


def _passkeys(model: str, count: int, num_tokens: int, seed: int) -> tuple[Tokenizer, list[PasskeyCase]]:
    from kvservice.evaluation.haystack import make_cases, noise_units
    from kvservice.models.fetch import resolve
    from kvservice.models.tokenizer import Tokenizer
    from kvservice.types import PromptFormat, TextRole

    tokenizer = Tokenizer.load(resolve(model, None))
    if count == 0:
        return tokenizer, []
    asked = make_cases(
        noise_units(),
        is_prose=False,
        num_tokens=num_tokens,
        num_cases=count,
        seed=seed,
        count=lambda part: len(tokenizer.encode(part, TextRole.DOCUMENT, PromptFormat.RAW, first=True)),
    )
    return tokenizer, asked


def _points(rows: Sequence[MethodFigures], context: int) -> dict[str, list[tuple[float, float]]]:
    """A line for each recipe, points of (share of dense, KL)."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.kept_tokens:
            # What saves no memory stands where it would if it kept what it looks at.
            x = row.device_share if row.device_share < 1 and not row.tier_bytes else row.kept_tokens / context
            points.setdefault(row.recipe, []).append((x, row.kl_mean))
    return points


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


def _line(row: MethodFigures, *, is_asked: bool) -> tuple[str, ...]:
    keys = "" if row.found is None else f"{row.found[0]}/{row.found[1]}"
    return (
        row.recipe,
        str(row.kept_tokens or "all"),
        human_bytes(row.device_bytes),
        f"{row.device_share:.1%}",
        f"{row.kl_mean:.4f}",
        f"{row.kl_interval[0]:.4f}-{row.kl_interval[1]:.4f}",
        "" if row.kl_of_seeds is None else f"{row.kl_of_seeds[0]:.4f}-{row.kl_of_seeds[1]:.4f}",
        f"{row.top1_agreement:.1%}",
        f"{row.nll_change:+.3f}",
        "" if row.mass is None else f"{row.mass:.1%}",
        keys if row.found is not None or not is_asked else "not measurable",
        f"{row.tokens_read:,.0f}",
        f"{row.ms_per_token:.1f}",
    )


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    table = [COLUMNS, ["---"] * len(COLUMNS), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table) + f"\n{MEANING}\n"
