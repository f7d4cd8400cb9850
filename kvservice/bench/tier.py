"""How fast frames are written to a tier and read back, beside what the server's own benchmark reaches.

Frames go the way of the service: encoded and written by a `WriteBehind`, read by a `FrameReader` into memory that is
there already, checksums and all. `redis-benchmark` does no more than to send and to throw away.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kvservice.errors import KVServiceError, Unavailable
from kvservice.tier.base import open_source, open_tier
from kvservice.tier.header import FrameHeader, FrameRole, chunk_hash
from kvservice.tier.reader import FrameReader, FrameWant
from kvservice.tier.wire import CHECKSUM, pack_head
from kvservice.tier.writer import WriteBehind
from kvservice.types import SessionId

PIECE_BYTES = 48 << 10
"""Memory is filled in pieces: about that of a group of the small model in a layer."""
SET_BYTES = 64 << 20
"""Of the frames that are read again and again."""
TIMEOUT_S = 120.0
BENCHMARK = "redis-benchmark"
BENCHMARK_KEY = b"key:__rand_int__"


@dataclass(frozen=True, slots=True)
class TierRow:
    """One size of value and one number of connections; figures are medians over rounds.

    Attributes:
        value_bytes: of a frame, all in all.
        connections: that frames are read by.
        pipeline: frames asked for at a time on each.
        read_gb_per_s: 10^9 bytes of frames, read and checked.
        write_gb_per_s: the same, encoded and written. Always by one connection.
        read_ms_p50: from asking for a frame to having it, those before it in the pipeline included.
        read_ms_p99: the same.
        benchmark_read_gb_per_s: of redis-benchmark's GET with the same connections and pipeline; None: it wasn't run.
        benchmark_write_gb_per_s: of its SET.
        read_ratio: ours to that.
    """

    value_bytes: int
    connections: int
    pipeline: int
    read_gb_per_s: float
    write_gb_per_s: float
    read_ms_p50: float
    read_ms_p99: float
    benchmark_read_gb_per_s: float | None
    benchmark_write_gb_per_s: float | None
    read_ratio: float | None


def find_redis_benchmark() -> Path | None:
    """The redis-benchmark on PATH, or beside this Python."""
    beside = Path(sys.executable).parent / BENCHMARK
    found = shutil.which(BENCHMARK)
    return Path(found) if found else beside if os.access(beside, os.X_OK) else None


def measure_tier(
    url: str,
    value_bytes: int,
    connections: int,
    *,
    pipeline: int,
    rounds: int,
    read_bytes: int,
    benchmark: Path | None,
) -> TierRow:
    """Writes frames, reads them back, and lets redis-benchmark do the same, in turns. Leaves nothing there. Blocks.

    Args:
        url: of the tier.
        value_bytes: of each frame.
        connections: to read by.
        pipeline: frames asked for at a time on each.
        rounds: how often each has its turn.
        read_bytes: that each reads in a turn, at least.
        benchmark: redis-benchmark; None to do without.

    Raises:
        Unavailable: the tier can't be reached, or lost frames.
        KVServiceError: redis-benchmark failed.
    """
    tag, session = secrets.token_bytes(16), SessionId(f"bench-{secrets.token_hex(8)}")
    headers = _headers(tag, session, value_bytes, max(2, SET_BYTES // value_bytes))
    # The same for all: what lies in a frame makes no difference to any of this.
    payload = hashlib.shake_128(b"kvservice").digest(headers[0].raw_bytes)
    repeats = -(-read_bytes // (value_bytes * len(headers)))
    memory = [bytearray(len(payload)) for _ in headers]
    wants = [FrameWant(header, _pieces(each)) for header, each in zip(headers, memory, strict=True)] * repeats
    reads: list[float] = []
    writes: list[float] = []
    theirs: list[tuple[float, float]] = []
    seconds: list[float] = []
    with _writer(url) as writer, _reader(url, connections, pipeline) as reader:
        try:
            for _ in range(rounds):
                writes.append(_timed(lambda: _write(writer, headers, payload), value_bytes * len(headers)))
                reads.append(_timed(lambda: seconds.extend(_read(reader, wants)), value_bytes * len(wants)))
                if benchmark is not None:
                    count = max(connections * pipeline, len(wants))
                    theirs.append(_run_benchmark(benchmark, url, value_bytes, connections, pipeline, count))
        finally:
            writer.delete_session(tag, session)
            writer.flush(TIMEOUT_S)
    if any(bytes(each) != payload for each in memory):
        raise KVServiceError("frames read back aren't those written")
    read = statistics.median(reads)
    their_write, their_read = (statistics.median(column) for column in zip(*theirs, strict=True)) if theirs else (0, 0)
    centiles = statistics.quantiles(seconds, n=100, method="inclusive")
    return TierRow(
        value_bytes=value_bytes,
        connections=connections,
        pipeline=pipeline,
        read_gb_per_s=read,
        write_gb_per_s=statistics.median(writes),
        read_ms_p50=centiles[49] * 1000,
        read_ms_p99=centiles[98] * 1000,
        benchmark_read_gb_per_s=their_read if theirs else None,
        benchmark_write_gb_per_s=their_write if theirs else None,
        read_ratio=read / their_read if theirs else None,
    )


def _headers(tag: bytes, session: SessionId, value_bytes: int, count: int) -> list[FrameHeader]:
    def header(index: int, num_bytes: int) -> FrameHeader:
        return FrameHeader(
            tenant_tag=tag,
            session_id=session,
            fingerprint=bytes(16),
            layer_group=0,
            role=FrameRole.KV,
            chunk_hash=chunk_hash(tag, b"", [index]),
            start=index,
            stop=index + 1,
            shape=(num_bytes,),
            dtype="uint8",
        )

    payload_bytes = value_bytes - len(pack_head(header(0, 1), 1)) - CHECKSUM.size
    return [header(index, payload_bytes) for index in range(count)]


def _pieces(memory: bytearray) -> list[memoryview]:
    view = memoryview(memory)
    return [view[start : start + PIECE_BYTES] for start in range(0, len(view), PIECE_BYTES)]


@contextlib.contextmanager
def _writer(url: str) -> Iterator[WriteBehind]:
    writer = WriteBehind(open_tier(url))
    writer.start()
    try:
        yield writer
    finally:
        writer.close(TIMEOUT_S)


@contextlib.contextmanager
def _reader(url: str, connections: int, pipeline: int) -> Iterator[FrameReader]:
    reader = FrameReader(open_source(url), connections=connections, pipeline=pipeline)
    try:
        yield reader
    finally:
        reader.close()


def _write(writer: WriteBehind, headers: Sequence[FrameHeader], payload: bytes) -> None:
    for header in headers:
        while not writer.submit(header, [payload]):
            writer.wait_for_room(len(payload), TIMEOUT_S)
    if not writer.flush(TIMEOUT_S) or writer.stats().failures:
        raise Unavailable(f"frames weren't written: {dict(writer.stats().failures)}")


def _read(reader: FrameReader, wants: Sequence[FrameWant]) -> list[float]:
    reads = list(reader.fetch(wants, time.monotonic() + TIMEOUT_S))
    missed = [read.miss.value for read in reads if read.miss is not None]
    if missed:
        raise Unavailable(f"{len(missed)} of {len(reads)} frames weren't read, the first for: {missed[0]}")
    return [read.seconds for read in reads]


def _timed(work: Callable[[], None], num_bytes: int) -> float:
    started = time.perf_counter()
    work()
    return num_bytes / (time.perf_counter() - started) / 1e9


def _run_benchmark(
    benchmark: Path, url: str, value_bytes: int, connections: int, pipeline: int, count: int
) -> tuple[float, float]:
    """GB/s of SET and of GET."""
    parts = urlsplit(url)
    command = [str(benchmark), "-h", parts.hostname or "127.0.0.1", "-p", str(parts.port or 6379), "--csv"]
    command += ["-t", "set,get", "-d", str(value_bytes), "-c", str(connections), "-P", str(pipeline), "-n", str(count)]
    if parts.password:
        command += ["-a", unquote(parts.password)]
    if parts.username:
        command += ["--user", unquote(parts.username)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    rates = {row[0]: float(row[1]) for row in csv.reader(done.stdout.splitlines()) if row[:1] in (["SET"], ["GET"])}
    if done.returncode or rates.keys() != {"SET", "GET"}:
        raise KVServiceError(f"{benchmark} ended with {done.returncode}: {done.stderr[-300:].strip()}")
    return rates["SET"] * value_bytes / 1e9, rates["GET"] * value_bytes / 1e9
