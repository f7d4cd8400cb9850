"""`kvservice stats`: what a running service does, once or as it goes on. Needs the role `operator`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from kvservice.cli.calls import call_service
from kvservice.cli.options import DEFAULT_ADDRESS, Address
from kvservice.cli.output import PIPED_WIDTH, human_bytes

if TYPE_CHECKING:
    from kvservice.client import Client, ServiceStats, TenantReport, WorkerReport


def stats(
    address: Address = DEFAULT_ADDRESS,
    watch: Annotated[
        float | None, typer.Option("--watch", min=0.5, metavar="SECONDS", help="Show it anew so often, until Ctrl-C.")
    ] = None,
) -> None:
    """Show tenants, queue and each worker's bytes by owner, hit rate and tier. Needs the role `operator`."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=PIPED_WIDTH)
    if watch is None:
        console.print(stats_screen(address, call_service(address, lambda client: client.stats())))
        return
    interval_s = watch

    async def follow(client: Client) -> None:
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                live.update(stats_screen(address, await client.stats()), refresh=True)
                await asyncio.sleep(interval_s)

    try:
        call_service(address, follow)
    except KeyboardInterrupt:
        return


def stats_screen(address: str, report: ServiceStats) -> RenderableType:
    """One picture of the service."""
    state = "draining" if report.draining else "serving"
    head = (
        f"{address}: version {report.version}, {state}; {report.sessions} sessions held, "
        f"{report.running_calls} calls running, {report.waiting_calls} waiting"
    )
    parts: list[RenderableType] = [head]
    if report.tenants:
        parts.append(_tenants(report.tenants))
    if report.workers:
        parts.append(_workers(report.workers))
    return Group(*parts)


def _tenants(tenants: tuple[TenantReport, ...]) -> Table:
    table = tenants_table()
    for tenant in tenants:
        table.add_row(*tenant_row(tenant))
    return table


def tenants_table() -> Table:
    """An empty table for `tenant_row`."""
    table = Table(title="Tenants", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("tenant", no_wrap=True)
    for name in (
        "calls",
        "refused",
        "tokens",
        "running",
        "weight",
        "calls/min",
        "tokens/min",
        "at a time",
        "document tokens",
        "sessions",
        "device",
        "host",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def tenant_row(tenant: TenantReport) -> tuple[str, ...]:
    """A tenant's use of the gateway that answered, and its limits."""
    counts = (tenant.requests, tenant.refused, tenant.tokens, tenant.running_calls)
    limits = (
        tenant.requests_per_minute,
        tenant.tokens_per_minute,
        tenant.concurrent_calls,
        tenant.document_tokens,
        tenant.sessions,
    )
    return (
        tenant.tenant,
        *(f"{count:,}" for count in counts),
        f"{tenant.weight:g}",
        *("-" if limit is None else f"{limit:,g}" for limit in limits),
        *("-" if limit is None else human_bytes(limit) for limit in (tenant.device_bytes, tenant.host_bytes)),
    )


def _workers(workers: tuple[WorkerReport, ...]) -> Table:
    table = Table(title="Workers", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for worker in workers:
        table.add_column(worker.worker_id, justify="right", no_wrap=True)
    columns = [_worker_rows(worker) for worker in workers]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _worker_rows(worker: WorkerReport) -> dict[str, str]:
    hit_rate = worker.recall_hits / worker.recall_lookups if worker.recall_lookups else None
    tier = "connected" if worker.tier.connected else "not connected"
    failed = sum(worker.tier.failures.values())
    return {
        "address": worker.address,
        "model": worker.model,
        "device": worker.device,
        "weights": human_bytes(worker.weight_bytes),
        "KV: window": human_bytes(worker.window_bytes),
        "KV: index": human_bytes(worker.index_bytes),
        "KV: recall slots": human_bytes(worker.slot_bytes),
        "KV: workspace": human_bytes(worker.workspace_bytes),
        "device free": f"{human_bytes(worker.device_free_bytes)} of {human_bytes(worker.device_capacity_bytes)}",
        "host": human_bytes(worker.host_bytes),
        "host free": f"{human_bytes(worker.host_free_bytes)} of {human_bytes(worker.host_capacity_bytes)}",
        "Redis": human_bytes(worker.redis_bytes),
        "Redis state": f"{tier}, {worker.tier.pending_frames} frames waiting, {failed} failed",
        "sessions held": f"{worker.resident_sessions}",
        "calls running": f"{worker.running_calls}",
        "prefill tokens/s": f"{worker.prefill_tokens_per_s:,.0f}",
        "decode tokens/s": f"{worker.decode_tokens_per_s:,.1f}",
        "recall hit rate": "-" if hit_rate is None else f"{hit_rate:.1%}",
        "recomputed tokens": f"{worker.recomputed_tokens:,}",
        "made room": f"{worker.swapped_out:,} swapped out, {worker.forgotten:,} to be recomputed",
        "idle made room": f"{worker.idle_swapped_out:,} swapped out, {worker.idle_dropped:,} dropped",
        "steps": f"{worker.steps:,}",
    }
