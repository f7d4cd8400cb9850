"""What outlives a worker: sessions, locks, repeats, the fleet, what is stored of KV. Torch-free."""

from __future__ import annotations

from kvservice.store.base import StateStore
from kvservice.store.ledger import DEFAULT_QUOTA_BYTES
from kvservice.store.memory import MemoryStateStore
from kvservice.store.redis import RedisStateStore


async def open_state_store(url: str | None, default_quota_bytes: int = DEFAULT_QUOTA_BYTES) -> StateStore:
    """The store at a Redis URL, found to be there; the one in memory if `url` is None.

    Args:
        url: of the state Redis.
        default_quota_bytes: stored bytes of a tenant without a quota of its own.

    Raises:
        ConfigError: the URL is malformed, or the server refuses its password.
        Unavailable: the server can't be reached or isn't ready.
    """
    if url is None:
        return MemoryStateStore(default_quota_bytes=default_quota_bytes)
    store = RedisStateStore(url, default_quota_bytes=default_quota_bytes)
    try:
        await store.check()
    except BaseException:
        await store.aclose()
        raise
    return store
