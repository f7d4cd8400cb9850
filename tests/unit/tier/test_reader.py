"""Reading frames back: whole and in order, or missed with a reason. On a real Redis, and on servers that misbehave."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from redis import Redis

from kvservice.errors import Unavailable
from kvservice.tier import codecs
from kvservice.tier import reader as reader_module
from kvservice.tier.base import OpenSocket, open_source
from kvservice.tier.header import FrameHeader, FrameRole, chunk_hash
from kvservice.tier.reader import FrameReader, FrameWant, Miss
from kvservice.tier.wire import encode_frame
from kvservice.types import SessionId

TAG = bytes(range(16))
SIZE = 64 * 2 * 8 * 2
WAIT_S = 20.0


def header(number: int, codec: str = "raw", groups: int = 3) -> FrameHeader:
    return FrameHeader(
        tenant_tag=TAG,
        session_id=SessionId("s"),
        fingerprint=bytes(16),
        layer_group=number,
        role=FrameRole.KV,
        chunk_hash=chunk_hash(TAG, b"", [number]),
        start=16,
        stop=16 + 64 * groups,
        shape=(groups, 1, 64, 2, 8),
        dtype="bfloat16",
        codec=codec,
    )


def payload(number: int, groups: int = 3) -> list[bytes]:
    return [bytes([number % 128, (number + group) % 64]) * (SIZE // 2) for group in range(groups)]


def frame(header: FrameHeader, pieces: list[bytes]) -> bytes:
    return bytes(encode_frame(header, codecs.encode(header, pieces)))


def memory(groups: int = 3) -> list[memoryview]:
    return [memoryview(bytearray(SIZE)) for _ in range(groups)]


def soon() -> float:
    return time.monotonic() + WAIT_S


@pytest.fixture
def client(kv_url) -> Iterator[Redis]:
    with Redis.from_url(kv_url) as made:
        yield made


@pytest.fixture
def reader(kv_url) -> Iterator[FrameReader]:
    made = FrameReader(open_source(kv_url))
    yield made
    made.close()


def miss_of(reader: FrameReader, want: FrameHeader, into: list[memoryview] | None = None) -> Miss | None:
    ((read),) = list(reader.fetch([FrameWant(want, into or memory(want.shape[0]))], soon()))
    return read.miss


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_frames_are_read_bit_for_bit_in_the_order_asked_for(reader, client, codec):
    count = 50
    for i in range(count):
        client.set(header(i, codec).key, frame(header(i, codec), payload(i)))
    wants = [FrameWant(header(i, codec), memory()) for i in reversed(range(count))]
    reads = list(reader.fetch(wants, soon()))
    assert [(read.index, read.miss) for read in reads] == [(i, None) for i in range(count)]
    for i, want in zip(reversed(range(count)), wants, strict=True):
        assert [bytes(piece) for piece in want.into] == payload(i)
    stats = reader.stats()
    assert (stats.connected, stats.read_frames, stats.misses) == (True, count, {})
    assert stats.busy_s > 0


def test_values_come_back_as_their_codec_makes_them(reader, client):
    client.set(header(1, "values8").key, frame(header(1, "values8"), payload(1)))
    into = memory()
    assert miss_of(reader, header(1, "values8"), into) is None
    assert bytes(into[0])[:16] == payload(1)[0][:16]


def test_frame_of_another_lossless_codec_is_as_good(reader, client):
    client.set(header(1).key, frame(header(1, "zstd"), payload(1)))
    into = memory()
    assert miss_of(reader, header(1), into) is None
    assert [bytes(piece) for piece in into] == payload(1)


def test_lossy_frame_is_refused_where_none_is_wanted(reader, client):
    client.set(header(1).key, frame(header(1, "values8"), payload(1)))
    assert miss_of(reader, header(1)) is Miss.FINGERPRINT


def test_missing_frame_is_absent_and_those_around_it_are_read(reader, client):
    for i in (0, 2):
        client.set(header(i).key, frame(header(i), payload(i)))
    reads = list(reader.fetch([FrameWant(header(i), memory()) for i in range(3)], soon()))
    assert [read.miss for read in reads] == [None, Miss.ABSENT, None]


@pytest.mark.parametrize(
    ("damage", "miss"),
    [
        (lambda data: data[:-20], Miss.CHECKSUM),
        (lambda data: data + b"x", Miss.CHECKSUM),
        (lambda data: data[:600] + bytes([data[600] ^ 1]) + data[601:], Miss.CHECKSUM),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), Miss.CHECKSUM),
        (lambda data: data[:20] + b"\xff" + data[21:], Miss.CHECKSUM),
        (lambda data: b"", Miss.CHECKSUM),
        (lambda data: b"nonsense" * 5000, Miss.CHECKSUM),
        (lambda data: b"KVC3" + data[4:], Miss.VERSION),
        (lambda data: frame(header(8), payload(8)), Miss.FINGERPRINT),
        (lambda data: frame(replace(header(7), start=80), payload(7)), Miss.FINGERPRINT),
        (lambda data: bytes(encode_frame(replace(header(7), codec="later"), [b"?"])), Miss.VERSION),
        (lambda data: bytes(encode_frame(replace(header(7), codec="zstd"), [b"?"])), Miss.CHECKSUM),
    ],
)
def test_damage_is_a_miss_with_its_reason_and_hurts_no_other_frame(reader, client, damage, miss):
    client.set(header(7).key, damage(frame(header(7), payload(7))))
    client.set(header(1).key, frame(header(1), payload(1)))
    reads = list(reader.fetch([FrameWant(header(i), memory()) for i in (7, 1)], soon()))
    assert [read.miss for read in reads] == [miss, None]
    assert reader.stats().misses == {miss.value: 1}


def test_value_that_is_no_string_is_a_miss(reader, client):
    client.sadd(header(1).key, "x")
    assert miss_of(reader, header(1)) is Miss.CONNECTION


def test_fewer_bytes_under_way_than_one_frame_still_let_it_through(kv_url, client):
    for i in range(10):
        client.set(header(i).key, frame(header(i), payload(i)))
    reader = FrameReader(open_source(kv_url), max_inflight_bytes=1)
    reads = list(reader.fetch([FrameWant(header(i), memory()) for i in range(10)], soon()))
    assert [read.miss for read in reads] == [None] * 10
    reader.close()


def test_results_are_announced_and_taken_without_waiting(reader, client):
    for i in range(5):
        client.set(header(i).key, frame(header(i), payload(i)))
    announced = threading.Semaphore(0)
    fetch = reader.fetch([FrameWant(header(i), memory()) for i in range(5)], soon(), announced.release)
    taken = []
    while not fetch.is_done:
        assert announced.acquire(timeout=WAIT_S)
        taken += fetch.ready()
    assert [read.index for read in taken] == list(range(5))
    assert fetch.ready() == []


def test_nothing_asked_is_nothing_done(reader):
    assert list(reader.fetch([], soon())) == []


def test_deadline_that_has_passed_is_a_miss(reader, client):
    client.set(header(1).key, frame(header(1), payload(1)))
    (read,) = list(reader.fetch([FrameWant(header(1), memory())], time.monotonic() - 1))
    assert read.miss is Miss.TIMEOUT


def test_closed_reader_misses_all(kv_url):
    reader = FrameReader(open_source(kv_url))
    reader.close()
    assert miss_of(reader, header(1)) is Miss.CANCELLED


class Server:
    """Answers each connection by a function of its own, in a thread."""

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self.num_connections = 0
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self._open.append(connection)
                self.num_connections += 1
                threading.Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._answer(connection)

    def place_of(self, key: bytes) -> str:
        return "here"

    def connect(self, place: str, timeout_s: float) -> OpenSocket:
        try:
            made = socket.create_connection(self._socket.getsockname(), timeout=timeout_s)
        except OSError as error:
            raise Unavailable("refused", reason="connection") from error
        return OpenSocket(made, made.close)

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in self._open:
            connection.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[Server, FrameReader]]]:
    made: list[Server | FrameReader] = []

    def start(answer: Callable[[socket.socket], None], **settings: float) -> tuple[Server, FrameReader]:
        server = Server(answer)
        reader = FrameReader(server, connections=1, **settings)
        made.extend((reader, server))
        return server, reader

    yield start
    for each in made:
        each.close()


def reply(number: int) -> bytes:
    data = frame(header(number), payload(number))
    return b"$%d\r\n%b\r\n" % (len(data), data)


def silent(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass


def test_server_that_says_nothing_costs_the_deadline_and_then_is_left_alone(serve):
    _, reader = serve(silent, open_s=WAIT_S)
    for _ in range(3):
        started = time.monotonic()
        (read,) = list(reader.fetch([FrameWant(header(1), memory())], started + 0.05))
        assert read.miss is Miss.TIMEOUT
        assert time.monotonic() - started < 5
    assert miss_of(reader, header(1)) is Miss.BREAKER
    assert not reader.stats().connected


def test_server_that_stops_in_the_middle_of_a_value_is_a_timeout(serve):
    def answer(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(reply(1)[:2000])
        silent(connection)

    _, reader = serve(answer)
    (read,) = list(reader.fetch([FrameWant(header(1), memory())], time.monotonic() + 0.2))
    assert read.miss is Miss.TIMEOUT


def test_connection_that_breaks_in_the_middle_is_made_again_and_the_frame_read(serve):
    def answer(connection: socket.socket) -> None:
        connection.recv(4096)
        if server.num_connections == 1:
            connection.sendall(reply(1)[:2000])
            connection.close()
        else:
            connection.sendall(reply(1))
            silent(connection)

    server, reader = serve(answer)
    into = memory()
    assert miss_of(reader, header(1), into) is None
    assert [bytes(piece) for piece in into] == payload(1)
    assert reader.stats().connected


def test_store_that_breaks_off_again_and_again_is_left_alone_and_tried_later(serve):
    answers = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.recv(4096)
        if answers.is_set():
            connection.sendall(reply(1))
            silent(connection)
        connection.close()

    _, reader = serve(answer, open_s=0.05)
    misses = [miss_of(reader, header(1)) for _ in range(3)]
    assert misses[0] is Miss.CONNECTION
    assert Miss.BREAKER in misses
    answers.set()
    give_up = time.monotonic() + WAIT_S
    while miss_of(reader, header(1)) is not None:
        assert time.monotonic() < give_up
    assert reader.stats().connected


def test_cancelled_fetch_ends_soon_and_the_reader_goes_on(serve):
    asked = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.recv(4096)
        asked.set()
        if server.num_connections == 1:
            silent(connection)
        else:
            connection.sendall(reply(1))
            silent(connection)

    server, reader = serve(answer)
    fetch = reader.fetch([FrameWant(header(i), memory()) for i in range(20)], soon())
    assert asked.wait(WAIT_S)
    started = time.monotonic()
    fetch.cancel()
    assert {read.miss for read in fetch} == {Miss.CANCELLED}
    assert time.monotonic() - started < 5
    assert miss_of(reader, header(1)) is None


def test_what_waits_behind_a_slow_fetch_ends_at_its_own_deadline(serve):
    _, reader = serve(silent)
    slow = reader.fetch([FrameWant(header(1), memory())], soon())
    (read,) = list(reader.fetch([FrameWant(header(2), memory())], time.monotonic() + 0.05))
    assert read.miss is Miss.TIMEOUT
    slow.cancel()
    assert [read.miss for read in slow] == [Miss.CANCELLED]


def test_server_that_is_no_redis_is_a_miss(serve):
    def answer(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    _, reader = serve(answer)
    assert miss_of(reader, header(1)) is Miss.CONNECTION


def test_value_of_absurd_length_is_passed_over(serve, monkeypatch):
    monkeypatch.setattr(reader_module, "MAX_VALUE_BYTES", 100)

    def answer(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(reply(1) + b"$-1\r\n")
        silent(connection)

    _, reader = serve(answer)
    reads = list(reader.fetch([FrameWant(header(i), memory()) for i in (1, 2)], soon()))
    assert [read.miss for read in reads] == [Miss.CHECKSUM, Miss.ABSENT]


def test_store_that_cannot_be_reached_is_a_miss(unused_tcp_port):
    reader = FrameReader(open_source(f"redis://127.0.0.1:{unused_tcp_port}"))
    assert miss_of(reader, header(1)) in (Miss.CONNECTION, Miss.BREAKER)
    reader.close()


def test_wrong_password_is_a_miss(kv_url):
    reader = FrameReader(open_source(f"redis://:wrong@{kv_url.split('@')[1]}"))
    assert miss_of(reader, header(1)) in (Miss.CONNECTION, Miss.BREAKER)
    reader.close()
