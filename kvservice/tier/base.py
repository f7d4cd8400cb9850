"""What a tier behind the host does, and how one is found by its URL. Knows nothing of frames, engines or Redis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from socket import socket as Socket
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

from kvservice.errors import ConfigError
from kvservice.registry import Registry
from kvservice.types import SessionId

T = TypeVar("T")

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes."""


@dataclass(frozen=True, slots=True)
class TierUsage:
    """What a tier holds, of all sessions."""

    frames: int = 0
    frame_bytes: int = 0
    memory_bytes: int = 0
    """Memory of the store, with its own overhead."""
    capacity_bytes: int = 0
    """The store's bound on `memory_bytes`; 0 if it has none."""


class TierBackend(Protocol):
    """A store of immutable values under keys made by `wire.frame_key`. Any value may be lost at any time.

    Used from one event loop. Every method ends within a bounded time and raises Unavailable with a reason
    (timeout, connection, auth, oom, readonly, loading, closed, other) when the store can't do it. Cancelling a call
    leaves the backend usable.
    """

    async def put_many(self, items: Sequence[tuple[bytes, Buffer]], ttl_s: float) -> None:
        """Keeps each value for `ttl_s`. A value is there whole or not at all.

        When it raises, any of the values may be there; putting them again is harmless.
        """
        ...

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values in the order of `keys`; None for each that isn't there."""
        ...

    async def delete_session(self, tenant_tag: bytes, session_id: SessionId) -> int:
        """Deletes all values of a session, however they came there. Returns how many there were."""
        ...

    async def usage(self) -> TierUsage:
        """Counts what is there now. Takes time in proportion to it."""
        ...

    async def aclose(self) -> None:
        """Closes connections. After it every method raises Unavailable, reason `closed`."""
        ...


@dataclass(frozen=True, slots=True)
class OpenSocket:
    """A connection that is logged in and on which nothing is under way."""

    socket: Socket
    close: Callable[[], None]


class ValueSource(Protocol):
    """Connections to where a tier's values are, for `reader.FrameReader`. They speak RESP. For several threads."""

    def place_of(self, key: bytes) -> str:
        """Which of the store's servers has a key. Never blocks.

        Raises:
            Unavailable: that isn't known.
        """
        ...

    def connect(self, place: str, timeout_s: float) -> OpenSocket:
        """A new connection to a server. Blocks.

        Raises:
            Unavailable: with a reason, as a `TierBackend`'s.
        """
        ...

    def refresh(self) -> None:
        """Looks again which server has what. Blocks.

        Raises:
            Unavailable: nobody can say.
        """
        ...


SOURCES: Registry[Callable[[str], ValueSource]] = Registry("value source")
"""URL scheme to a function that makes the value source of such a URL, without connecting."""

TIERS: Registry[Callable[[str], TierBackend]] = Registry("tier")
"""URL scheme to a function that makes the backend of such a URL, without connecting."""


def open_tier(url: str) -> TierBackend:
    """The backend that the scheme of `url` names. It connects when it is first used.

    Raises:
        ConfigError: no such scheme, or the URL is malformed.
    """
    return _maker(TIERS, url)(url)


def open_source(url: str) -> ValueSource:
    """Where to read the values of the tier at `url`. It connects when it is asked to.

    Raises:
        ConfigError: no such scheme, or the URL is malformed.
    """
    return _maker(SOURCES, url)(url)


def _maker(registry: Registry[T], url: str) -> T:
    registry.discover("kvservice.tier")
    scheme = urlsplit(url).scheme
    if scheme not in registry.names():
        known = ", ".join(registry.names())
        raise ConfigError(f"tier URL with scheme {scheme!r}: known are {known}", reason="tier_url")
    return registry.get(scheme)
