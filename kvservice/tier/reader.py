"""Reads frames of a tier into memory, several at a time. Knows nothing of engines, tensors or sessions.

    fetch ──► queue ──► a thread for each connection: GETs in a pipeline, one copy into the caller's memory, checksum,
                        decode ──► results, handed out in the order asked

Whatever goes wrong with a frame is a miss with a reason, and the memory it was to fill holds anything then. A store
that fails several times in a row is left alone for a while; until then, and until it has answered once, all that is
asked for is missed at once:

    closed ── MAX_FAULTS in a row ──► open ── open_s later ──► half-open: one frame is tried ──► closed, or open again
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import xxhash

from kvservice.errors import CorruptFrame, Unavailable
from kvservice.tier import codecs
from kvservice.tier.base import ValueSource
from kvservice.tier.header import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, FrameHeader
from kvservice.tier.sealing import Keyring, is_sealed
from kvservice.tier.stream import ValueStream
from kvservice.tier.wire import CHECKSUM, HEAD, decode_frame, pack_head

logger = logging.getLogger(__name__)

CONNECTIONS = 2
PIPELINE = 4
MAX_INFLIGHT_BYTES = 32 << 20
CONNECT_TIMEOUT_S = 2.0
MAX_TRIES = 2
MAX_FAULTS = 3
OPEN_S = 1.0
MAX_VALUE_BYTES = HEAD.size + MAX_HEADER_BYTES + MAX_PAYLOAD_BYTES + CHECKSUM.size


class Miss(enum.Enum):
    """Why a frame wasn't read."""

    TIMEOUT = "timeout"
    """Its deadline passed."""
    ABSENT = "absent"
    """The store doesn't have it (any more)."""
    CHECKSUM = "checksum"
    """It is damaged, or no frame at all."""
    VERSION = "version"
    """It is of a format, or has a codec, that this release doesn't know, or is sealed with a key that isn't here."""
    FINGERPRINT = "fingerprint"
    """It is a whole frame, but of another key, model, span or shape, or lossy where that isn't wanted."""
    BREAKER = "breaker"
    """The store has failed before, and is left alone."""
    OOM = "oom"
    """The store is out of memory."""
    CONNECTION = "connection"
    """The store can't be reached, refused, or broke off."""
    CANCELLED = "cancelled"
    """The fetch was cancelled, or the reader closed."""


_MISS_OF_CORRUPT = {"version": Miss.VERSION, "key": Miss.FINGERPRINT, "key_id": Miss.VERSION}


@dataclass(frozen=True, slots=True)
class FrameWant:
    """A frame to read.

    Attributes:
        header: what the frame must be; of its codec, only whether it is lossy must agree.
        into: memory for the raw payload, writable: a piece for each of the shape's first dimension, in order.
    """

    header: FrameHeader
    into: Sequence[memoryview]


@dataclass(frozen=True, slots=True)
class FrameRead:
    """What became of a frame.

    Attributes:
        index: its place among those asked for.
        miss: why its memory isn't filled; None: it is.
        seconds: from when the store was asked; 0 if it wasn't.
    """

    index: int
    miss: Miss | None
    seconds: float


@dataclass(frozen=True, slots=True)
class ReaderStats:
    """A reader's counters since it was made.

    Attributes:
        connected: it isn't leaving the store alone.
        read_frames: frames that were read whole.
        read_bytes: of the frames, as the store has them.
        busy_s: seconds in which at least one frame was under way.
        misses: frames that weren't read, by reason.
    """

    connected: bool
    read_frames: int = 0
    read_bytes: int = 0
    busy_s: float = 0.0
    misses: Mapping[str, int] = field(default_factory=dict)


class FrameFetch:
    """Frames on their way. Their memory is the reader's until each has its result."""

    def __init__(
        self, reader: FrameReader, num_frames: int, deadline: float, on_ready: Callable[[], None] | None
    ) -> None:
        self._reader = reader
        self._on_ready = on_ready
        self._results: list[FrameRead | None] = [None] * num_frames
        self._next = 0
        self._arrived = threading.Condition()
        self.deadline = deadline
        """Seconds of the reader's clock; earlier after `cancel`."""
        self.cancelled = False

    @property
    def is_done(self) -> bool:
        """Whether all results were handed out."""
        return self._next == len(self._results)

    def ready(self) -> list[FrameRead]:
        """The results that can be handed out now, in the order asked for. Never blocks."""
        self._end_late()
        with self._arrived:
            return self._take()

    def cancel(self) -> None:
        """Gives up what hasn't arrived: those frames are missed, soon. Never blocks."""
        self.cancelled = True
        self.deadline = float("-inf")
        self._end_late()

    def __iter__(self) -> Iterator[FrameRead]:
        """Each result in the order asked for, as it arrives. Blocks."""
        while not self.is_done:
            with self._arrived:
                # What is under way ends by itself soon after the deadline; what is queued may wait behind others.
                left = self._reader.seconds_until(self.deadline)
                self._arrived.wait_for(self._has_next, left if left > 0 else None)
                results = self._take()
            yield from results
            self._end_late()

    def _has_next(self) -> bool:
        return self._results[self._next] is not None

    def _end_late(self) -> None:
        if not self.is_done and self._reader.seconds_until(self.deadline) <= 0:
            self._reader.drop_late()

    def _take(self) -> list[FrameRead]:
        taken: list[FrameRead] = []
        while self._next < len(self._results) and (result := self._results[self._next]) is not None:
            taken.append(result)
            self._next += 1
        return taken

    def put(self, result: FrameRead) -> None:
        """Called by the reader, once for each frame."""
        with self._arrived:
            self._results[result.index] = result
            is_next = result.index == self._next
            if is_next:
                self._arrived.notify_all()
        if is_next and self._on_ready is not None:
            self._on_ready()


@dataclass(slots=True, eq=False)
class _Job:
    fetch: FrameFetch
    index: int
    want: FrameWant
    key: bytes = b""
    place: str = ""
    tries: int = 0
    asked_at: float = 0.0

    @property
    def num_bytes(self) -> int:
        return self.want.header.raw_bytes


class _Circuit(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class FrameReader:
    """Threads with a connection each, which read frames. `fetch` may be called from any thread and never blocks.

    Args:
        source: where connections come from.
        connections: as many threads, and connections to each server of the store.
        pipeline: frames asked for at a time on a connection.
        max_inflight_bytes: raw bytes of the frames under way; a frame that is larger goes alone.
        open_s: pause before a store that failed is tried again.
        clock: seconds that never go back; deadlines are on it.
        keyring: to open sealed frames with; without one they are missed.
    """

    def __init__(
        self,
        source: ValueSource,
        *,
        connections: int = CONNECTIONS,
        pipeline: int = PIPELINE,
        max_inflight_bytes: int = MAX_INFLIGHT_BYTES,
        open_s: float = OPEN_S,
        clock: Callable[[], float] = time.monotonic,
        keyring: Keyring | None = None,
    ) -> None:
        self._source = source
        self._keyring = keyring
        self._pipeline = pipeline
        self._max_inflight_bytes = max_inflight_bytes
        self._open_s = open_s
        self._clock = clock
        # One lock for all below; `_changed` wakes threads that wait for something to read.
        self._changed = threading.Condition()
        self._queue: deque[_Job] = deque()
        self._inflight_bytes = 0
        self._circuit = _Circuit.CLOSED
        self._faults = 0
        self._open_until = 0.0
        self._closing = False
        self._read_frames = self._read_bytes = 0
        self._busy_s = self._busy_since = 0.0
        self._misses: Counter[str] = Counter()
        self._threads = [
            threading.Thread(target=self._run, name=f"kv-read-{index}", daemon=True) for index in range(connections)
        ]
        for thread in self._threads:
            thread.start()

    def fetch(
        self, wants: Sequence[FrameWant], deadline: float, on_ready: Callable[[], None] | None = None
    ) -> FrameFetch:
        """Asks for frames.

        Args:
            wants: in the order in which they are needed. Their memory must stay, untouched, until each has its result.
            deadline: what hasn't arrived by then is missed.
            on_ready: called from a reader's thread when there may be something `ready`; must neither block nor raise.
        """
        fetch = FrameFetch(self, len(wants), deadline, on_ready)
        jobs = [_Job(fetch, index, want) for index, want in enumerate(wants)]
        with self._changed:
            if self._circuit is _Circuit.OPEN and self._clock() >= self._open_until:
                self._circuit = _Circuit.HALF_OPEN
            miss = self._refusal()
            if miss is None:
                self._queue.extend(jobs)
                self._changed.notify_all()
        if miss is not None:
            self._miss(jobs, miss)
        return fetch

    def stats(self) -> ReaderStats:
        """See `ReaderStats`."""
        with self._changed:
            return ReaderStats(
                connected=self._circuit is _Circuit.CLOSED and not self._closing,
                read_frames=self._read_frames,
                read_bytes=self._read_bytes,
                busy_s=self._busy_s,
                misses=dict(self._misses),
            )

    def seconds_until(self, deadline: float) -> float:
        """From now, on the reader's clock."""
        return deadline - self._clock()

    def drop_late(self) -> None:
        """Ends what is queued of fetches that were cancelled or whose deadline has passed."""
        now = self._clock()
        with self._changed:
            late = [job for job in self._queue if job.fetch.deadline <= now]
            self._queue = deque(job for job in self._queue if job.fetch.deadline > now)
        self._miss_late(late)

    def close(self) -> None:
        """Gives up what hasn't arrived, ends the threads and closes their connections. Blocks for a moment."""
        with self._changed:
            self._closing = True
            queued = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        self._miss(queued, Miss.CANCELLED)
        for thread in self._threads:
            thread.join()

    def _refusal(self) -> Miss | None:
        if self._closing:
            return Miss.CANCELLED
        return Miss.BREAKER if self._circuit is _Circuit.OPEN else None

    # Below: the reader's threads.

    def _run(self) -> None:
        connection = _Connection(self._source, self._clock, self._keyring)
        under_way: deque[_Job] = deque()
        try:
            while (jobs := self._next_jobs(under_way)) is not None:
                self._serve(connection, under_way, jobs)
        finally:
            connection.close()

    def _serve(self, connection: _Connection, under_way: deque[_Job], jobs: list[_Job]) -> None:
        """Asks for `jobs`, and reads the first frame that is under way."""
        under_way.extend(jobs)
        try:
            if jobs:
                connection.ask(jobs)
            job = under_way[0]
            miss = connection.read(job)
        except (Unavailable, OSError) as error:
            lost = list(under_way)
            under_way.clear()
            self._fail(connection, lost, error)
        except Exception:
            # A thread that reads must live: what it was at is missed, and the next is tried.
            logger.exception("read_failed")
            lost = list(under_way)
            under_way.clear()
            self._fail(connection, lost, OSError("a fault of ours"))
        else:
            under_way.popleft()
            self._end(job, miss, connection.last_bytes)

    def _next_jobs(self, under_way: deque[_Job]) -> list[_Job] | None:
        """What to ask for besides what is under way; None when the reader is closed. Waits while there is nothing."""
        while True:
            late: list[_Job] = []
            with self._changed:
                while not (jobs := self._take_jobs(len(under_way), late)) and not under_way and not late:
                    if self._closing:
                        return None
                    self._changed.wait()
            self._miss_late(late)
            if jobs or under_way:
                return jobs

    def _take_jobs(self, num_under_way: int, late: list[_Job]) -> list[_Job]:
        # While it isn't known whether the store is back, one frame finds out.
        limit = self._pipeline if self._circuit is _Circuit.CLOSED else int(self._inflight_bytes == 0)
        if num_under_way > limit // 2:
            # A few at a time: each time costs a system call, and may cost a switch to the store and back.
            return []
        now = self._clock()
        jobs: list[_Job] = []
        while self._queue and num_under_way + len(jobs) < limit:
            job = self._queue[0]
            if job.fetch.deadline <= now:
                late.append(self._queue.popleft())
                continue
            if self._inflight_bytes and self._inflight_bytes + job.num_bytes > self._max_inflight_bytes:
                break
            jobs.append(self._queue.popleft())
            self._busy_since = self._busy_since if self._inflight_bytes else now
            self._inflight_bytes += job.num_bytes
            job.tries += 1
            job.asked_at = now
        return jobs

    def _end(self, job: _Job, miss: Miss | None, num_bytes: int) -> None:
        """A frame was answered for."""
        now = self._clock()
        with self._changed:
            self._release(job, now)
            self._faults = 0
            self._circuit = _Circuit.CLOSED
            if miss is None:
                self._read_frames += 1
                self._read_bytes += num_bytes
            else:
                self._misses[miss.value] += 1
        job.fetch.put(FrameRead(job.index, miss, now - job.asked_at))

    def _fail(self, connection: _Connection, lost: list[_Job], error: Unavailable | OSError) -> None:
        """The connection is of no more use. What was under way on it is tried once more, if there is time."""
        is_late = isinstance(error, TimeoutError)
        # A deadline may be shorter than a good store takes; one that says nothing at all is another matter.
        counts = not is_late or not connection.has_answered
        connection.drop()
        reason = error.reason if isinstance(error, Unavailable) else "timeout" if is_late else "connection"
        if reason == "moved":
            self._look_again()
        now = self._clock()
        with self._changed:
            for job in lost:
                self._release(job, now)
                # One that waited behind a late one has not had its try.
                job.tries -= is_late
            if counts and not all(job.fetch.cancelled for job in lost):
                self._faults += 1
                if self._faults >= MAX_FAULTS or self._circuit is _Circuit.HALF_OPEN:
                    logger.warning("store_is_left_alone", extra={"reason": reason})
                    self._circuit = _Circuit.OPEN
                    self._open_until = now + self._open_s
            again = [job for job in lost if self._may_retry(job, now)]
            given_up = list(self._queue) if self._circuit is _Circuit.OPEN else []
            if given_up:
                self._queue.clear()
            self._queue.extendleft(reversed(again))
            self._changed.notify_all()
        for job in lost:
            if job not in again:
                self._miss([job], self._miss_of(job, reason, now))
        self._miss(given_up, Miss.BREAKER)

    def _may_retry(self, job: _Job, now: float) -> bool:
        return self._refusal() is None and job.tries < MAX_TRIES and job.fetch.deadline > now

    def _miss_late(self, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            self._miss([job], Miss.CANCELLED if job.fetch.cancelled else Miss.TIMEOUT)

    def _miss_of(self, job: _Job, reason: str, now: float) -> Miss:
        if job.fetch.cancelled or self._closing:
            return Miss.CANCELLED
        if job.fetch.deadline <= now or reason == "timeout":
            return Miss.TIMEOUT
        return Miss.OOM if reason == "oom" else Miss.CONNECTION

    def _look_again(self) -> None:
        try:
            self._source.refresh()
        except Unavailable as error:
            logger.warning("store_cannot_be_looked_up", extra={"reason": error.reason})

    def _release(self, job: _Job, now: float) -> None:
        self._inflight_bytes -= job.num_bytes
        if not self._inflight_bytes:
            self._busy_s += now - self._busy_since
        if self._queue or self._closing:
            # Others may wait for room.
            self._changed.notify_all()

    def _miss(self, jobs: Sequence[_Job], miss: Miss) -> None:
        """Ends frames that aren't under way."""
        if not jobs:
            return
        with self._changed:
            self._misses[miss.value] += len(jobs)
        for job in jobs:
            job.fetch.put(FrameRead(job.index, miss, 0.0))


class _Connection:
    """What one thread reads from: a stream to each server that it has read from."""

    def __init__(self, source: ValueSource, clock: Callable[[], float], keyring: Keyring | None) -> None:
        self._source = source
        self._clock = clock
        self._keyring = keyring
        self._streams: dict[str, ValueStream] = {}
        self._received_before = 0
        self._last: ValueStream | None = None
        self.last_bytes = 0
        """Of the frame read last."""

    @property
    def has_answered(self) -> bool:
        """Whether any byte came since something was asked for last."""
        return self._last is not None and self._last.num_received > self._received_before

    def ask(self, jobs: Sequence[_Job]) -> None:
        self._last = None
        for job in jobs:
            job.key = job.want.header.key
            job.place = self._source.place_of(job.key)
        for place in dict.fromkeys(job.place for job in jobs):
            here = [job for job in jobs if job.place == place]
            if place not in self._streams:
                timeout_s = min(CONNECT_TIMEOUT_S, max(0.001, here[0].fetch.deadline - self._clock()))
                self._streams[place] = ValueStream(self._source.connect(place, timeout_s), self._clock)
            self._last = self._streams[place]
            self._received_before = self._last.num_received
            self._last.ask([job.key for job in here], _deadline_of(here[0]))

    def read(self, job: _Job) -> Miss | None:
        """Reads a frame's answer into its memory: of those asked for and not read, the first of its place.

        Raises:
            Unavailable: the server refused.
            OSError: the connection broke, or the deadline passed.
        """
        self._last = stream = self._streams[job.place]
        deadline = _deadline_of(job)
        length = stream.length(deadline)
        self.last_bytes = length or 0
        if length is None:
            return Miss.ABSENT
        if length > MAX_VALUE_BYTES:
            stream.skip(length, deadline)
            stream.end(deadline)
            return Miss.CHECKSUM
        head = _head_of(job.want.header, job.key, length)
        found = stream.take(min(length, len(head)), deadline)
        if found == head and length >= len(head) + CHECKSUM.size:
            return self._read_payload(job, head, length - len(head) - CHECKSUM.size, deadline)
        whole = bytearray(length)
        whole[: len(found)] = found
        stream.fill([memoryview(whole)[len(found) :]], deadline)
        stream.end(deadline)
        return _decode(job.want, whole, self._keyring)

    def _read_payload(self, job: _Job, head: bytes, stored_bytes: int, deadline: Callable[[], float]) -> Miss | None:
        stream, want = self._streams[job.place], job.want
        is_raw = want.header.codec == "raw"
        pieces = want.into if is_raw else (memoryview(bytearray(stored_bytes)),)
        if sum(map(len, pieces)) != stored_bytes:
            # The frame has other bytes than it says.
            stream.skip(stored_bytes + CHECKSUM.size, deadline)
            stream.end(deadline)
            return Miss.CHECKSUM
        stream.fill(pieces, deadline)
        digest = xxhash.xxh3_64(head)
        for piece in pieces:
            digest.update(piece)
        (expected,) = CHECKSUM.unpack(stream.take(CHECKSUM.size, deadline))
        stream.end(deadline)
        if digest.intdigest() != expected:
            return Miss.CHECKSUM
        return None if is_raw else _undo(want.header, pieces[0], want.into)

    def drop(self) -> None:
        """Closes what can't be used any more: on each stream something may be under way."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()

    close = drop


def _deadline_of(job: _Job) -> Callable[[], float]:
    """The deadline as it is when it is looked at: a fetch may be cancelled."""
    return lambda: job.fetch.deadline


def _head_of(header: FrameHeader, key: bytes, length: int) -> bytes:
    """What a value of `length` bytes begins with if it is the frame as wanted."""
    if header.codec == "raw":
        return pack_head(header, header.raw_bytes, key)
    if header.codec != "zstd":
        stored = codecs.expected_bytes(header.codec, header.role, header.shape, header.dtype)
        return pack_head(header, int(stored), key)
    # Nobody knows its size, but all heads are as long.
    stored = length - len(pack_head(header, 1, key)) - CHECKSUM.size
    return pack_head(header, min(max(stored, 1), MAX_PAYLOAD_BYTES), key)


def _decode(want: FrameWant, value: bytearray, keyring: Keyring | None) -> Miss | None:
    """Reads a frame that doesn't begin as expected: sealed, of another version or codec, or not the right one."""
    try:
        header, stored = decode_frame(want.header.key, value)
        if is_sealed(header) and keyring is not None:
            header, stored = keyring.open(header, stored)
    except CorruptFrame as error:
        return _MISS_OF_CORRUPT.get(error.reason, Miss.CHECKSUM)
    if header.codec not in codecs.CODECS:
        return Miss.VERSION
    alike = replace(
        header, codec=want.header.codec, codec_params=want.header.codec_params, tag_key_id=want.header.tag_key_id
    )
    if alike != want.header or not (header.codec == want.header.codec or header.codec in codecs.LOSSLESS):
        return Miss.FINGERPRINT
    return _undo(header, stored, want.into)


def _undo(header: FrameHeader, stored: memoryview, into: Sequence[memoryview]) -> Miss | None:
    try:
        codecs.decode(header, stored, into)
    except CorruptFrame:
        return Miss.CHECKSUM
    return None
