"""`kvservice bench tier`: how fast frames reach Redis and come back. Measuring is done in `kvservice.bench`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from kvservice.cli.bench_soak import check_writable
from kvservice.cli.options import JsonFile, parse_counts
from kvservice.cli.output import hint, progress_bar, show_table, write_json
from kvservice.cli.settings import REDIS_URL_VARIABLE, url_from

if TYPE_CHECKING:
    from kvservice.bench.tier import TierRow

REDIS_BYTES = 1 << 30


def tier(
    url: Annotated[
        str | None,
        typer.Option(
            "--url", metavar="URL", help=f"The Redis to measure; or set {REDIS_URL_VARIABLE}. Unset: one is started."
        ),
    ] = None,
    value_bytes: Annotated[
        str, typer.Option("--value-bytes", metavar="N,N", help="Sizes of frames, all in all.")
    ] = "442600,786700,1769700",
    connections: Annotated[str, typer.Option("--connections", metavar="N,N", help="To read by.")] = "1,2,4",
    pipeline: Annotated[int, typer.Option("--pipeline", min=1, help="Frames asked for at a time on each.")] = 4,
    read_bytes: Annotated[int, typer.Option("--read-bytes", min=1, help="To read in each turn.")] = 256 << 20,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns; figures are medians over them.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Frames written and read back as the service does it, in turns with redis-benchmark where that is found.

    A URL's password would be on redis-benchmark's command line, for all on this machine to see: with one of yours it
    isn't run.
    """
    sizes, counts = parse_counts(value_bytes), parse_counts(connections)
    check_writable("--json", json_file)
    from kvservice.bench.tier import find_redis_benchmark, measure_tier

    benchmark = find_redis_benchmark()
    rows: list[TierRow] = []
    with ExitStack() as stack:
        named = url_from(url, REDIS_URL_VARIABLE)
        target = named or _started(stack)
        if benchmark is None:
            hint("redis-benchmark is not on PATH: nothing to compare with.")
        elif named is not None and not _is_open(named):
            hint("redis-benchmark isn't run: it needs a redis:// URL without a password.")
            benchmark = None
        with progress_bar() as bar:
            for size, count in bar.track(
                [(size, count) for size in sizes for count in counts], description="measuring"
            ):
                rows.append(
                    measure_tier(
                        target,
                        size,
                        count,
                        pipeline=pipeline,
                        rounds=rounds,
                        read_bytes=read_bytes,
                        benchmark=benchmark,
                    )
                )
    _show(rows)
    if json_file is not None:
        settings = {
            "value_bytes": sizes,
            "connections": counts,
            "pipeline": pipeline,
            "read_bytes": read_bytes,
            "rounds": rounds,
            "embedded": named is None,
        }
        write_json(json_file, settings, {"rows": [asdict(row) for row in rows]})


def _started(stack: ExitStack) -> str:
    from kvservice.store.embedded import EmbeddedRedis, RedisRole

    return stack.enter_context(EmbeddedRedis(RedisRole.KV, maxmemory_bytes=REDIS_BYTES)).url


def _is_open(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "redis" and parts.password is None


def _show(rows: list[TierRow]) -> None:
    columns = (
        *("value bytes", "connections", "read GB/s", "write GB/s", "read ms p50", "read ms p99"),
        *("redis-benchmark GET GB/s", "SET GB/s", "read ratio"),
    )
    show_table(
        "Frames to and from Redis",
        columns,
        [
            (
                f"{row.value_bytes:,}",
                str(row.connections),
                f"{row.read_gb_per_s:.2f}",
                f"{row.write_gb_per_s:.2f}",
                f"{row.read_ms_p50:.2f}",
                f"{row.read_ms_p99:.2f}",
                _figure(row.benchmark_read_gb_per_s),
                _figure(row.benchmark_write_gb_per_s),
                _figure(row.read_ratio),
            )
            for row in rows
        ],
        numeric=columns,
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
