"""`kvservice sessions list|show|fork|move|truncate|close`: a tenant's sessions."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.calls import call_service
from kvservice.cli.options import DEFAULT_ADDRESS, Address
from kvservice.cli.output import human_bytes, show_table

if TYPE_CHECKING:
    from kvservice.client import Client, SessionInfo

app = typer.Typer(
    help="List, show, fork, move, truncate and close sessions. The API key is read from KVSERVICE_API_KEY.",
    no_args_is_help=True,
)

SessionIds = Annotated[list[str], typer.Argument(help="Ids of sessions.", metavar="ID...")]


@app.command("list")
def list_sessions(address: Address = DEFAULT_ADDRESS) -> None:
    """List the tenant's sessions."""
    sessions = call_service(address, _all_sessions)
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
    session = call_service(address, lambda client: client.get(session_id))
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


@app.command("fork")
def fork(
    session_id: Annotated[str, typer.Argument(help="Id of the session.")], address: Address = DEFAULT_ADDRESS
) -> None:
    """Begin a session with all tokens of another, and print its id."""
    forked = call_service(address, lambda client: client.fork_session(session_id))
    typer.echo(forked.session_id)


@app.command("move")
def move(
    session_id: Annotated[str, typer.Argument(help="Id of the session.")],
    worker: Annotated[str, typer.Option("--worker", help="Where to; by default the service chooses.")] = "",
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Hand a session to another worker. Needs the role `operator`."""
    moved = call_service(address, lambda client: client.move_session(session_id, worker))
    typer.echo(f"{session_id}: at {moved.worker_id}")


@app.command("truncate")
def truncate(
    session_id: Annotated[str, typer.Argument(help="Id of the session.")],
    to_tokens: Annotated[int, typer.Argument(help="Tokens that stay.", min=0)],
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Take a session back to its first tokens."""
    left = call_service(address, lambda client: client.truncate_session(session_id, to_tokens))
    typer.echo(f"{session_id}: {left.num_tokens:,} tokens")


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

    call_service(address, close_all)


async def _all_sessions(client: Client) -> list[SessionInfo]:
    return [session async for session in client.list()]


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
