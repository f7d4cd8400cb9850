"""`kvservice bench churn`: many sessions come and go. Measuring is done in `kvservice.bench`."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import SecretStr

from kvservice.cli.bench_service import bench_service
from kvservice.cli.bench_soak import check_writable
from kvservice.cli.options import DEFAULT_MODEL, HostBytes, JsonFile, KvBytes, Model, Seed, Threads, given
from kvservice.cli.output import complain, human_bytes, progress_bar, show_table, write_json
from kvservice.config.worker import WorkerConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvservice.bench.churn import ChurnLoad, ChurnResult

REDIS_BYTES = 2 << 30
TENANT = "local"
WORKER = "w"
TOLERANCE = 0.05


def churn(
    sessions: Annotated[int, typer.Option("--sessions", min=2, help="In all, forks included.")] = 1000,
    alive: Annotated[int, typer.Option("--alive", min=2, help="At a time.")] = 20,
    doc_tokens: Annotated[int, typer.Option("--doc-tokens", min=400, help="Of each document.")] = 600,
    redis_server: Annotated[
        Path | None,
        typer.Option("--redis-server", metavar="FILE", exists=True, help="The kv Redis; unset: the one that is found."),
    ] = None,
    seed: Seed = 7,
    model: Model = DEFAULT_MODEL,
    kv_bytes: KvBytes = None,
    host_bytes: HostBytes = None,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Sessions that are created, used, forked and closed: what is left of them in Redis, and was the ledger right.

    Exits 1 if anything is left, or if the ledger is off by more than 5 % of what the server says that frames take.
    """
    check_writable("--json", json_file)
    from kvservice.bench.churn import ChurnLoad

    config = WorkerConfig(model=model, **given(kv_bytes=kv_bytes, host_bytes=host_bytes, threads=threads))
    with progress_bar() as bar:
        task = bar.add_task("sessions", total=sessions)

        def on_wave(done: int) -> None:
            bar.update(task, completed=done)

        load = ChurnLoad(sessions, alive, doc_tokens, seed)
        result, allocator = asyncio.run(_measure(config, redis_server, load, on_wave))
    _show(result, allocator)
    if json_file is not None:
        write_json(json_file, {**asdict(load), "model": model}, {**asdict(result), "allocator": allocator})
    if not result.after.is_nothing:
        complain("something is left of closed sessions")
    if result.worst_error > TOLERANCE:
        complain("the ledger is off by more than 5 %")
    if not result.after.is_nothing or result.worst_error > TOLERANCE:
        raise typer.Exit(1)


async def _measure(
    config: WorkerConfig,
    redis_server: Path | None,
    load: ChurnLoad,
    on_wave: Callable[[int], None],
) -> tuple[ChurnResult, str]:
    """What it came to, and the allocator of the kv Redis."""
    from kvservice.bench.churn import measure_churn
    from kvservice.cli import compose
    from kvservice.store.blobs import RedisBlobs
    from kvservice.tier.base import open_tier

    async with bench_service(REDIS_BYTES, redis_server) as service, AsyncExitStack() as stack:
        told = config.model_copy(update={"redis_url": SecretStr(service.kv_url), "worker_id": WORKER})
        worker = await compose.worker(told, service.store, stack)
        await worker.start()
        await service.found(WORKER)
        blobs, tier = RedisBlobs(service.kv_url), open_tier(service.kv_url)
        stack.push_async_callback(blobs.aclose)
        stack.push_async_callback(tier.aclose)
        await blobs.check()
        result = await measure_churn(service.client, blobs, tier, load, tenant=TENANT, on_wave=on_wave)
        return result, blobs.allocator.value


def _show(result: ChurnResult, allocator: str) -> None:
    peak = max(result.peaks, key=lambda each: each.frame_bytes)
    columns = ("when", "sessions", "frames", "they take", "sets of names", "ledger", "server in all")
    show_table(
        f"{result.sessions:,} sessions, {allocator}: the ledger was off by {result.worst_error:.1%} at most",
        columns,
        [
            (
                when,
                f"{each.sessions:,}",
                f"{each.frames:,}",
                *(
                    human_bytes(count)
                    for count in (each.frame_bytes, each.index_bytes, each.charged_bytes, each.used_bytes)
                ),
            )
            for when, each in (("before", result.before), ("largest wave", peak), ("after", result.after))
        ],
        numeric=columns[1:],
    )
