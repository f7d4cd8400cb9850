"""`kvservice bench rolls`: gateways restarted and workers replaced, one after the other, under load.

Processes of this machine, as an upgrade on a cluster has them; no Ray. `bench.rolls` measures.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvservice.cli.bench_replicas import (
    Callers,
    DocTokens,
    HostBytesOfEach,
    KvBytesOfEach,
    NewTokens,
    Workers,
    rounds_load,
    shown,
    worker_settings,
)
from kvservice.cli.bench_soak import check_writable
from kvservice.cli.options import DEFAULT_MODEL, JsonFile, Model, Recipe
from kvservice.cli.output import hint, progress_bar, show_table, write_json
from kvservice.config.recipes import DEFAULT_RECIPE

if TYPE_CHECKING:
    from kvservice.bench.rolls import RollFigures
    from kvservice.bench.rounds import RoundsLoad
    from kvservice.client import LocalService

KV_REDIS_BYTES = 256 << 20


def rolls(
    num_rolls: Annotated[int, typer.Option("--rolls", min=1, help="How often all are rolled.")] = 1,
    gateways: Annotated[int, typer.Option("--gateways", min=2, help="Gateways; callers know all of them.")] = 2,
    workers: Workers = 2,
    callers: Callers = 4,
    doc_tokens: DocTokens = 600,
    new_tokens: NewTokens = 48,
    recipe: Recipe = DEFAULT_RECIPE,
    kv_bytes: KvBytesOfEach = "256MiB",
    host_bytes: HostBytesOfEach = "512MiB",
    model: Model = DEFAULT_MODEL,
    json_file: JsonFile = None,
) -> None:
    """Restart gateways and replace workers, one after the other, under load. Exits 1 if a call failed or was wrong.

    Every answer is compared with the one that the same conversation had before.
    """
    check_writable("--json", json_file)
    load = rounds_load(callers, doc_tokens, new_tokens, recipe)
    worker = worker_settings(model, kv_bytes, host_bytes)
    figures = asyncio.run(_run(load, worker, gateways, workers, num_rolls))
    rows = [(name, shown(value)) for name, value in asdict(figures).items()]
    show_table(f"a roll under {callers} callers", ("what", "figure"), rows, numeric=("figure",))
    if json_file is not None:
        parts = {"num_gateways": gateways, "num_workers": workers, "rolls": num_rolls, "model": model}
        write_json(json_file, {**asdict(load), **parts}, asdict(figures))
    if figures.failed or figures.wrong or figures.lost_turns or figures.bad_exits:
        raise typer.Exit(1)


async def _run(
    load: RoundsLoad, worker: dict[str, Any], num_gateways: int, num_workers: int, num_rolls: int
) -> RollFigures:
    from kvservice.bench.rolls import measure_rolls
    from kvservice.client import LocalService
    from kvservice.store.embedded import EmbeddedRedis, RedisRole

    hint("starting gateways and workers")
    async with AsyncExitStack() as stack:
        # The folder is its owner's alone: the file holds the servers' passwords.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvservice-rolls-")))
        state = stack.enter_context(EmbeddedRedis(RedisRole.STATE, data_dir=folder / "state"))
        kv = stack.enter_context(EmbeddedRedis(RedisRole.KV, maxmemory_bytes=KV_REDIS_BYTES))
        file = folder / "settings.json"
        settings = {
            "gateway": {"secret": secrets.token_hex(32), "discovery_interval_s": 0.2},
            "worker": {**worker, "redis_url": kv.url},
            "state_url": state.url,
            "log_level": "WARNING",
        }
        file.write_text(json.dumps(settings))

        def part(command: str, port: int = 0) -> LocalService:
            made = LocalService(["--config", str(file)], command=command, port=port)
            stack.push_async_callback(made.stop)
            return made

        front = [_SamePort(lambda port: part("gateway", port)) for _ in range(num_gateways)]
        own = [part("worker") for _ in range(num_workers)]
        await asyncio.gather(*(each.start() for each in front), *(each.start() for each in own))
        with progress_bar() as bar:
            task = bar.add_task("rolling", total=num_rolls * (num_gateways + num_workers))
            return await measure_rolls(
                front,
                own,
                lambda: part("worker"),
                load,
                rolls=num_rolls,
                report=lambda: bar.advance(task),
            )


class _SamePort:
    """A gateway that is started again where it was."""

    def __init__(self, make: Callable[[int], LocalService]) -> None:
        self._make = make
        self._service = make(0)

    @property
    def address(self) -> str:
        return self._service.address

    async def start(self) -> str:
        if self.address:
            self._service = self._make(int(self.address.rpartition(":")[2]))
        return await self._service.start()

    async def stop(self) -> int:
        return await self._service.stop()
