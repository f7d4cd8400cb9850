"""`kvservice eval`: how good a recipe's answers are beside dense ones. Measuring is done in `kvservice.evaluation`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.options import (
    DEFAULT_MODEL,
    AdapterFile,
    JsonFile,
    Map,
    Model,
    MoreTextFiles,
    Recipe,
    Sharing,
    SkipAbove,
    TextFiles,
    Threads,
)
from kvservice.cli.output import hint, human_bytes, progress_bar, show_table, write_json
from kvservice.cli.settings import Settings, read_file, sharing_settings, worker_config
from kvservice.config.recipes import DEFAULT_RECIPE, RECIPES
from kvservice.errors import ConfigError

if TYPE_CHECKING:
    from kvservice.engine import Engine
    from kvservice.evaluation.passkey import PasskeyFigures
    from kvservice.evaluation.quality import QualityFigures

app = typer.Typer(help="Measure quality beside `dense`.", no_args_is_help=True)

EVAL_KV_BYTES = 1 << 30
"""Room for the dense session and three others at 8,000 tokens of the small model."""

Dtype = Annotated[str, typer.Option("--dtype", help="bf16 or fp32, of weights and KV.")]


class Haystack(Enum):
    """What a pass key is hidden in."""

    PROSE = "prose"
    NOISE = "noise"


@app.command("quality")
def quality(
    texts: TextFiles,
    more_texts: MoreTextFiles = None,
    recipe: Recipe = DEFAULT_RECIPE,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens read before the measured ones.")] = 4096,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Measured tokens of each text.")] = 256,
    bootstrap: Annotated[bool, typer.Option("--bootstrap", help="Also a 95 % interval of the KL.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap.")] = 7,
    max_kl: Annotated[float | None, typer.Option("--max-kl", min=0, help="Exit 1 when the mean KL is above.")] = None,
    sharing_map: Map = None,
    sharing: Sharing = None,
    skip_above: SkipAbove = None,
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "bf16",
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Distance of a recipe's next-token distributions from dense ones, on your texts.

    An oracle and random recall of the same budget are measured beside it.
    """
    from kvservice.evaluation.quality import TextResult, measure_text, summarize

    spec = RECIPES[recipe or DEFAULT_RECIPE]
    chosen, skipped = read_texts([*texts, *(more_texts or [])], context, new_tokens, model)
    shared = sharing_settings(spec, sharing_map, sharing, skip_above)
    engine = load_engine(model, dtype, threads, shared)
    results: list[TextResult] = []
    with progress_bar() as bar:
        task = bar.add_task("tokens", total=4 * (context + new_tokens) * len(chosen))
        for name, tokens in chosen:
            bar.update(task, description=name)
            results.append(measure_text(engine, spec, name, tokens, context, lambda count: bar.advance(task, count)))
    info = engine.info
    figures = summarize(results, spec, info.shape.kv_bytes_per_token, bootstrap_seed=seed if bootstrap else None)
    _show_quality(spec.name, context, figures)
    hint(f"Model {info.name}: {info.origin}. Its figures say nothing about another model: measure yours.")
    if json_file is not None:
        settings = {
            "recipe": spec.name,
            "model": model,
            "origin": info.origin,
            "dtype": dtype,
            "context": context,
            "new_tokens": new_tokens,
            "texts": [name for name, _ in chosen],
            "skipped_texts": skipped,
            "window_tokens": spec.window_tokens,
            "recalled_tokens": spec.recalled_tokens,
            "index_bits": spec.index_bits,
            "seed": seed,
            "max_kl": max_kl,
            "threads": threads,
            **shared,
        }
        write_json(json_file, settings, asdict(figures))
    if max_kl is not None and figures.kl_mean > max_kl:
        hint(f"The mean KL of {figures.kl_mean:.4f} is above --max-kl {max_kl:g}.")
        raise typer.Exit(1)


def _show_quality(recipe: str, context: int, figures: QualityFigures) -> None:
    columns = ("text", "KL", "KL, oracle", "KL, random", "top-1", "NLL", "NLL, dense")
    rows = [
        (
            text.name,
            f"{text.kl_mean:.4f}",
            f"{text.oracle_kl_mean:.4f}",
            f"{text.random_kl_mean:.4f}",
            f"{text.top1_agreement:.1%}",
            f"{text.nll:.3f}",
            f"{text.nll_dense:.3f}",
        )
        for text in figures.texts
    ]
    total = (
        "all",
        f"{figures.kl_mean:.4f}",
        f"{figures.oracle_kl_mean:.4f}",
        f"{figures.random_kl_mean:.4f}",
        f"{figures.top1_agreement:.1%}",
        f"{figures.nll:.3f}",
        f"{figures.nll_dense:.3f}",
    )
    show_table(
        f"Recipe {recipe} beside dense after {context:,} tokens, {figures.num_tokens:,} tokens measured",
        columns,
        [*rows, total],
        numeric=columns[1:],
    )
    if figures.kl_interval is not None:
        low, high = figures.kl_interval
        typer.echo(f"KL, 95 % interval over texts and tokens: {low:.4f} to {high:.4f}")
    typer.echo(
        f"One session: {human_bytes(figures.device_kv_bytes)} on the device, {human_bytes(figures.host_kv_bytes)} in "
        f"the host tier; dense {human_bytes(figures.dense_kv_bytes)} on the device."
    )


@app.command("passkey")
def passkey(
    recipe: Recipe = DEFAULT_RECIPE,
    tokens: Annotated[int, typer.Option("--tokens", min=64, help="Tokens of each prompt, at most.")] = 4000,
    cases: Annotated[int, typer.Option("--cases", min=1, help="Prompts, at depths 5, 25, 50, 75, 95 % in turn.")] = 10,
    seed: Annotated[int, typer.Option("--seed", help="Of the pass keys.")] = 7,
    haystack: Annotated[Haystack, typer.Option("--haystack", help="What the key is hidden in.")] = Haystack.NOISE,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Prose of the haystack. Unset: the demo's document.")
    ] = None,
    needles: Annotated[
        int, typer.Option("--needles", min=1, max=2, help="Numbers hidden in each; all are asked for.")
    ] = 1,
    talk_tokens: Annotated[
        int, typer.Option("--talk-tokens", min=0, help="The model goes on with so many tokens and is asked once more.")
    ] = 0,
    sessions: Annotated[int, typer.Option("--sessions", min=1, help="Sessions at a time. Changes no answer.")] = 4,
    sharing_map: Map = None,
    adapter: AdapterFile = None,
    sharing: Sharing = None,
    skip_above: SkipAbove = None,
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "bf16",
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Does a recipe still find one sentence in a long text? Compared with dense case by case."""
    if text is not None and haystack is not Haystack.PROSE:
        raise typer.BadParameter("--text is a haystack of prose: add --haystack prose, or leave --text out")
    from kvservice.demo.document import shipped_text
    from kvservice.evaluation.haystack import make_cases, noise_units, prose_units
    from kvservice.evaluation.passkey import at_first, compared, run_cases, summarize
    from kvservice.models.fetch import resolve
    from kvservice.models.tokenizer import Tokenizer
    from kvservice.types import PromptFormat, TextRole

    spec = RECIPES[recipe or DEFAULT_RECIPE]
    tokenizer = Tokenizer.load(resolve(model, None))
    prose = shipped_text() if text is None else read_file(text, "--text").decode(errors="replace")
    is_prose = haystack is Haystack.PROSE
    asked = make_cases(
        prose_units(prose) if is_prose else noise_units(),
        is_prose=is_prose,
        num_tokens=tokens - talk_tokens,
        num_needles=needles,
        num_cases=cases,
        seed=seed,
        count=lambda part: len(tokenizer.encode(part, TextRole.DOCUMENT, PromptFormat.RAW, first=True)),
    )
    shared = sharing_settings(spec, sharing_map, sharing, skip_above)
    adapted: Settings = {"adapter": str(adapter), "recipe": spec.name} if adapter else {}
    engine = load_engine(model, dtype, threads, shared | adapted)
    reference = load_engine(model, dtype, threads) if adapter else None
    with progress_bar() as bar:
        task = bar.add_task("sessions", total=len(compared(spec)) * len(asked))
        results = run_cases(
            engine,
            tokenizer,
            spec,
            asked,
            talk_tokens=talk_tokens,
            at_once=sessions,
            report=lambda: bar.advance(task),
            reference=reference,
        )
    figures = summarize(results)
    where = f"{tokens:,} tokens of {haystack.value}"
    if talk_tokens:
        _show_passkey(spec.name, f"{where}, asked for at once", summarize(at_first(results)))
        where = f"{where}, asked for after {talk_tokens:,} more"
    _show_passkey(spec.name, where, figures)
    info = engine.info
    hint(f"Model {info.name}: {info.origin}.")
    if json_file is not None:
        settings = {
            "recipe": spec.name,
            "model": model,
            "origin": info.origin,
            "dtype": dtype,
            "tokens": tokens,
            "cases": cases,
            "seed": seed,
            "haystack": haystack.value,
            "needles": needles,
            "talk_tokens": talk_tokens,
            "text": str(text) if text is not None else None,
            "threads": threads,
            **shared,
            **adapted,
        }
        answers = [
            {"tokens": result.num_tokens}
            | {"answers": asdict(result.answers), "dense_answers": asdict(result.dense_answers)}
            | {"needles": [asdict(needle) for needle in result.case.needles]}
            for result in results
        ]
        first = asdict(summarize(at_first(results))) if talk_tokens else None
        write_json(json_file, settings, {**asdict(figures), "at_first": first, "answers": answers})


def _show_passkey(recipe: str, where: str, figures: PasskeyFigures) -> None:
    rows = [
        (f"{depth} %", str(row.correct), str(row.dense_correct), str(row.cases))
        for depth, row in figures.by_depth.items()
    ]
    columns = ("depth", recipe, "dense", "cases")
    show_table(
        f"Pass keys found in {where}",
        columns if recipe != "dense" else ("depth", "dense", "dense again", "cases"),
        [*rows, ("all", str(figures.correct), str(figures.dense_correct), str(figures.cases))],
        numeric=columns[1:],
    )
    test = f"McNemar's exact test: p = {figures.mcnemar_p:.2f}"
    typer.echo(f"Lost against dense: {figures.lost}; gained: {figures.gained}. {test}.")


def text_files(option: str, paths: Sequence[Path]) -> list[Path]:
    """Files as they are named, and all files of folders, sorted.

    Raises:
        ConfigError: a path isn't there, or a folder is empty.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{option} {path}: there is no such file or folder")
        found = sorted(inner for inner in path.iterdir() if inner.is_file()) if path.is_dir() else [path]
        if not found:
            raise ConfigError(f"{option} {path}: the folder has no files")
        files += found
    return files


def read_texts(
    paths: Sequence[Path], context: int, new_tokens: int, model: str
) -> tuple[list[tuple[str, list[int]]], list[str]]:
    """The texts that are long enough, by name, as so many tokens as are needed; and the names of those that aren't.

    Raises:
        ConfigError: a path isn't there, a folder is empty, or no text is long enough.
    """
    files = text_files("--texts", paths)
    from kvservice.evaluation.quality import tokens_needed
    from kvservice.models.fetch import resolve
    from kvservice.models.tokenizer import Tokenizer
    from kvservice.types import PromptFormat, TextRole

    needed = tokens_needed(context, new_tokens)
    tokenizer = Tokenizer.load(resolve(model, None))
    chosen: list[tuple[str, list[int]]] = []
    skipped: list[str] = []
    for path in files:
        text = read_file(path, "--texts").decode(errors="replace")
        tokens = tokenizer.encode(text, TextRole.DOCUMENT, PromptFormat.RAW, first=True)
        if len(tokens) < needed:
            skipped.append(path.name)
            hint(f"{path}: skipped, {len(tokens):,} tokens of {needed:,}")
        else:
            chosen.append((path.name, tokens[:needed]))
    if not chosen:
        raise ConfigError(
            f"--texts: none of {len(files)} has {needed:,} tokens; give longer ones, or a lower --context"
        )
    return chosen, skipped


def load_engine(model: str, dtype: str, threads: int | None, sharing: Settings | None = None) -> Engine:
    """An engine with room for what `eval` compares. Blocks for as long as its model takes to load.

    Args:
        model: a fetched model's name, or a folder.
        dtype: bf16 or fp32.
        threads: unset: the cores.
        sharing: see `sharing_settings`.

    Raises:
        ConfigError: `dtype` isn't one that there is.
    """
    from kvservice.cli.compose import make_engine
    from kvservice.models.fetch import resolve

    if dtype not in ("bf16", "fp32"):
        raise ConfigError(f"--dtype {dtype}: choose bf16 or fp32")
    settings = {"model": model, "kv_bytes": EVAL_KV_BYTES, "dtype": dtype, "threads": threads, **(sharing or {})}
    return make_engine(worker_config(settings), resolve(model, None))
