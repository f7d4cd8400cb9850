"""`kvservice bench interference`: decoding while another session prefills. Measuring is done in `kvservice.bench`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.bench_soak import PlotFile, check_writable
from kvservice.cli.options import DEFAULT_MODEL, HostBytes, JsonFile, KvBytes, Model, Recipe, Threads
from kvservice.cli.output import hint, progress_bar, show_table, write_json
from kvservice.cli.settings import REDIS_URL_VARIABLE, url_from
from kvservice.config.recipes import DEFAULT_RECIPE, PLAIN_RECIPES, RECIPES
from kvservice.config.worker import WorkerConfig
from kvservice.errors import ConfigError

if TYPE_CHECKING:
    from kvservice.bench.interference import CaseFigures
    from kvservice.tier.writer import WriteBehind

BENCH_KV_BYTES = 1 << 30
REDIS_BYTES = 1 << 30
CLOSE_TIMEOUT_S = 5.0
LIMIT = 1.3
"""What the 99th percentile may grow to, beside another session's prefill: drawn in the plot."""


def interference(
    decoding: Annotated[int, typer.Option("--decoding", min=1, help="Sessions that decode.")] = 4,
    doc_tokens: Annotated[int, typer.Option("--doc-tokens", min=1, help="Tokens of each one's document.")] = 2000,
    prefill_tokens: Annotated[
        int, typer.Option("--prefill-tokens", min=1, help="Tokens that the other session reads.")
    ] = 6000,
    recipe: Recipe = DEFAULT_RECIPE,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often each case has its turn.")] = 3,
    redis_url: Annotated[
        str | None,
        typer.Option(
            "--redis-url",
            metavar="URL",
            help=f"The kv Redis to write to; or set {REDIS_URL_VARIABLE}. Unset: one is started.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the documents' random tokens.")] = 7,
    model: Model = DEFAULT_MODEL,
    kv_bytes: KvBytes = BENCH_KV_BYTES,
    host_bytes: HostBytes = None,
    threads: Threads = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Time between the tokens of decoding sessions: alone, and while another session reads a document.

    That one's KV stays on the device (`dense`, the control), goes to host memory, or goes on to Redis as well. The
    cases take turns, so that what else happens on the machine meets all of them. One engine in this process.
    """
    name = recipe or DEFAULT_RECIPE
    if name not in PLAIN_RECIPES:
        raise ConfigError(f"--recipe {name}: it can't be served; choose one of {', '.join(PLAIN_RECIPES)}")
    check_writable("--json", json_file)
    check_writable("--plot", plot)
    if plot is not None:
        import kvservice.bench.plots
    from kvservice.bench.interference import Case, InterferenceLoad, measure_interference
    from kvservice.cli.compose import make_engine
    from kvservice.models.fetch import resolve

    defaults = WorkerConfig()
    config = WorkerConfig(
        model=model,
        kv_bytes=kv_bytes or BENCH_KV_BYTES,
        host_bytes=host_bytes or defaults.host_bytes,
        max_batch=max(defaults.max_batch, decoding + 1),
        threads=threads,
    )
    load = InterferenceLoad(decoding, doc_tokens, prefill_tokens, RECIPES[name], rounds, seed)
    with ExitStack() as stack:
        frames = _frames(stack, url_from(redis_url, REDIS_URL_VARIABLE))
        engine = make_engine(config, resolve(model, None), frames)
        stack.callback(engine.close)
        cases = [case for case in Case if case is not Case.WRITE_BEHIND or frames is not None]
        with progress_bar() as bar:
            task = bar.add_task("turns", total=rounds * len(cases))
            figures = measure_interference(engine, load, cases, lambda: bar.advance(task))
        info = engine.info
    _show(load.decoding, doc_tokens, prefill_tokens, name, figures)
    hint(f"Model {info.name}: {info.origin}.")
    if json_file is not None:
        settings = {
            "decoding": decoding,
            "document_tokens": doc_tokens,
            "prefill_tokens": prefill_tokens,
            "recipe": name,
            "rounds": rounds,
            "model": model,
            "origin": info.origin,
            "dtype": config.dtype,
            "kv_bytes": config.kv_bytes,
            "host_bytes": config.host_bytes,
            "seed": seed,
            "threads": threads,
        }
        write_json(json_file, settings, {"rows": [_row(one) for one in figures]})
    if plot is not None:
        title = f"{decoding} sessions decode, one reads {prefill_tokens:,} tokens: recipe {name}, model {info.name}"
        limit_ms = LIMIT * next(one.interval_ms.p99 for one in figures if one.case is Case.ALONE)
        intervals = {one.case.value: one.intervals_s for one in figures}
        kvservice.bench.plots.plot_intervals(plot, intervals, limit_ms, title)


def _frames(stack: ExitStack, url: str | None) -> WriteBehind | None:
    """The way to a kv Redis, which is started if none was named; none where there is no redis-server to start."""
    from kvservice.store.embedded import EmbeddedRedis, RedisRole, find_redis_server
    from kvservice.tier.base import open_tier
    from kvservice.tier.writer import WriteBehind

    if url is None:
        try:
            server = find_redis_server()
        except ConfigError as error:
            hint(f"Nothing is written to Redis: {error.message}")
            return None
        redis = EmbeddedRedis(RedisRole.KV, maxmemory_bytes=REDIS_BYTES, server=server)
        url = stack.enter_context(redis).url
    frames = WriteBehind(open_tier(url))
    frames.start()
    stack.callback(frames.close, CLOSE_TIMEOUT_S)
    return frames


def _row(one: CaseFigures) -> dict[str, object]:
    row = asdict(one)
    del row["intervals_s"]
    return {**row, "case": one.case.name.lower()}


def _show(
    decoding: int, document_tokens: int, prefill_tokens: int, recipe: str, figures: tuple[CaseFigures, ...]
) -> None:
    columns = (
        *("beside them", "p50 ms", "p90 ms", "p99 ms", "max ms"),
        *("p50 / alone", "p99 / alone", "p50 / dense", "p99 / dense", "prefill tok/s", "to Redis"),
    )
    show_table(
        f"Time between tokens of {decoding} sessions of {document_tokens:,} tokens, beside a prefill of "
        f"{prefill_tokens:,}; recipe {recipe}",
        columns,
        [
            (
                one.case.value,
                f"{one.interval_ms.p50:.1f}",
                f"{one.interval_ms.p90:.1f}",
                f"{one.interval_ms.p99:.1f}",
                f"{one.interval_ms.max:.1f}",
                *((f"{one.to_alone.p50:.2f}", f"{one.to_alone.p99:.2f}") if one.to_alone else ("-", "-")),
                *((f"{one.to_control.p50:.2f}", f"{one.to_control.p99:.2f}") if one.to_control else ("-", "-")),
                "-" if one.prefill_tokens_per_s is None else f"{one.prefill_tokens_per_s:,.0f}",
                f"{one.written_frames:,}",
            )
            for one in figures
        ],
        numeric=columns[1:],
    )
