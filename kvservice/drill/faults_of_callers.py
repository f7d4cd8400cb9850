"""Callers that a service must stand: they say nothing, too slowly, too much, or ask for all there is.

The questions that are looked at are another tenant's; what they get must be right, and not much later than without.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from kvservice.client import Client, RetryPolicy
from kvservice.drill.deployment import CROWD_TENANT, Deployment
from kvservice.drill.faults import Act, Fault
from kvservice.errors import KVServiceError

INPUT = "input"

STRANGERS = 150
"""On each port."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SLOW_BYTES = b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX-Slow: "
DRIP_S = 0.5
FLOODERS = 48
FLOOD_TEXT = "flood " * 100
FLOOD_TOKENS = 32
POSTERS = 8
NESTED = b'{"messages": ' + b"[" * 200_000
BODY_TYPE = b"Content-Type: application/json\r\n"
MOST_S = 10.0
"""So long a call of another tenant may take, on a machine whose cores the crowd shares."""
PAUSE_S = 0.05
NO_RETRIES = RetryPolicy(max_attempts=1)


class Crowd:
    """Comes when a fault begins, goes when it ends."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    async def strangers(self, deployment: Deployment) -> None:
        """Connections that never get as far as a call; whoever is shut out comes again."""
        for name in deployment.config.gateways:
            grpc_port = deployment.port(name)
            http_port = deployment.http_ports[name]
            for index in range(STRANGERS):
                said = (b"", PREFACE[:10], PREFACE)[index % 3]
                self._start(_stranger(grpc_port, said, b""))
                self._start(_stranger(http_port, (b"", SLOW_BYTES)[index % 2], b"x"))

    async def flood(self, deployment: Deployment) -> None:
        """One tenant asks all it can, again and again."""
        for name in deployment.config.gateways:
            for _ in range(FLOODERS):
                self._start(_flooder(deployment.client_of(name, CROWD_TENANT, NO_RETRIES)))

    async def nested(self, deployment: Deployment) -> None:
        """Bodies that are nested deeper than anybody should read."""
        key = deployment.keys[CROWD_TENANT].encode()
        for name in deployment.config.gateways:
            for _ in range(POSTERS):
                self._start(_poster(deployment.http_ports[name], key))

    async def go(self, deployment: Deployment) -> None:
        """All leave."""
        del deployment
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))


async def _stranger(port: int, said: bytes, drip: bytes) -> None:
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(said)
                while not reader.at_eof():
                    writer.write(drip)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(DRIP_S):
                            await reader.read(1024)
            finally:
                writer.close()
        await asyncio.sleep(DRIP_S)


async def _flooder(client: Client) -> None:
    async with client:
        while True:
            with contextlib.suppress(KVServiceError):
                async for _ in client.complete("and then? ", document=FLOOD_TEXT, max_new_tokens=FLOOD_TOKENS):
                    pass
            await asyncio.sleep(PAUSE_S)


async def _poster(port: int, key: bytes) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %b\r\n%bContent-Length: %d\r\n\r\n"
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(head % (key, BODY_TYPE, len(NESTED)) + NESTED)
                await reader.readuntil(b"\r\n\r\n")
            finally:
                writer.close()
        await asyncio.sleep(PAUSE_S)


def caller_faults() -> tuple[Fault, ...]:
    """Each with a crowd of its own."""
    return (
        _of("strangers who say nothing, or say it slowly", crowd := Crowd(), crowd.strangers),
        _of("a tenant that floods the service", crowd := Crowd(), crowd.flood),
        _of("bodies nested without end", crowd := Crowd(), crowd.nested),
    )


def _of(name: str, crowd: Crowd, comes: Act) -> Fault:
    return Fault(name, INPUT, comes, crowd.go, most_s=MOST_S)
