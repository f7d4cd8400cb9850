"""Values read one after another from one socket, straight into the memory that wants them.

Knows of RESP what a GET and its answers look like, and nothing else. Client libraries make a new object of each value,
which costs more than the value's way through the kernel: measured in docs/decisions/024.
"""

from __future__ import annotations

import socket
import ssl
import struct
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
MAX_PIECES = 512
"""That one read fills: the kernel takes 1,024."""
REFUSALS = {b"OOM": "oom", b"LOADING": "loading", b"MOVED": "moved", b"ASK": "moved"}
"""What a server says first when it refuses, and what we call that."""
LATE = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
"""What a read or write raises when the kernel's time limit has passed."""


class ValueStream:
    """Pipelined GETs on one connection, and their answers in the order asked. For one thread.

    After any error the connection is of no more use: close it.

    Args:
        connected: nothing is under way on it. The stream owns it.
        clock: seconds that never go back; deadlines are on it.
    """

    def __init__(self, connected: OpenSocket, clock: Callable[[], float] = time.monotonic) -> None:
        self._connected = connected
        self._socket = connected.socket
        # The kernel's time limits instead of Python's: those cost a poll before each read.
        self._socket.settimeout(None)
        limit = struct.pack("ll", 0, round(PATIENCE_S * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._is_plain = not isinstance(self._socket, ssl.SSLSocket)
        self._clock = clock
        self._buffer = bytearray(HEAD_BYTES)
        self._head = memoryview(self._buffer)
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
            except LATE:
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
            word = bytes(line[1:].partition(b" ")[0])
            raise Unavailable(line[1:].decode(errors="replace"), reason=REFUSALS.get(word, "refused"))
        if line == b"$-1" or line == b"_":
            return None
        if line[:1] != b"$" or not line[1:].isdigit():
            raise ConnectionError(f"{line[:40]!r} is no answer to GET")
        return int(line[1:])

    def fill(self, pieces: Sequence[memoryview], deadline: Callable[[], float]) -> None:
        """Reads as many bytes of the value as the pieces have, into one after another. Raises as `length` does."""
        left = list(pieces)
        while left and self._start < self._stop:
            part = min(len(left[0]), self._stop - self._start)
            left[0][:part] = self._head[self._start : self._start + part]
            self._start += part
            _pass(left, part)
        while left:
            _pass(left, self._receive(left, deadline))
            if left:
                self._check_drip(deadline)

    def take(self, num_bytes: int, deadline: Callable[[], float]) -> bytes:
        """The next bytes of the value. Raises as `length` does."""
        taken = bytearray(num_bytes)
        self.fill([memoryview(taken)], deadline)
        return bytes(taken)

    def skip(self, num_bytes: int, deadline: Callable[[], float]) -> None:
        """Passes over bytes of the value. Raises as `length` does."""
        scratch = memoryview(bytearray(min(num_bytes, 1 << 16)))
        while num_bytes:
            part = min(num_bytes, len(scratch))
            self.fill([scratch[:part]], deadline)
            num_bytes -= part

    def end(self, deadline: Callable[[], float]) -> None:
        """What follows a value that was read whole. Raises as `length` does."""
        if self.take(2, deadline) != b"\r\n":
            raise ConnectionError("a value is longer than announced")

    def close(self) -> None:
        """Closes the connection."""
        self._connected.close()

    def _line(self, deadline: Callable[[], float]) -> bytes:
        line = b""
        while not line.endswith(b"\r\n"):
            if self._start == self._stop:
                self._start, self._stop = 0, self._receive([self._head], deadline, flags=0)
            stop = self._buffer.find(b"\n", self._start, self._stop) + 1 or self._stop
            line += self._buffer[self._start : stop]
            self._start = stop
            if len(line) > MAX_LINE_BYTES:
                raise ConnectionError(f"a line of more than {MAX_LINE_BYTES} bytes is no answer to GET")
            if not line.endswith(b"\r\n"):
                self._check_drip(deadline)
        return line[:-2]

    def _receive(
        self, pieces: Sequence[memoryview], deadline: Callable[[], float], flags: int = socket.MSG_WAITALL
    ) -> int:
        started = self._clock()
        while True:
            try:
                if self._is_plain:
                    received = self._socket.recvmsg_into(pieces[:MAX_PIECES], 0, flags)[0]
                else:
                    received = self._socket.recv_into(pieces[0])
            except LATE:
                self._check(deadline, started)
                continue
            if received == 0:
                raise ConnectionError("the server closed the connection")
            self.num_received += received
            return received

    def _check_drip(self, deadline: Callable[[], float]) -> None:
        """A server that says a little at a time never lets the kernel's time limit pass."""
        if self._clock() >= deadline():
            raise TimeoutError("the deadline passed")

    def _check(self, deadline: Callable[[], float], waits_since: float) -> None:
        now = self._clock()
        if now >= deadline():
            raise TimeoutError("the deadline passed")
        if now - waits_since >= STALL_S:
            raise TimeoutError(f"nothing came for {STALL_S:g} s")


def _pass(pieces: list[memoryview], num_bytes: int) -> None:
    """Takes bytes that were filled off the front of the pieces, and pieces that are full."""
    while pieces and num_bytes >= len(pieces[0]):
        num_bytes -= len(pieces.pop(0))
    if num_bytes:
        pieces[0] = pieces[0][num_bytes:]
