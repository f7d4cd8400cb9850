"""`kvservice sessions list|show|close` and `kvservice stats`: what a running service holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from kvservice.cli.options import DEFAULT_ADDRESS, Address, api_key
from kvservice.cli.output import human_bytes, show_table

if TYPE_CHECKING:
    from kvservice.client import Client, ServiceStats, SessionInfo, WorkerReport

T = TypeVar("T")

app = typer.Typer(
    help="List, show and close sessions. The API key is read from KVSERVICE_API_KEY.", no_args_is_help=True
)

SessionIds = Annotated[list[str], typer.Argument(help="Ids of sessions.", metavar="ID...")]


@app.command("list")
def list_sessions(address: Address = DEFAULT_ADDRESS) -> None:
    """List the tenant's sessions."""
    sessions = _call(address, _all_sessions)
    show_table(
        f"{len(sessions)} sessions",
        ("session", "tokens", "durable", "recipe", "state", "worker", "expires"),
        [
            (
                session.session_id,
                f"{session.num_tokens:,}",
                f"{session.durable_tokens:,}",
                session.recipe,
                session.state.value,
                session.worker_id,
                _time(session.expires_at),
            )
            for session in sessions
        ],
        numeric=("tokens", "durable"),
    )


@app.command("show")
def show(
    session_id: Annotated[str, typer.Argument(help="Id of the session.")], address: Address = DEFAULT_ADDRESS
) -> None:
    """Show one session."""
    session = _call(address, lambda client: client.get(session_id))
    rows = {
        "session": session.session_id,
        "model": session.model,
        "recipe": session.recipe,
        "format": session.prompt_format.value,
        "on miss": session.on_miss.value,
        "tokens": f"{session.num_tokens:,}",
        "durable": f"{session.durable_tokens:,}",
        "state": session.state.value,
        "prefill": f"{session.prefill_done_tokens:,} of {session.prefill_total_tokens:,}",
        "worker": session.worker_id or "none yet",
        "created": _time(session.created_at),
        "expires": _time(session.expires_at),
        "last error": session.last_error or "none",
    }
    show_table("Session", ("field", "value"), list(rows.items()))


@app.command("close")
def close(
    session_ids: SessionIds,
    purge: Annotated[bool, typer.Option("--purge", help="Also delete every stored byte now.")] = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Close sessions, and say what that freed."""

    async def close_all(client: Client) -> None:
        for session_id in session_ids:
            device_bytes, host_bytes = await client.close_session(session_id, purge=purge)
            typer.echo(
                f"{session_id}: freed {human_bytes(device_bytes)} on the device, {human_bytes(host_bytes)} in host"
            )

    _call(address, close_all)


def stats(address: Address = DEFAULT_ADDRESS) -> None:
    """Show the service's counters and each worker's bytes by owner. Needs the role `operator`."""
    report = _call(address, lambda client: client.stats())
    state = "draining" if report.draining else "serving"
    typer.echo(
        f"{address}: version {report.version}, {state}; {report.sessions} sessions held, "
        f"{report.running_calls} calls running, {report.waiting_calls} waiting"
    )
    if report.workers:
        _print_workers(report)


def _print_workers(report: ServiceStats) -> None:
    columns = [_worker_rows(worker) for worker in report.workers]
    show_table(
        "Workers",
        ("", *(worker.worker_id for worker in report.workers)),
        [(name, *(column[name] for column in columns)) for name in columns[0]],
        numeric=tuple(worker.worker_id for worker in report.workers),
    )


def _worker_rows(worker: WorkerReport) -> dict[str, str]:
    hit_rate = worker.recall_hits / worker.recall_lookups if worker.recall_lookups else None
    tier = "connected" if worker.tier.connected else "not connected"
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
        "Redis state": f"{tier}, {worker.tier.pending_frames} frames waiting",
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


async def _all_sessions(client: Client) -> list[SessionInfo]:
    return [session async for session in client.list()]


def _call(address: str, call: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
    from kvservice.client import Client

    async def run() -> T:
        async with Client(address, api_key()) as client:
            return await call(client)

    return asyncio.run(run())


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
