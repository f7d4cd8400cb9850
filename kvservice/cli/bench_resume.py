"""`kvservice bench resume`: sessions that come back from Redis. Measuring is done in `kvservice.bench`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import SecretStr

from kvservice.cli.bench_service import bench_service
from kvservice.cli.bench_soak import check_writable
from kvservice.cli.options import DEFAULT_MODEL, HostBytes, JsonFile, KvBytes, Model, Recipe, Seed, Threads, given
from kvservice.cli.output import hint, progress_bar, show_table, write_json
from kvservice.cli.processes import WorkerProcesses
from kvservice.config.recipes import DEFAULT_RECIPE
from kvservice.config.worker import KV_CODECS, WorkerConfig
from kvservice.errors import ConfigError

if TYPE_CHECKING:
    from kvservice.bench.resume import ResumeRow

REDIS_BYTES = 1 << 30
START_TIMEOUT_S = 120.0


def resume(
    tokens: Annotated[int, typer.Option("--tokens", min=1024, help="Of each session's document.")] = 6000,
    codecs: Annotated[str, typer.Option("--codecs", metavar="NAME,NAME", help="How KV is stored.")] = "raw,values8",
    recipe: Recipe = DEFAULT_RECIPE,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Sessions, each to a process of its own.")] = 3,
    seed: Seed = 7,
    model: Model = DEFAULT_MODEL,
    kv_bytes: KvBytes = None,
    host_bytes: HostBytes = None,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Time to the first token of a session on a worker process that has just started and never saw it.

    A gateway, worker processes and both Redis servers are started here. Beside it stands what reading the document
    took, and a question to the worker that holds the session.
    """
    names = [name.strip() for name in codecs.split(",")]
    if unknown := [name for name in names if name not in KV_CODECS]:
        raise ConfigError(f"--codecs {','.join(unknown)}: choose from {', '.join(KV_CODECS)}")
    check_writable("--json", json_file)
    settings: dict[str, Any] = {
        "model": model,
        **given(kv_bytes=kv_bytes, host_bytes=host_bytes, threads=threads),
    }
    rows: list[ResumeRow] = []
    with progress_bar() as bar:
        for codec in bar.track(names, description="measuring"):
            work = _measure({**settings, "kv_codec": codec}, recipe or DEFAULT_RECIPE, tokens, rounds, seed)
            rows += asyncio.run(work)
    _show(rows)
    hint(f"prefill: reading all {tokens:,} tokens. A resumed session reads none of them again.")
    if json_file is not None:
        asked = {"tokens": tokens, "codecs": names, "recipe": recipe, "rounds": rounds, "seed": seed, "model": model}
        write_json(json_file, asked, {"rows": [asdict(row) for row in rows]})


async def _measure(settings: dict[str, Any], recipe: str, tokens: int, rounds: int, seed: int) -> list[ResumeRow]:
    from kvservice.bench.resume import measure_resume

    async with bench_service(REDIS_BYTES) as service:

        @asynccontextmanager
        async def start_worker(name: str) -> AsyncIterator[None]:
            worker = WorkerConfig(**settings, worker_id=name, redis_url=SecretStr(service.kv_url), drain_grace_s=1.0)
            told = {**worker.model_dump(mode="json"), "redis_url": service.kv_url}
            processes = WorkerProcesses([{"worker": told, "state_url": service.state_url, "log_level": "WARNING"}], 1.0)
            try:
                await processes.start()
                async with asyncio.timeout(START_TIMEOUT_S):
                    await service.found(name)
                yield
            finally:
                await processes.stop()

        return await measure_resume(
            service.client,
            start_worker,
            codec=settings["kv_codec"],
            recipe=recipe,
            tokens=tokens,
            rounds=rounds,
            seed=seed,
        )


def _show(rows: list[ResumeRow]) -> None:
    columns = ("stored as", "tokens", "prefill s", "held ms", "fresh process ms", "again ms", "computed again")
    show_table(
        "Time to the first token of sessions from Redis",
        columns,
        [
            (
                row.codec,
                f"{row.tokens:,}",
                f"{row.prefill_s:.2f}",
                f"{row.held_ttft_s * 1e3:.0f}",
                f"{row.fresh_ttft_s * 1e3:.0f}",
                f"{row.again_ttft_s * 1e3:.0f}",
                str(row.recomputed_tokens),
            )
            for row in rows
        ],
        numeric=columns[1:],
    )
