"""What outlives a worker: sessions, locks, repeats, the fleet. Torch-free."""

from __future__ import annotations

from kvservice.store.base import StateStore
from kvservice.store.memory import MemoryStateStore
from kvservice.store.redis import RedisStateStore


async def open_state_store(url: str | None) -> StateStore:
    """The store at a Redis URL, found to be there; the one in memory if `url` is None.

    Raises:
        ConfigError: the URL is malformed, or the server refuses its password.
        Unavailable: the server can't be reached or isn't ready.
    """
    if url is None:
        return MemoryStateStore()
    store = RedisStateStore(url)
    try:
        await store.check()
    except BaseException:
        await store.aclose()
        raise
    return store
