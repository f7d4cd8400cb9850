"""The door of the HTTP port: how many connections there may be, and how long a request's headers may take to come.

Stands between a socket and what parses HTTP. Knows no HTTP but the two answers with which it shuts.

    connected ──bytes──► waiting for headers ──begun──► answering ──ended──► idle ──bytes──► waiting for headers
                               └── too late: 408                             └── too long: the parser's own limit

Of a request whose first bytes came together with the one before it, only that longer limit holds.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

logger = logging.getLogger(__name__)

TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"


class Door:
    """Makes a protocol for each connection; give it to `loop.create_server`.

    Args:
        inside: makes the protocol that parses.
        header_s: from a request's first byte, or the connection's beginning, to the end of the headers.
        connections: at a time.
        connections_per_address: at a time, of one caller's.
    """

    def __init__(
        self,
        inside: Callable[[], asyncio.Protocol],
        *,
        header_s: float,
        connections: int,
        connections_per_address: int,
    ) -> None:
        self._inside = inside
        self._header_s = header_s
        self._connections = connections
        self._connections_per_address = connections_per_address
        self._visitors: dict[asyncio.BaseTransport, _Visitor] = {}
        self._by_address: Counter[str] = Counter()

    def __call__(self) -> asyncio.Protocol:
        """The protocol of one connection."""
        return _Visitor(self, self._inside(), self._header_s)

    def begun(self, transport: asyncio.BaseTransport | None) -> None:
        """The headers of a request have come."""
        if transport in self._visitors:
            self._visitors[transport].begun()

    def ended(self, transport: asyncio.BaseTransport | None) -> None:
        """A request is answered: what comes next begins another."""
        if transport in self._visitors:
            self._visitors[transport].ended()

    def lets_in(self, visitor: _Visitor, transport: asyncio.BaseTransport, address: str) -> bool:
        """Counts a connection, if there is room for it."""
        if len(self._visitors) >= self._connections or self._by_address[address] >= self._connections_per_address:
            logger.info("connection_refused", extra={"peer": address, "connections": len(self._visitors)})
            return False
        self._visitors[transport] = visitor
        self._by_address[address] += 1
        return True

    def left(self, transport: asyncio.BaseTransport, address: str) -> None:
        """A connection that was let in has ended."""
        del self._visitors[transport]
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]


class _Visitor(asyncio.Protocol):
    def __init__(self, door: Door, inside: asyncio.Protocol, header_s: float) -> None:
        self._door = door
        self._inside = inside
        self._header_s = header_s
        self._address = ""
        self._transport: asyncio.Transport | None = None
        """None: it wasn't let in."""
        self._deadline: asyncio.TimerHandle | None = None
        self._answering = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        peer = transport.get_extra_info("peername")
        self._address = str(peer[0]) if isinstance(peer, tuple) else ""
        if not self._door.lets_in(self, transport, self._address):
            transport.write(TOO_MANY)
            transport.close()
            return
        self._transport = transport
        self._inside.connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self._transport is None:
            return
        if not self._answering and self._deadline is None:
            self._expect_headers()
        self._inside.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inside.eof_received() if self._transport is not None else None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._expect_nothing()
            self._door.left(self._transport, self._address)
            self._transport = None
            self._inside.connection_lost(exc)

    def pause_writing(self) -> None:
        self._inside.pause_writing()

    def resume_writing(self) -> None:
        self._inside.resume_writing()

    def begun(self) -> None:
        self._answering = True
        self._expect_nothing()

    def ended(self) -> None:
        self._answering = False

    def _expect_headers(self) -> None:
        self._deadline = asyncio.get_running_loop().call_later(self._header_s, self._shut)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _shut(self) -> None:
        self._deadline = None
        if self._transport is not None and not self._transport.is_closing():
            logger.info("headers_too_slow", extra={"peer": self._address})
            self._transport.write(TOO_SLOW)
            self._transport.close()
