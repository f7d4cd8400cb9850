"""`kvservice tenants list|set`: what tenants may use, and have used. Needs the role `operator`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from kvservice.cli.calls import call_service
from kvservice.cli.options import DEFAULT_ADDRESS, Address
from kvservice.cli.output import PIPED_WIDTH
from kvservice.cli.stats import tenant_row, tenants_table

app = typer.Typer(help="Show and set tenants' limits. Needs the role `operator`.", no_args_is_help=True)

Rate = Annotated[float | None, typer.Option(min=0, help="A minute; 0: back to the service's default.")]
Count = Annotated[int | None, typer.Option(min=0, help="0: back to the service's default.")]


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


@app.command("set")
def set_limits(
    tenant: Annotated[str, typer.Argument(help="Name of the tenant, as in the key file.")],
    requests_per_minute: Rate = None,
    tokens_per_minute: Rate = None,
    concurrent_calls: Count = None,
    document_tokens: Count = None,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Set limits of a tenant. They hold at every gateway within a second, and outlive restarts as sessions do."""
    limits = (requests_per_minute, tokens_per_minute, concurrent_calls, document_tokens)
    if all(limit is None for limit in limits):
        raise typer.BadParameter("give at least one limit, such as --requests-per-minute 600")
    call_service(
        address,
        lambda client: client.set_quota(
            tenant,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrent_calls=concurrent_calls,
            document_tokens=document_tokens,
        ),
    )
