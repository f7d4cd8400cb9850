"""A TCP proxy that does to a connection what networks and dying servers do. Knows a little RESP, and no service.

    client ──► requests ──► server        each direction: read ──► (delay, flip, cut) ──► queue ──► (drip) ──► write
           ◄── replies  ◄──

A fault holds for all connections, those that are open included, from `set` to `heal`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from dataclasses import dataclass, field

CHUNK_BYTES = 64 * 1024
QUEUED_CHUNKS = 16
"""Chunks under way in one direction: with a latency, what a network holds."""
DRIP_S = 0.05
"""Between two drops of a slow drip."""
SETTLING = (b"AUTH", b"CLIENT", b"HELLO", b"SELECT")
"""Commands that a server takes whatever state it is in: a refusal starts behind them."""


@dataclass(frozen=True, slots=True)
class LinkFault:
    """What is wrong with a link; nothing by default. What is set adds up.

    Attributes:
        latency_s: added to each direction.
        jitter_s: more latency, at random up to this. Order is kept.
        reset_after_bytes: of replies on one connection; then it is reset (RST), in the middle of whatever was sent.
        truncate_after_bytes: as before, but the connection ends as if all had been said (FIN).
        flip_every_bytes: one bit is flipped in about so many bytes of replies.
        flip_requests: bits of requests are flipped instead.
        drip_bytes_per_s: replies come no faster, in drops.
        black_hole: nothing passes, and nobody is told. What was sent goes on when the fault is healed.
        refuses: connections are closed as soon as they are made, and those open now.
        error: an error line, such as `-LOADING …`, is the answer to every command; none reaches the server.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    reset_after_bytes: int | None = None
    truncate_after_bytes: int | None = None
    flip_every_bytes: int | None = None
    flip_requests: bool = False
    drip_bytes_per_s: float | None = None
    black_hole: bool = False
    refuses: bool = False
    error: str = ""


NO_FAULT = LinkFault()


@dataclass(slots=True)
class LinkCounts:
    """What a proxy has passed and done since it was made."""

    connections: int = 0
    passed_bytes: int = 0
    flipped_bits: int = 0
    cut_connections: int = 0
    refused_connections: int = 0
    refused_commands: int = 0


@dataclass(slots=True, eq=False)
class _Link:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    commands: CommandReader
    reply_bytes: int = 0
    """Since the fault in force was set."""
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class Proxy:
    """Listens on a loopback port and passes connections on to a server, as well as the fault in force lets it.

    Args:
        host: of the server.
        port: of the server.
        seed: of all that is random.
    """

    def __init__(self, host: str, port: int, *, seed: int = 0) -> None:
        self.counts = LinkCounts()
        self._server = (host, port)
        self._rng = random.Random(seed)
        self._fault = NO_FAULT
        self._passable = asyncio.Event()
        self._passable.set()
        self._links: set[_Link] = set()
        self._handlers: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """Where it listens. Only after `start`."""
        assert self._listener is not None
        return int(self._listener.sockets[0].getsockname()[1])

    async def start(self) -> int:
        """Listens; gives the port."""
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=CHUNK_BYTES)
        return self.port

    def set(self, fault: LinkFault) -> None:
        """From now on this is wrong with the link, and nothing else."""
        before, self._fault = self._fault, fault
        for link in list(self._links):
            link.reply_bytes = 0
            if fault.refuses or fault.error or before.error:
                # Commands can be told apart from a connection's beginning on alone; and to a server that was spoken for
                # nobody has logged in.
                self._cut(link, hard=True)
        if fault.black_hole:
            self._passable.clear()
        else:
            self._passable.set()

    def heal(self) -> None:
        """Nothing is wrong any more. Connections that were broken stay so."""
        self.set(NO_FAULT)

    async def aclose(self) -> None:
        """Ends all connections and stops listening."""
        if self._listener is not None:
            self._listener.close()
        for link in list(self._links):
            self._cut(link, hard=True)
        for task in list(self._handlers):
            task.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)
        if self._listener is not None:
            await self._listener.wait_closed()

    def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._carry(reader, writer))
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)
        # Here, for a task that is cancelled before it begins never comes to its own end.
        task.add_done_callback(lambda _: writer.close())

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts.connections += 1
        link: _Link | None = None
        try:
            if self._fault.refuses:
                self.counts.refused_connections += 1
                _reset(writer)
                return
            # A server behind a black hole isn't reached either, but the connection stands: as behind a load balancer.
            back_reader, back_writer = await asyncio.open_connection(*self._server, limit=CHUNK_BYTES)
            link = _Link(writer, back_writer, CommandReader())
            self._links.add(link)
            link.tasks = [
                asyncio.create_task(self._pass(link, reader, is_reply=False)),
                asyncio.create_task(self._pass(link, back_reader, is_reply=True)),
            ]
            await asyncio.wait(link.tasks, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            # The server is away: so is the connection to it.
            _reset(writer)
        finally:
            if link is not None:
                self._links.discard(link)
                # First of all: who closes the proxy may cancel what follows.
                link.server.close()
                for task in link.tasks:
                    task.cancel()
                await asyncio.gather(*link.tasks, return_exceptions=True)

    async def _pass(self, link: _Link, reader: asyncio.StreamReader, *, is_reply: bool) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_CHUNKS)
        writing = asyncio.create_task(self._write(link, queue, is_reply=is_reply))
        loop = asyncio.get_running_loop()
        due = loop.time()
        try:
            while not writing.done():
                chunk = await reader.read(CHUNK_BYTES)
                fault = self._fault
                late = fault.latency_s + fault.jitter_s * self._rng.random()
                due = max(due, loop.time() + late)
                if chunk and fault.flip_every_bytes and fault.flip_requests is not is_reply:
                    chunk = self._flipped(chunk, fault.flip_every_bytes)
                await queue.put((due, chunk))
                if not chunk:
                    break
            await writing
        except OSError:
            # One of the two has gone, so the connection ends.
            return
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    async def _write(self, link: _Link, queue: asyncio.Queue[tuple[float, bytes]], *, is_reply: bool) -> None:
        """Ends with the connection's last byte, or with the connection."""
        writer = link.client if is_reply else link.server
        while True:
            due, chunk = await queue.get()
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            await self._passable.wait()
            if not chunk:
                return
            if self._fault.error and not is_reply:
                await self._refuse(link, chunk)
                continue
            if is_reply:
                rest = self._left(link)
                if rest is not None and len(chunk) >= rest:
                    writer.write(chunk[:rest])
                    await writer.drain()
                    self._cut(link, hard=self._fault.truncate_after_bytes is None)
                    return
                link.reply_bytes += len(chunk)
            await self._drip(writer, chunk, is_reply=is_reply)
            self.counts.passed_bytes += len(chunk)

    async def _drip(self, writer: asyncio.StreamWriter, chunk: bytes, *, is_reply: bool) -> None:
        while chunk:
            rate = self._fault.drip_bytes_per_s if is_reply else None
            drop = len(chunk) if rate is None else max(1, round(rate * DRIP_S))
            writer.write(chunk[:drop])
            await writer.drain()
            chunk = chunk[drop:]
            if rate is not None:
                await asyncio.sleep(DRIP_S)

    async def _refuse(self, link: _Link, chunk: bytes) -> None:
        for name in link.commands.feed(chunk):
            if name in SETTLING:
                link.client.write(b"+OK\r\n")
            else:
                self.counts.refused_commands += 1
                link.client.write(self._fault.error.encode() + b"\r\n")
        await link.client.drain()

    def _left(self, link: _Link) -> int | None:
        """Bytes of replies that a connection may still pass; None: any number."""
        limits = [
            limit for limit in (self._fault.reset_after_bytes, self._fault.truncate_after_bytes) if limit is not None
        ]
        return max(0, min(limits) - link.reply_bytes) if limits else None

    def _cut(self, link: _Link, *, hard: bool) -> None:
        self.counts.cut_connections += 1
        if hard:
            _reset(link.client)
        else:
            link.client.close()
        link.server.transport.abort()
        for task in link.tasks:
            task.cancel()

    def _flipped(self, chunk: bytes, every_bytes: int) -> bytes:
        flipped = bytearray(chunk)
        index = self._rng.expovariate(1 / every_bytes)
        while index < len(flipped):
            flipped[int(index)] ^= 1 << self._rng.randrange(8)
            self.counts.flipped_bits += 1
            index += 1 + self._rng.expovariate(1 / every_bytes)
        return bytes(flipped)


class CommandReader:
    """Tells the commands in a stream of RESP arrays apart. Arguments are passed over, not kept."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._arguments = 0
        """Left of the command under way."""
        self._skip = 0
        """Bytes left of the argument under way, with its line end."""
        self._name: bytes | None = None

    def feed(self, data: bytes) -> list[bytes]:
        """The names, in capitals, of the commands that are whole now."""
        self._rest += data
        names: list[bytes] = []
        while self._advance():
            if not self._arguments and not self._skip and self._name is not None:
                names.append(self._name)
                self._name = None
        return names

    def _advance(self) -> bool:
        """Reads one step further; False if there isn't enough for it."""
        if self._skip:
            taken = min(self._skip, len(self._rest))
            del self._rest[:taken]
            self._skip -= taken
            return taken > 0
        end = self._rest.find(b"\r\n")
        if end < 0:
            return False
        number = int(self._rest[1:end])
        if not self._arguments:
            del self._rest[: end + 2]
            self._arguments = number
            return True
        if self._name is None:
            if len(self._rest) < end + 2 + number + 2:
                return False
            self._name = bytes(self._rest[end + 2 : end + 2 + number]).upper()
        del self._rest[: end + 2]
        self._arguments -= 1
        self._skip = number + 2
        return True


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection by RST, whatever is still to be sent."""
    with contextlib.suppress(OSError):
        plug: socket.socket | None = writer.get_extra_info("socket")
        if plug is not None:
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
