"""One call, or a few, on a running service. The key and the certificates come from the environment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from kvservice.cli.options import api_key, client_tls

if TYPE_CHECKING:
    from kvservice.client import Client

T = TypeVar("T")


def call_service(address: str, call: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
    """What `call` gives on the service at `address`."""
    from kvservice.client import Client

    async def run() -> T:
        async with Client(address, api_key(), tls=client_tls()) as client:
            return await call(client)

    return asyncio.run(run())
