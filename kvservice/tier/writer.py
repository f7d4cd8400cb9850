"""Writes frames to a tier behind the engine's back. Knows nothing of engines, tensors or Redis.

    engine thread ── submit ──► bounded queue ──► mover thread: encode, put_many ──► tier

What it writes is a copy of KV that lies elsewhere, so a tier that fails costs nothing but that copy. While the tier
is healthy nothing is dropped: `has_room` says when the engine must wait. When it fails, a circuit opens:

    closed ── tries used up ──► open ── open_s later ──► half-open: one probe ──► closed, or open again

and while it isn't closed frames are given up at once, so a dead tier never holds up the engine. Deletions are never
given up: they wait until the tier is back, or until all that they would delete has expired.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import xxhash

from kvservice.errors import InternalError, Unavailable
from kvservice.tier import codecs
from kvservice.tier.base import Buffer, TierBackend
from kvservice.tier.header import FrameHeader
from kvservice.tier.sealing import Keyring
from kvservice.tier.wire import encode_frame
from kvservice.types import SessionId

logger = logging.getLogger(__name__)

DEFAULT_TTL_S = 3600.0
MAX_PENDING_BYTES = 64 << 20
BATCH_BYTES = 8 << 20
MAX_TRIES = 2
RETRY_S = 0.1
OPEN_S = 1.0
PROBE_KEY = b"kv1:probe"

Done = Callable[[bool], None]


class _Circuit(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class WriterStats:
    """A writer's counters since it was started.

    Attributes:
        connected: the tier did what it was last asked for.
        stored_bytes: written, not deleted, and not yet past its time; frames that the tier evicted count too.
        failures: frames that were not written, by reason: that of their last try, `breaker` while the circuit wasn't
            closed, `closed` at the end, `frame` for one that could not be encoded.
        faults: round trips that failed, retries and probes included, by reason.
    """

    connected: bool
    written_frames: int = 0
    written_bytes: int = 0
    stored_bytes: int = 0
    pending_frames: int = 0
    pending_bytes: int = 0
    pending_deletions: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    faults: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Put:
    header: FrameHeader
    payload: tuple[memoryview, ...]
    num_bytes: int
    on_done: Done | None

    def done(self, written: bool) -> None:
        if self.on_done is not None:
            self.on_done(written)


@dataclass(frozen=True, slots=True)
class _Delete:
    tenant_tag: bytes
    session_id: SessionId
    useless_at: float


class WriteBehind:
    """A queue of frames and the thread that writes them to one tier.

    `submit`, `has_room`, `delete_session`, `bytes_of` and `stats` may be called from any thread and never block.

    Args:
        backend: used by the mover thread alone from `start` on, and closed by it.
        ttl_s: how long a frame is kept.
        max_pending_bytes: payload bytes that may wait or be on their way.
        open_s: pause before a tier that failed is tried again.
        clock: seconds that never go back.
        keyring: to seal payloads with; None: they aren't sealed.
    """

    def __init__(
        self,
        backend: TierBackend,
        *,
        ttl_s: float = DEFAULT_TTL_S,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        open_s: float = OPEN_S,
        clock: Callable[[], float] = time.monotonic,
        keyring: Keyring | None = None,
    ) -> None:
        self._backend = backend
        self._keyring = keyring
        self._ttl_s = ttl_s
        self._max_pending_bytes = max_pending_bytes
        self._open_s = open_s
        self._clock = clock
        # One lock for all below; `_changed` wakes who waits for room or for the end of the work.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._jobs: deque[_Put | _Delete] = deque()
        self._circuit = _Circuit.OPEN
        self._closing = False
        self._counts = _Counts()
        self._ledger = _Ledger(ttl_s)
        # Made by the mover thread, in its event loop.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._close_now = asyncio.Event()
        self._thread: threading.Thread | None = None

    @property
    def ttl_s(self) -> float:
        """How long a frame is kept."""
        return self._ttl_s

    def start(self) -> None:
        """Starts the mover thread and waits until the tier has answered once.

        Raises:
            Unavailable: it doesn't answer; the thread has ended.
        """
        reached: Future[None] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._move(reached)), name="kv-write-behind", daemon=True
        )
        self._thread.start()
        try:
            reached.result()
        except BaseException:
            self._thread.join()
            raise

    def has_room(self, num_bytes: int) -> bool:
        """Whether `submit` would take a payload of `num_bytes` now.

        While the circuit isn't closed it takes anything, since it gives everything up.
        """
        with self._lock:
            return self._has_room(num_bytes)

    def wait_for_room(self, num_bytes: int, timeout_s: float) -> None:
        """Waits until `has_room`, at most `timeout_s`. Blocks."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_room(num_bytes), timeout_s)

    def submit(self, header: FrameHeader, payload: Buffer | Sequence[Buffer], on_done: Done | None = None) -> bool:
        """Takes a frame to be written; False if there is no room for it now, and then nothing has happened.

        The raw payload, whole or in pieces, is encoded by the header's codec when its turn comes. It is lent: it must
        not change until `on_done` was called. `on_done(written)` is called exactly once for each frame taken, from the
        mover thread or, when the frame is given up at once, from within this call. It must neither block nor raise.
        """
        pieces = [payload] if isinstance(payload, Buffer) else payload
        views = tuple(memoryview(piece).cast("B") for piece in pieces)
        put = _Put(header, views, sum(map(len, views)), on_done)
        with self._lock:
            if self._closing or self._circuit is not _Circuit.CLOSED:
                self._counts.failures["closed" if self._closing else "breaker"] += 1
                taken = False
            elif not self._has_room(put.num_bytes):
                return False
            else:
                self._jobs.append(put)
                self._counts.pending_frames += 1
                self._counts.pending_bytes += put.num_bytes
                taken = True
        if taken:
            self._call_mover(self._wake)
        else:
            put.done(False)
        return True

    def delete_session(self, tenant_tag: bytes, session_id: SessionId) -> None:
        """Deletes all frames of a session from the tier, those included that were submitted before.

        What is still pending when the writer closes is left to expire.
        """
        with self._lock:
            self._jobs.append(_Delete(tenant_tag, session_id, self._clock() + self._ttl_s))
        self._call_mover(self._wake)

    def bytes_of(self, tenant_tag: bytes, session_id: SessionId) -> int:
        """Bytes of a session's frames that this writer has written, less what it has deleted."""
        with self._lock:
            return self._ledger.bytes_of((tenant_tag, session_id))

    def stats(self) -> WriterStats:
        """See `WriterStats`."""
        with self._lock:
            counts = self._counts
            return WriterStats(
                connected=self._circuit is _Circuit.CLOSED and not self._closing,
                written_frames=counts.written_frames,
                written_bytes=counts.written_bytes,
                stored_bytes=self._ledger.total_bytes,
                pending_frames=counts.pending_frames,
                pending_bytes=counts.pending_bytes,
                pending_deletions=sum(isinstance(job, _Delete) for job in self._jobs),
                failures=dict(counts.failures),
                faults=dict(counts.faults),
            )

    def flush(self, timeout_s: float) -> bool:
        """Waits until no frame and no deletion is pending. False if some still are after `timeout_s`. Blocks."""
        with self._changed:
            return self._changed.wait_for(self._is_idle, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Writes what is pending for at most `timeout_s`, gives up the rest, ends the thread. Blocks."""
        if self._thread is None:
            return
        with self._lock:
            self._closing = True
        self._call_mover(self._wake)
        self._thread.join(timeout_s)
        self._call_mover(self._close_now)
        self._thread.join()

    def _has_room(self, num_bytes: int) -> bool:
        pending = self._counts.pending_bytes
        # A payload over the bound passes when it is alone: it could never pass otherwise.
        return self._circuit is not _Circuit.CLOSED or not pending or pending + num_bytes <= self._max_pending_bytes

    def _is_idle(self) -> bool:
        return self._counts.pending_frames == 0 and not self._jobs and not self._counts.is_deleting

    def _call_mover(self, event: asyncio.Event) -> None:
        with self._lock:
            # The mover takes its loop away under the lock before it closes it.
            if self._loop is not None:
                self._loop.call_soon_threadsafe(event.set)

    # Below: the mover thread.

    async def _move(self, reached: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            try:
                await self._backend.get_many([PROBE_KEY])
            except Unavailable as error:
                reached.set_exception(error)
                return
            self._set_circuit(_Circuit.CLOSED)
            reached.set_result(None)
            drain = asyncio.create_task(self._drain_until_closed())
            close_now = asyncio.create_task(self._close_now.wait())
            await asyncio.wait((drain, close_now), return_when=asyncio.FIRST_COMPLETED)
            for task in (drain, close_now):
                task.cancel()
            await asyncio.gather(drain, close_now, return_exceptions=True)
        finally:
            with self._lock:
                self._closing = True
            self._give_up_waiting("closed")
            await self._backend.aclose()
            with self._lock:
                self._jobs.clear()
                self._counts.is_deleting = False
                self._loop = None
                self._changed.notify_all()
            if not reached.done():
                reached.set_exception(InternalError("the thread that writes to the tier ended at once"))

    async def _drain_until_closed(self) -> None:
        while True:
            try:
                await self._drain()
            except Exception:
                # This loop must live: whatever a job does wrong, the next one is tried.
                logger.exception("write_behind_failed")
                with self._lock:
                    self._counts.faults["internal"] += 1
                continue
            if self._closing:
                return
            await self._wake.wait()
            self._wake.clear()

    async def _drain(self) -> None:
        """Carries out what waits, until nothing does or, on closing, the tier is away."""
        while True:
            if self._circuit is not _Circuit.CLOSED and not await self._probed():
                return
            job = self._next_job()
            if job is None:
                return
            if isinstance(job, _Delete):
                await self._delete(job)
            else:
                await self._write(job)

    async def _probed(self) -> bool:
        """Waits for the tier to come back; False if the writer is being closed."""
        while not self._closing:
            try:
                await asyncio.wait_for(self._until_closing(), self._open_s)
            except TimeoutError:
                self._set_circuit(_Circuit.HALF_OPEN)
                reason = await self._tried(lambda: self._backend.get_many([PROBE_KEY]), tries=1)
                self._set_circuit(_Circuit.CLOSED if reason is None else _Circuit.OPEN)
                if reason is None:
                    logger.info("tier_is_back")
                    return True
        return False

    async def _until_closing(self) -> None:
        while not self._closing:
            await self._wake.wait()
            self._wake.clear()

    async def _write(self, puts: list[_Put]) -> None:
        frames: list[tuple[bytes, Buffer]] = []
        encoded: list[_Put] = []
        for put in puts:
            try:
                frames.append((put.header.key, self._encoded(put)))
                encoded.append(put)
            except InternalError:
                logger.exception("frame_not_encoded")
                self._end([put], "frame")
        reason: str | None = "internal"
        try:
            reason = await self._tried(lambda: self._backend.put_many(frames, self._ttl_s), tries=MAX_TRIES)
        except asyncio.CancelledError:
            reason = "closed"
            raise
        finally:
            if reason is None:
                self._note_written(encoded, frames)
            else:
                # Before the frames' owners are told, so that they can't put more in the queue.
                self._set_circuit(_Circuit.OPEN)
            self._end(encoded, reason)
        if reason is not None:
            self._break(reason)

    def _encoded(self, put: _Put) -> bytearray:
        stored = codecs.encode(put.header, put.payload)
        if self._keyring is None:
            return encode_frame(put.header, stored)
        return encode_frame(*self._keyring.seal(put.header, stored))

    async def _delete(self, job: _Delete) -> None:
        reason: str | None = "internal"
        try:
            if job.useless_at <= self._clock():
                reason = None
            else:
                reason = await self._tried(
                    lambda: self._backend.delete_session(job.tenant_tag, job.session_id), tries=MAX_TRIES
                )
        finally:
            with self._lock:
                self._counts.is_deleting = False
                if reason is None:
                    self._ledger.drop((job.tenant_tag, job.session_id))
                else:
                    self._jobs.appendleft(job)
                    self._circuit = _Circuit.OPEN
                self._changed.notify_all()
        if reason is not None:
            self._break(reason)

    async def _tried(self, call: Callable[[], Awaitable[object]], tries: int) -> str | None:
        """Does something up to `tries` times; the reason of the last failure, or None."""
        for left in reversed(range(tries)):
            try:
                await call()
                return None
            except Unavailable as error:
                reason = error.reason
                with self._lock:
                    self._counts.faults[reason] += 1
            if left:
                await asyncio.sleep(RETRY_S)
        return reason

    def _break(self, reason: str) -> None:
        logger.warning("tier_is_away", extra={"reason": reason})
        self._set_circuit(_Circuit.OPEN)
        self._give_up_waiting("breaker")

    def _set_circuit(self, circuit: _Circuit) -> None:
        with self._lock:
            self._circuit = circuit

    def _next_job(self) -> list[_Put] | _Delete | None:
        """Takes the oldest deletion, or the oldest frames up to BATCH_BYTES."""
        with self._lock:
            if self._jobs and isinstance(oldest := self._jobs[0], _Delete):
                self._jobs.popleft()
                self._counts.is_deleting = True
                return oldest
            puts: list[_Put] = []
            batch_bytes = 0
            while self._jobs and isinstance(put := self._jobs[0], _Put):
                if puts and batch_bytes + put.num_bytes > BATCH_BYTES:
                    break
                puts.append(put)
                batch_bytes += put.num_bytes
                self._jobs.popleft()
            return puts or None

    def _give_up_waiting(self, reason: str) -> None:
        """Ends all frames that wait; deletions stay."""
        with self._lock:
            puts = [job for job in self._jobs if isinstance(job, _Put)]
            self._jobs = deque(job for job in self._jobs if isinstance(job, _Delete))
        self._end(puts, reason)

    def _note_written(self, puts: list[_Put], frames: list[tuple[bytes, Buffer]]) -> None:
        now = self._clock()
        with self._lock:
            for put, (key, frame) in zip(puts, frames, strict=True):
                self._counts.written_frames += 1
                self._counts.written_bytes += len(frame)
                self._ledger.add((put.header.tenant_tag, put.header.session_id), key, len(frame), now)

    def _end(self, puts: list[_Put], reason: str | None) -> None:
        """Tells the owners of frames that they are written or, if there is a reason, that they are not."""
        try:
            for put in puts:
                put.done(reason is None)
        finally:
            with self._lock:
                self._counts.pending_frames -= len(puts)
                self._counts.pending_bytes -= sum(put.num_bytes for put in puts)
                if reason is not None and puts:
                    self._counts.failures[reason] += len(puts)
                self._changed.notify_all()


@dataclass(slots=True)
class _Counts:
    written_frames: int = 0
    written_bytes: int = 0
    pending_frames: int = 0
    pending_bytes: int = 0
    is_deleting: bool = False
    failures: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Stored:
    bytes_by_key: dict[int, int] = field(default_factory=dict)
    num_bytes: int = 0
    written_at: float = 0.0


_Session = tuple[bytes, SessionId]


class _Ledger:
    """Bytes written and not deleted, by session. A session that wasn't written for `ttl_s` has expired in the tier."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._sessions: OrderedDict[_Session, _Stored] = OrderedDict()
        self.total_bytes = 0

    def add(self, session: _Session, key: bytes, num_bytes: int, now: float) -> None:
        while self._sessions and next(iter(self._sessions.values())).written_at <= now - self._ttl_s:
            self.drop(next(iter(self._sessions)))
        stored = self._sessions.setdefault(session, _Stored())
        self._sessions.move_to_end(session)
        stored.written_at = now
        # A hash of the key: a frame that is written again must not count twice, and keys are long.
        short = xxhash.xxh3_64_intdigest(key)
        grown = num_bytes - stored.bytes_by_key.get(short, 0)
        stored.bytes_by_key[short] = num_bytes
        stored.num_bytes += grown
        self.total_bytes += grown

    def drop(self, session: _Session) -> None:
        stored = self._sessions.pop(session, None)
        if stored is not None:
            self.total_bytes -= stored.num_bytes

    def bytes_of(self, session: _Session) -> int:
        stored = self._sessions.get(session)
        return stored.num_bytes if stored is not None else 0
