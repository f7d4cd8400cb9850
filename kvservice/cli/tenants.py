"""`kvservice tenants list|show|set`: what tenants may use, and have used. Needs the role `operator`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from kvservice.cli.calls import call_service
from kvservice.cli.options import DEFAULT_ADDRESS, Address, parse_bytes
from kvservice.cli.output import PIPED_WIDTH, human_bytes
from kvservice.cli.stats import tenant_row, tenants_table

app = typer.Typer(help="Show and set tenants' limits. Needs the role `operator`.", no_args_is_help=True)

Rate = Annotated[float | None, typer.Option(min=0, help="A minute; 0: back to the service's default.")]
Count = Annotated[int | None, typer.Option(min=0, help="0: back to the service's default.")]
Bytes = Annotated[
    int | None,
    typer.Option(parser=parse_bytes, metavar="SIZE", help="On each worker, such as 1GiB; 0: back to the default."),
]
StoredBytes = Annotated[
    int | None,
    typer.Option(parser=parse_bytes, metavar="SIZE", help="In the kv Redis, such as 1GiB; 0: back to the default."),
]


@app.command("list")
def list_tenants(address: Address = DEFAULT_ADDRESS) -> None:
    """List tenants with limits of their own and those that have called, with what they used of this gateway."""
    report = call_service(address, lambda client: client.stats())
    table = tenants_table()
    for tenant in report.tenants:
        table.add_row(*tenant_row(tenant))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=PIPED_WIDTH)
    console.print(table)


@app.command("show")
def show_tenant(
    tenant: Annotated[str, typer.Argument(help="Name of the tenant, as in the key file.")],
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Show one tenant: what it used of this gateway, what it has stored, and its limits."""
    (found,) = call_service(address, lambda client: client.stats(tenant)).tenants
    limits = {
        "calls a minute": found.requests_per_minute,
        "tokens a minute": found.tokens_per_minute,
        "calls at a time": found.concurrent_calls,
        "tokens of a document": found.document_tokens,
        "sessions": found.sessions,
    }
    sizes = {
        "device bytes on each worker": found.device_bytes,
        "host bytes on each worker": found.host_bytes,
        "bytes in Redis": found.redis_bytes,
    }
    rows = {
        "calls": f"{found.requests:,}, {found.refused:,} refused, {found.running_calls:,} running",
        "tokens": f"{found.tokens:,}",
        "stored": human_bytes(found.stored_bytes or 0),
        "weight": f"{found.weight:g}",
        **{f"most {name}": "-" if limit is None else f"{limit:,g}" for name, limit in limits.items()},
        **{f"most {name}": "-" if limit is None else human_bytes(limit) for name, limit in sizes.items()},
    }
    for name, value in rows.items():
        typer.echo(f"{name:<34}{value}")


@app.command("set")
def set_limits(
    tenant: Annotated[str, typer.Argument(help="Name of the tenant, as in the key file.")],
    requests_per_minute: Rate = None,
    tokens_per_minute: Rate = None,
    concurrent_calls: Count = None,
    document_tokens: Count = None,
    sessions: Count = None,
    device_bytes: Bytes = None,
    host_bytes: Bytes = None,
    redis_bytes: StoredBytes = None,
    weight: Annotated[
        float | None,
        typer.Option(min=0, max=1000, help="Share of the workers' time, against others'; 0: back to the default."),
    ] = None,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Set limits of a tenant. They hold at every gateway within a second, and outlive restarts as sessions do."""
    rates = (requests_per_minute, tokens_per_minute, weight)
    counts = (concurrent_calls, document_tokens, sessions, device_bytes, host_bytes, redis_bytes)
    if all(limit is None for limit in (*rates, *counts)):
        raise typer.BadParameter("give at least one limit, such as --requests-per-minute 600")
    call_service(
        address,
        lambda client: client.set_quota(
            tenant,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrent_calls=concurrent_calls,
            document_tokens=document_tokens,
            sessions=sessions,
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            redis_bytes=redis_bytes,
            weight=weight,
        ),
    )
