"""The calls that a drill interrupts, and how each is made. Knows no faults."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kvservice.client import Answer, Client

READY = b"ready\n"
CALL_S = 30.0
"""Deadline of a call under a fault."""
FIRST = "first question? "
NEW_TOKENS = 10
EXTRA = "and the story goes on: " * 12


class Call(enum.Enum):
    """What is under way."""

    APPEND = "Append"
    GENERATE = "Generate"
    FORK = "Fork"
    MOVE = "Move"
    CLOSE = "Close"


@dataclass(frozen=True, slots=True)
class Made:
    """A session that a call made, and what of it was reported durable."""

    session: str
    durable_tokens: int


async def put(client: Client, session: str, question: str, request_id: str | None = None) -> Answer:
    """A question, greedily answered."""
    return await client.ask(
        session,
        question,
        max_new_tokens=NEW_TOKENS,
        logprobs=2,
        ignore_eos=True,
        timeout_s=CALL_S,
        request_id=request_id,
    )


async def carry_out(client: Client, call: Call, session: str, request_id: str) -> Made | None:
    """The call, once; the session that it makes, if it makes one."""
    match call:
        case Call.APPEND:
            await client.append(session, EXTRA, request_id=request_id, timeout_s=CALL_S)
        case Call.GENERATE:
            await put(client, session, FIRST, request_id)
        case Call.FORK:
            fork = await client.fork_session(session, request_id=request_id)
            return Made(fork.session_id, fork.durable_tokens)
        case Call.MOVE:
            await client.move_session(session, request_id=request_id)
        case Call.CLOSE:
            await client.close_session(session, purge=True, request_id=request_id)
    return None
