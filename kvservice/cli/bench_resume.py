"""`kvservice bench resume`: sessions that come back from Redis. Measuring is done in `kvservice.bench`."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import SecretBytes, SecretStr

from kvservice.cli.bench_soak import check_writable
from kvservice.cli.options import DEFAULT_MODEL, HostBytes, JsonFile, KvBytes, Model, Recipe, Threads
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
    seed: Annotated[int, typer.Option("--seed", help="Of the documents' random tokens.")] = 7,
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
    defaults = WorkerConfig()
    settings: dict[str, Any] = {
        "model": model,
        "kv_bytes": kv_bytes or defaults.kv_bytes,
        "host_bytes": host_bytes or defaults.host_bytes,
        "threads": threads,
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
    from kvservice.client import Client
    from kvservice.config.gateway import GatewayConfig
    from kvservice.gateway.server import Gateway
    from kvservice.store import open_state_store
    from kvservice.store.embedded import EmbeddedRedis, RedisRole

    async with AsyncExitStack() as stack:
        state = stack.enter_context(EmbeddedRedis(RedisRole.STATE))
        kv = stack.enter_context(EmbeddedRedis(RedisRole.KV, maxmemory_bytes=REDIS_BYTES))
        store = await open_state_store(state.url)
        stack.push_async_callback(store.aclose)
        config = GatewayConfig(secret=SecretBytes(secrets.token_bytes(32)), port=0, discovery_interval_s=0.1)
        gateway = Gateway(config, store)
        stack.push_async_callback(gateway.stop)
        address = await gateway.start()
        client = await stack.enter_async_context(Client(address))

        @asynccontextmanager
        async def start_worker(name: str) -> AsyncIterator[None]:
            worker = WorkerConfig(**settings, worker_id=name, redis_url=SecretStr(kv.url), drain_grace_s=1.0)
            told = {**worker.model_dump(mode="json"), "redis_url": kv.url}
            processes = WorkerProcesses([{"worker": told, "state_url": state.url, "log_level": "WARNING"}], 1.0)
            try:
                await processes.start()
                async with asyncio.timeout(START_TIMEOUT_S):
                    while name not in {view.worker_id for view in gateway.fleet.views()}:
                        await gateway.fleet.changed_since(gateway.fleet.version)
                yield
            finally:
                await processes.stop()

        return await measure_resume(
            client,
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
