"""A whole service for one measurement: both Redis servers, a gateway and a client, and no worker yet."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretBytes

if TYPE_CHECKING:
    from kvservice.client import Client
    from kvservice.gateway.server import Gateway
    from kvservice.store.base import StateStore


@dataclass(frozen=True, slots=True)
class BenchService:
    """What was started. URLs hold passwords."""

    state_url: str
    kv_url: str
    store: StateStore
    gateway: Gateway
    client: Client

    async def found(self, worker_id: str) -> None:
        """Returns once the gateway has found a worker."""
        fleet = self.gateway.fleet
        while worker_id not in {view.worker_id for view in fleet.views()}:
            await fleet.changed_since(fleet.version)


@asynccontextmanager
async def bench_service(redis_bytes: int, redis_server: Path | None = None) -> AsyncIterator[BenchService]:
    """Starts one, for the time of the block.

    Args:
        redis_bytes: bound on the kv Redis.
        redis_server: its binary; None: the one that is found.
    """
    from kvservice.client import Client
    from kvservice.config.gateway import GatewayConfig
    from kvservice.gateway.server import Gateway
    from kvservice.store import open_state_store
    from kvservice.store.embedded import EmbeddedRedis, RedisRole

    async with AsyncExitStack() as stack:
        state = stack.enter_context(EmbeddedRedis(RedisRole.STATE))
        kv = stack.enter_context(EmbeddedRedis(RedisRole.KV, maxmemory_bytes=redis_bytes, server=redis_server))
        store = await open_state_store(state.url)
        stack.push_async_callback(store.aclose)
        config = GatewayConfig(secret=SecretBytes(secrets.token_bytes(32)), port=0, discovery_interval_s=0.1)
        gateway = Gateway(config, store)
        stack.push_async_callback(gateway.stop)
        client = await stack.enter_async_context(Client(await gateway.start()))
        yield BenchService(state.url, kv.url, store, gateway, client)
