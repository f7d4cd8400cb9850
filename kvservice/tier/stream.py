"""Values read one after another from one socket, straight into the memory that wants them.

Knows of RESP what a GET and its answers look like, and nothing else. Client libraries make a new object of each value,
which costs more than the value's way through the kernel: measured in docs/decisions/024.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence

from kvservice.errors import Unavailable
from kvservice.tier.base import OpenSocket

HEAD_BYTES = 4096
"""Read at a time where an answer begins; the few bytes of payload among them are copied once more."""
MAX_LINE_BYTES = 1024
PATIENCE_S = 0.05
"""How soon a deadline is seen that was moved while a read waits."""
STALL_S = 5.0
"""A server that says nothing for so long is lost, whatever the deadline."""


class ValueStream:
    """Pipelined GETs on one connection, and their answers in the order asked. For one thread.

    After any error the connection is of no more use: close it.

    Args:
        connected: nothing is under way on it. The stream owns it.
        clock: seconds that never go back; deadlines are on it.
    """

    def __init__(self, connected: OpenSocket, clock: Callable[[], float] = time.monotonic) -> None:
        self._connected = connected
        self._socket: socket.socket = connected.socket
        self._socket.settimeout(PATIENCE_S)
        self._clock = clock
        self._head = memoryview(bytearray(HEAD_BYTES))
        self._start = self._stop = 0
        self.num_received = 0
        """Bytes since the stream was opened."""

    def ask(self, keys: Sequence[bytes], deadline: Callable[[], float]) -> None:
        """Sends a GET for each key.

        Raises:
            TimeoutError: the deadline passed, or the server is silent.
            OSError: the connection broke.
        """
        request = memoryview(b"".join(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key) for key in keys))
        started = self._clock()
        while request:
            try:
                request = request[self._socket.send(request) :]
            except TimeoutError:
                self._check(deadline, started)

    def length(self, deadline: Callable[[], float]) -> int | None:
        """Bytes of the next value, which is then read by `fill`, `take` and `end`; None if there is no such value.

        Raises:
            Unavailable: the server refused; the message is its own.
            TimeoutError: the deadline passed, or the server is silent.
            OSError: the connection broke, or what came is no answer to a GET.
        """
        line = self._line(deadline)
        if line[:1] == b"-":
            raise Unavailable(line[1:].decode(errors="replace"), reason="refused")
        if line == b"$-1" or line == b"_":
            return None
        if line[:1] != b"$" or not line[1:].isdigit():
            raise ConnectionError(f"{line[:40]!r} is no answer to GET")
        return int(line[1:])

    def fill(self, view: memoryview, deadline: Callable[[], float]) -> None:
        """Reads as many bytes of the value as `view` has. Raises as `length` does."""
        buffered = min(len(view), self._stop - self._start)
        view[:buffered] = self._head[self._start : self._start + buffered]
        self._start += buffered
        view = view[buffered:]
        while view:
            view = view[self._receive(view, deadline) :]

    def take(self, num_bytes: int, deadline: Callable[[], float]) -> bytes:
        """The next bytes of the value. Raises as `length` does."""
        taken = bytearray(num_bytes)
        self.fill(memoryview(taken), deadline)
        return bytes(taken)

    def skip(self, num_bytes: int, deadline: Callable[[], float]) -> None:
        """Passes over bytes of the value. Raises as `length` does."""
        scratch = memoryview(bytearray(min(num_bytes, 1 << 16)))
        while num_bytes:
            part = min(num_bytes, len(scratch))
            self.fill(scratch[:part], deadline)
            num_bytes -= part

    def end(self, deadline: Callable[[], float]) -> None:
        """What follows a value that was read whole. Raises as `length` does."""
        if self.take(2, deadline) != b"\r\n":
            raise ConnectionError("a value is longer than announced")

    def close(self) -> None:
        """Closes the connection."""
        self._connected.close()

    def _line(self, deadline: Callable[[], float]) -> bytes:
        line = bytearray()
        while not line.endswith(b"\r\n"):
            if self._start == self._stop:
                self._start, self._stop = 0, self._receive(self._head, deadline)
            found = bytes(self._head[self._start : self._stop]).find(b"\n") + 1
            stop = self._start + found if found else self._stop
            line += self._head[self._start : stop]
            self._start = stop
            if len(line) > MAX_LINE_BYTES:
                raise ConnectionError(f"a line of more than {MAX_LINE_BYTES} bytes is no answer to GET")
        return bytes(line[:-2])

    def _receive(self, view: memoryview, deadline: Callable[[], float]) -> int:
        started = self._clock()
        while True:
            try:
                received = self._socket.recv_into(view)
            except TimeoutError:
                self._check(deadline, started)
                continue
            if received == 0:
                raise ConnectionError("the server closed the connection")
            self.num_received += received
            return received

    def _check(self, deadline: Callable[[], float], waits_since: float) -> None:
        now = self._clock()
        if now >= deadline():
            raise TimeoutError("the deadline passed")
        if now - waits_since >= STALL_S:
            raise TimeoutError(f"nothing came for {STALL_S:g} s")
