"""`kvservice bench quotas`: quotas met at two gateways at once. `bench.quotas` measures."""

from __future__ import annotations

import asyncio
import json
import secrets
import tempfile
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.bench_soak import check_writable
from kvservice.cli.options import JsonFile
from kvservice.cli.output import hint, show_table, write_json
from kvservice.config.api_keys import key_entry
from kvservice.types import Role

if TYPE_CHECKING:
    from kvservice.bench.quotas import QuotaRow

OPERATOR = "ops"
TENANTS = ("requests", "tokens", "concurrent", "documents", "sessions")
GATEWAYS = 2


def quotas(
    calls: Annotated[int, typer.Option("--calls", min=10, help="Sent against each quota of a minute.")] = 1000,
    json_file: JsonFile = None,
) -> None:
    """What gets through a tenant's quotas at two gateways that share nothing but Redis, and what the rest is told.

    Exits 1 if more got through than may. The worker computes nothing; each quota is met by a tenant of its own.
    """
    check_writable("--json", json_file)
    rows, lifted_s = asyncio.run(_run(calls))
    columns = (
        "quota",
        "set to",
        "asked",
        "in s",
        "let through",
        "at most",
        "refused with",
        "come again in s",
        "told in ms",
    )
    show_table(
        f"Quotas at {GATEWAYS} gateways",
        columns,
        [
            (
                row.quota,
                f"{row.limit:,.0f}",
                f"{row.asked:,}",
                f"{row.seconds:.1f}",
                f"{row.let_through:,}",
                f"{row.at_most:,.1f}",
                ", ".join(row.refused),
                "-" if row.retry_after_s is None else f"{row.retry_after_s:.2f}",
                "-" if row.refusal_ms_p50 is None else f"{row.refusal_ms_p50:.1f}",
            )
            for row in rows
        ],
        numeric=tuple(name for name in columns if name not in ("quota", "refused with")),
    )
    hint(f"A quota that was lifted let calls through at both gateways after {lifted_s:.2f} s.")
    if json_file is not None:
        write_json(json_file, {"calls": calls}, {"rows": [asdict(row) for row in rows], "lifted_s": lifted_s})
    if any(row.let_through > row.at_most for row in rows):
        raise typer.Exit(1)


async def _run(calls: int) -> tuple[list[QuotaRow], float]:
    from kvservice.bench.gateway import instant_worker
    from kvservice.bench.quotas import ONCE, measure_quotas
    from kvservice.client import Client, LocalService
    from kvservice.store import open_state_store
    from kvservice.store.embedded import EmbeddedRedis, RedisRole

    keys = {name: secrets.token_urlsafe(24) for name in (OPERATOR, *TENANTS)}
    with tempfile.TemporaryDirectory(prefix="kvservice-quotas-") as folder, EmbeddedRedis(RedisRole.STATE) as state:
        # The folder is its owner's alone: the files hold the server's password and the service's secret.
        key_file, file = Path(folder) / "keys.json", Path(folder) / "gateway.json"
        entries = [key_entry(key, name, _role(name)) for name, key in keys.items()]
        key_file.write_text(json.dumps({"keys": entries}))
        key_file.chmod(0o600)
        settings = {
            "gateway": {"secret": secrets.token_hex(32), "discovery_interval_s": 0.1},
            "api_keys": str(key_file),
        }
        file.write_text(json.dumps({**settings, "state_url": state.url, "log_level": "ERROR"}))
        async with AsyncExitStack() as stack:
            store = await open_state_store(state.url)
            stack.push_async_callback(store.aclose)
            await stack.enter_async_context(instant_worker(store))
            starting = [LocalService(["--config", str(file)], command="gateway") for _ in range(GATEWAYS)]
            addresses = [(await stack.enter_async_context(service)).address for service in starting]
            clients = {
                name: [await stack.enter_async_context(Client(address, key, retry=ONCE)) for address in addresses]
                for name, key in keys.items()
            }
            return await measure_quotas(clients[OPERATOR][0], clients.__getitem__, calls=calls)


def _role(name: str) -> Role:
    return Role.OPERATOR if name == OPERATOR else Role.TENANT
