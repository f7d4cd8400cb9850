"""From starting the service to its first token, over gRPC, with the model in the cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from kvservice.client import Client, LocalService, Tokens
from kvservice.errors import InternalError

PROMPT = "What is a key-value cache?"


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds since the command was given. `ready_s`: the service says so; `first_token_s`: a caller has one."""

    ready_s: float
    first_token_s: float


async def measure_start(arguments: Sequence[str]) -> Start:
    """Starts a service of those arguments, asks it a question and stops it.

    Raises:
        KVServiceError: it didn't start, or didn't answer.
    """
    started = time.perf_counter()
    async with LocalService(arguments) as service, Client(service.address) as client:
        ready_s = time.perf_counter() - started
        async with aclosing(client.complete(PROMPT, max_new_tokens=1, ignore_eos=True)) as events:
            async for event in events:
                if isinstance(event, Tokens):
                    return Start(ready_s, time.perf_counter() - started)
    raise InternalError("the answer had no token")
