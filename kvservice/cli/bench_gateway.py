"""`kvservice bench gateway`: the gateway alone, with a worker that computes nothing. `bench.gateway` measures."""

from __future__ import annotations

import asyncio
import json
import secrets
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.bench_soak import check_writable
from kvservice.cli.options import JsonFile
from kvservice.cli.output import hint, show_table, write_json

if TYPE_CHECKING:
    from kvservice.bench.gateway import GatewayFigures


def gateway(
    rate: Annotated[float, typer.Option("--rate", min=1.0, help="Generates a second.")] = 200.0,
    seconds: Annotated[float, typer.Option("--seconds", min=0.5, help="That each figure is measured for.")] = 10.0,
    streams: Annotated[int, typer.Option("--streams", min=1, help="Answers to hold open at a time.")] = 2000,
    json_file: JsonFile = None,
) -> None:
    """Added latency, open streams and unary calls of a gateway process whose worker answers at once.

    State is in a redis-server of its own. The callers and the worker are in this process.
    """
    check_writable("--json", json_file)
    figures = asyncio.run(_run(rate, seconds, streams))
    show_table(
        "A gateway, and a worker that computes nothing",
        ("what", "figure"),
        [
            (f"added latency at {figures.rpcs_per_s:.0f} RPC/s, p50", f"{figures.added_latency_ms_p50:.2f} ms"),
            ("the same, p99", f"{figures.added_latency_ms_p99:.2f} ms"),
            ("open streams", f"{figures.open_streams:,} in {figures.open_s:.1f} s"),
            ("unary RPC/s", f"{figures.unary_rpcs_per_s:,.0f}"),
            ("unary RPC for each second of the gateway's CPU time", f"{figures.unary_rpcs_per_cpu_s:,.0f}"),
        ],
        numeric=("figure",),
    )
    if figures.failed_streams:
        hint(f"{figures.failed_streams} streams couldn't be opened.")
    if json_file is not None:
        write_json(json_file, {"rate": rate, "seconds": seconds, "streams": streams}, asdict(figures))


async def _run(rate: float, seconds: float, streams: int) -> GatewayFigures:
    from kvservice.bench.gateway import instant_worker, measure_gateway
    from kvservice.client import LocalService
    from kvservice.store import open_state_store
    from kvservice.store.embedded import EmbeddedRedis, RedisRole

    with tempfile.TemporaryDirectory(prefix="kvservice-gateway-") as folder, EmbeddedRedis(RedisRole.STATE) as state:
        # The folder is its owner's alone: the file holds the server's password.
        file = Path(folder) / "gateway.json"
        settings = {"gateway": {"secret": secrets.token_hex(32), "discovery_interval_s": 0.1}}
        file.write_text(json.dumps({**settings, "state_url": state.url, "log_level": "WARNING"}))
        store = await open_state_store(state.url)
        try:
            async with (
                instant_worker(store),
                LocalService(["--config", str(file)], command="gateway") as service,
            ):
                return await measure_gateway(service.address, service.pid, rate=rate, seconds=seconds, streams=streams)
        finally:
            await store.aclose()
