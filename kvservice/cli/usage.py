"""`kvservice usage`: what calls have used, as JSON lines. Needs the role `operator`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.calls import call_service
from kvservice.cli.options import DEFAULT_ADDRESS, Address

if TYPE_CHECKING:
    from kvservice.client import Client


def usage(
    address: Address = DEFAULT_ADDRESS,
    after: Annotated[
        str, typer.Option(metavar="CURSOR", help="Only records behind this one: `cursor` of the last line so far.")
    ] = "",
    tenant: Annotated[str, typer.Option(help="Only records of this tenant.")] = "",
) -> None:
    """Export what calls, sessions and stored bytes have used, one JSON object a line. Needs the role `operator`.

    The last line has the cursor to go on from. Of one request there is one record of the kind `call`, however often it
    was made.
    """

    async def export(client: Client) -> None:
        cursor = after
        while True:
            records, cursor = await client.usage(cursor)
            for record in records:
                if not tenant or record.tenant == tenant:
                    fields = asdict(record)
                    typer.echo(json.dumps({**fields.pop("usage"), **fields}))
            if not records:
                typer.echo(json.dumps({"cursor": cursor}))
                return

    call_service(address, export)
