"""Publishes what of this worker's sessions lies in the tier, and keeps it alive. Knows nothing of engines or gRPC.

    call comes ── begin: own the session, reserve ──► frames … ──► call ended ── publish ──► renew, until released

Publishing is behind the answer: a turn never waits for it. Whatever goes wrong with it costs a later reader time, never
an answer; so faults are counted and logged, and the next turn or renewal tries again. Only a full quota refuses a call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Protocol

from kvservice.errors import Conflict, KVServiceError, LimitExceeded
from kvservice.store.base import StateStore
from kvservice.store.blobs import Blobs, charged_bytes, index_of, key_of
from kvservice.store.ledger import Held, Position
from kvservice.store.manifests import WINDOW_ROLE, Chunk, FrameTable, Manifest
from kvservice.store.sizes import allocated_bytes
from kvservice.store.tasks import end_tasks
from kvservice.tier.chunks import chain, chunk_name
from kvservice.tier.frame_sets import FrameSet, FrameSets
from kvservice.types import (
    GROUP_TOKENS,
    NOTHING_REACHED,
    SINK_TOKENS,
    CallId,
    EngineCall,
    FrameRef,
    Reached,
    SessionId,
    TenantId,
    WorkerId,
)

logger = logging.getLogger(__name__)

BEGIN_TIMEOUT_S = 1.0
"""A call waits no longer for the state store; it goes on unpublished."""
AWAY_S = 2.0
"""After a fault of the state store, calls don't ask it for so long, unless it alone knows how to go on with theirs."""
WRITTEN_TIMEOUT_S = 60.0
"""How long a publication waits for its frames to be written; later ones are for the next."""
RESERVED_S = 900.0
"""A call that takes longer has its quota checked again when it publishes."""
TRIES = 3
HEADER_BYTES = 512
"""More than what a frame takes beside its payload, and more than its key."""


class FrameLog(Protocol):
    """What has been written of which session. Any thread; nothing blocks."""

    @property
    def frame_sets(self) -> FrameSets:
        """What the frames look like."""

    def watch(self, tenant_tag: bytes, session_id: SessionId) -> None:
        """Keeps what is written of a session from now on."""

    def forget(self, tenant_tag: bytes, session_id: SessionId) -> None:
        """Keeps nothing of it any more."""

    def settled(self, tenant_tag: bytes, session_id: SessionId) -> Future[None]:
        """Done once no frame of the session is on its way."""

    def take(self, tenant_tag: bytes, session_id: SessionId) -> list[FrameRef]:
        """Frames written since it was last asked. `stored_bytes` 0: not known."""


@dataclass(frozen=True, slots=True)
class PublisherStats:
    """Counters since the start. `failures` by reason; `fenced`: sessions that another worker had acquired."""

    held_sessions: int = 0
    published: int = 0
    fenced: int = 0
    failures: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Session:
    tenant: TenantId
    tenant_tag: bytes
    session_id: SessionId
    position: Position
    manifest: Manifest | None
    frames: FrameTable
    """All that was written: also of the turn that is running, and of turns that were taken back. Those have the hashes
    of other tokens, so no reader takes them, and go when their place is written again."""
    window: Chunk | None = None
    """The newest that was written, whatever has become of its tokens since."""
    frame_set: FrameSet | None = None
    """What this worker writes of it; None until a call says how it keeps its KV."""
    num_tokens: int = 0
    reached: Reached = NOTHING_REACHED
    is_shared: bool = False
    shared: frozenset[FrameRef] = frozenset()
    """What lies in its home and others may name: it stays, whether it is still named here or not."""
    superseded: list[FrameRef] = field(default_factory=list)
    """Windows that were written, and followed by others before a manifest named them."""
    window_start: int = SINK_TOKENS
    given: EngineCall | None = None
    """The last call, until it has been seen whether what it began with was another session's."""
    reserved: bool = False
    is_behind: bool = False
    """Something was written that no manifest names yet."""
    unplaced: list[FrameRef] = field(default_factory=list)
    """Written, and not in `frames` yet: the kv Redis couldn't be asked."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def fingerprint(self) -> bytes:
        """Of its frames; empty before it is known."""
        if self.frame_set is not None:
            return self.frame_set.fingerprint
        return self.manifest.fingerprint if self.manifest is not None else b""

    @property
    def codec(self) -> str:
        """Of its frames."""
        known = self.frame_set or self.manifest
        return "raw" if known is None else known.codec

    @property
    def is_outdated(self) -> bool:
        """Whether its manifest names frames of another model, layout or map: nobody can read both."""
        return self.manifest is not None and self.manifest.fingerprint != self.fingerprint


@dataclass(frozen=True, slots=True)
class _Turn:
    session: _Session
    call: EngineCall


class Publisher:
    """Owns sessions in the ledger for one worker. All methods are for one event loop, save `ended`.

    Args:
        worker_id: the owner.
        store: sessions and the ledger.
        frames: tells what was written.
        blobs: the kv Redis, to know sizes and to renew.
        ttl_s: of leases and frames; the renewal comes at a third of it.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        worker_id: WorkerId,
        store: StateStore,
        frames: FrameLog,
        blobs: Blobs,
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker_id = worker_id
        self._store = store
        self._ledger = store.ledger
        self._frames = frames
        self._blobs = blobs
        self._ttl_s = ttl_s
        self._clock = clock
        self._sessions: dict[SessionId, _Session] = {}
        self._turns: dict[CallId, _Turn] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._away_until = float("-inf")
        self._published = 0
        self._fenced = 0
        self._failures: Counter[str] = Counter()
        self._loop = asyncio.get_running_loop()

    @property
    def frame_sets(self) -> FrameSets:
        """What the frames look like that this worker writes."""
        return self._frames.frame_sets

    def stats(self) -> PublisherStats:
        """See `PublisherStats`."""
        return PublisherStats(len(self._sessions), self._published, self._fenced, dict(self._failures))

    async def begin(self, call: EngineCall, tenant: TenantId, *, was_elsewhere: bool = False) -> Manifest | None:
        """Prepares for what a call will write. Ends within a bounded time.

        Args:
            call: the call.
            tenant: whose it is.
            was_elsewhere: another worker may have had the session since this one.

        Returns:
            What is published of the session, if there is something and that is known.

        Raises:
            LimitExceeded: it would be more than the tenant may have stored.
        """
        if not (tenant and call.retain and call.tenant_tag):
            return None
        known = None if was_elsewhere else self._known(call)
        if self._clock() < self._away_until and (known is not None or not call.base_tokens):
            return self._begin_unasked(call, known)
        try:
            async with asyncio.timeout(BEGIN_TIMEOUT_S):
                session = await self._owned(call, tenant, was_elsewhere=was_elsewhere)
                await self._reserve(session, call)
        except LimitExceeded:
            raise
        except (KVServiceError, TimeoutError) as error:
            self._away_until = self._clock() + AWAY_S
            self._note_failure("begin", call.session_id, error)
            return self._begin_unasked(call, known)
        return self._entered(session, call)

    def ended(self, call_id: CallId, appended_tokens: int, reached: Reached | None = None) -> None:
        """A call has ended, well or not, or was refused; its session has so many tokens more. From any thread."""
        try:
            self._loop.call_soon_threadsafe(self._turn_ended, call_id, appended_tokens, reached)
        except RuntimeError:
            # The event loop is closed: nobody is left to publish.
            return

    async def acquire(self, tenant: TenantId, tenant_tag: bytes, session_id: SessionId) -> bool:
        """Owns a session from now on, under an epoch greater than all before; whether something of it is published.

        Raises:
            Unavailable: the state store can't be reached.
        """
        known = self._sessions.get(session_id)
        if known is not None:
            # It was ours before, and may have been another's since.
            async with known.lock:
                if self._sessions.get(session_id) is known:
                    self._drop(known)
        return (await self._own(tenant, tenant_tag, session_id)).manifest is not None

    def is_behind(self, session_id: SessionId) -> bool:
        """Whether something of a session was written, or is known of it, that no manifest says yet."""
        session = self._sessions.get(session_id)
        return session is not None and session.is_behind

    async def known(self, session_id: SessionId) -> Manifest | None:
        """What there is of a session that this worker owns, published or not; None if it owns it not."""
        session = self._sessions.get(session_id)
        if session is None:
            return None
        async with session.lock:
            if session.is_outdated:
                # Whoever reads can't use it, and counts that.
                return session.manifest
            try:
                await self._gather(session)
            except (KVServiceError, TimeoutError) as error:
                self._note_failure("gather", session_id, error)
            return self._manifest(session)

    async def publish(self, session_id: SessionId) -> bool:
        """Publishes what has ended of a session. Whether a manifest has all of it then."""
        session = self._sessions.get(session_id)
        if session is None:
            return False
        if session.is_behind:
            await self._publish(session)
        return session.manifest is not None and not session.is_behind

    async def share(self, session_id: SessionId) -> None:
        """As `publish`; and the frames it has now stay until the session is closed: others name them."""
        session = self._sessions.get(session_id)
        if session is not None:
            session.is_behind |= not session.is_shared
            session.is_shared = True
            await self.publish(session_id)
            if session.manifest is not None:
                session.shared |= _own_frames(session.manifest)

    async def release(self, session_id: SessionId) -> None:
        """Lets a session go; nothing of it is published once this has returned. Its lease stays until it expires."""
        session = self._sessions.get(session_id)
        if session is None:
            return
        async with session.lock:
            self._drop(session)
            if session.reserved:
                try:
                    await self._ledger.reserve_bytes(session.tenant, session_id, 0, RESERVED_S)
                except KVServiceError as error:
                    self._note_failure("release", session_id, error)

    async def renew(self) -> None:
        """Prolongs leases and frames of all sessions held; lets go those that were closed or belong to another now.

        Raises:
            Unavailable: one of the servers can't be reached.
        """
        living = await self._store.existing_sessions(list(self._sessions))
        for session in [each for name, each in self._sessions.items() if name not in living]:
            await self.release(session.session_id)
        held = [Held(each.tenant, each.session_id, each.position.epoch) for each in self._sessions.values()]
        for lost in await self._ledger.renew_leases(self._worker_id, held, self._ttl_s):
            session_or_none = self._sessions.get(lost.session_id)
            # It may have been acquired anew since.
            if session_or_none is None or session_or_none.position.epoch != lost.epoch:
                continue
            if session_or_none.frames.chunks:
                session_or_none.is_behind = True
            else:
                await self.release(lost.session_id)
        for session in list(self._sessions.values()):
            if session.is_behind:
                await self._publish(session)
            if session.manifest is not None:
                manifest = session.manifest
                keys = [key_of(manifest, home, frame) for home, frame in manifest.named()]
                await self._blobs.renew(keys, self._ttl_s)

    async def hand_over(self) -> int:
        """Publishes all that has ended, and lets every session go: whoever acquires one next has all there is of it.

        Returns:
            How many have a manifest of all that they are.
        """
        await self.settle()
        whole = 0
        for session_id in list(self._sessions):
            whole += await self.publish(session_id)
            await self.release(session_id)
        return whole

    async def settle(self) -> None:
        """Returns once everything that has ended has been published, or has failed to."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def stop(self, timeout_s: float) -> None:
        """Publishes what has ended, for at most `timeout_s`. Leases stay: another worker may take the sessions on."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        await end_tasks(list(self._tasks))

    def _known(self, call: EngineCall) -> _Session | None:
        session = self._sessions.get(call.session_id)
        return session if session is not None and session.tenant_tag == call.tenant_tag else None

    def _begin_unasked(self, call: EngineCall, known: _Session | None) -> Manifest | None:
        """While the state store is away: by what is known here of the session, to be published once it is back."""
        if known is None:
            return None
        return self._entered(known, call)

    def _entered(self, session: _Session, call: EngineCall) -> Manifest | None:
        session.frame_set = self._frames.frame_sets.of(call.recipe)
        self._turns[call.call_id] = _Turn(session, call)
        return session.manifest

    async def _owned(self, call: EngineCall, tenant: TenantId, *, was_elsewhere: bool) -> _Session:
        session = self._known(call)
        if session is not None:
            if not was_elsewhere or await self._own_again(session):
                return session
            return await self._own(tenant, call.tenant_tag, call.session_id)
        if call.session_id in self._sessions:
            # The service's secret has changed: what is written from now on has other keys.
            await self.release(call.session_id)
        return await self._own(tenant, call.tenant_tag, call.session_id)

    async def _own(self, tenant: TenantId, tenant_tag: bytes, session_id: SessionId) -> _Session:
        position = await self._ledger.acquire_session(tenant, session_id, self._worker_id, self._ttl_s)
        manifest = await self._ledger.get_manifest(tenant, session_id) if position.version else None
        if manifest is not None and manifest.tenant_tag != tenant_tag:
            await self._forget_old(manifest)
            manifest = None
        session = _Session(tenant, tenant_tag, session_id, position, manifest, FrameTable())
        if manifest is not None:
            session.frames, session.reached, session.window = manifest.frames, manifest.reached, manifest.window
            session.num_tokens, session.window_start = manifest.num_tokens, manifest.window_start
            session.is_shared = manifest.is_shared
            session.shared = _own_frames(manifest) if manifest.is_shared else frozenset()
        self._frames.watch(session.tenant_tag, session.session_id)
        self._sessions[session.session_id] = session
        return session

    async def _own_again(self, session: _Session) -> bool:
        """Acquires a session that another worker may have acquired since. False if that one has published: then it is
        dropped, as what is known of it here is old."""
        async with session.lock:
            if self._sessions.get(session.session_id) is not session:
                return False
            position = await self._ledger.acquire_session(
                session.tenant, session.session_id, self._worker_id, self._ttl_s
            )
            if position.version == session.position.version:
                session.position = position
                return True
            self._drop(session)
            return False

    async def _forget_old(self, manifest: Manifest) -> None:
        """Deletes what was written of a session under another secret of the service: nobody will read it again."""
        logger.info("old_frames_deleted", extra={"session_id": manifest.session_id})
        if not manifest.is_shared:
            home = manifest.session_id
            keys = [key_of(manifest, home, frame) for frame in _own_frames(manifest)]
            await self._blobs.delete([*keys, index_of(manifest)])

    async def _reserve(self, session: _Session, call: EngineCall) -> None:
        most_new = call.sampling.max_new_tokens if call.sampling is not None else 0
        tokens = len(call.base_tokens) + len(call.document_tokens) + len(call.prompt_tokens) + most_new
        covered = max((chunk.stop for chunk in session.frames.chunks), default=SINK_TOKENS)
        stored_until = call.recipe.stored_until(tokens)
        groups = max(0, stored_until - covered) // GROUP_TOKENS
        if not groups:
            return
        # Whole chunks, and one more: the last one of the turn before is written again.
        frame_set = self._frames.frame_sets.of(call.recipe)
        chunk_groups, layers = frame_set.chunk_groups, frame_set.group_shape[0]
        chunks = -(-groups // chunk_groups) + (chunk_groups > 1)
        chunk_bytes, window_bytes = (
            allocated_bytes(payload_bytes + HEADER_BYTES, HEADER_BYTES, self._blobs.allocator)
            for payload_bytes in (
                chunk_groups * frame_set.part_bytes,
                frame_set.window_bytes(tokens - stored_until) // layers,
            )
        )
        num_bytes = frame_set.num_parts * chunks * chunk_bytes + layers * window_bytes
        await self._ledger.reserve_bytes(session.tenant, session.session_id, num_bytes, RESERVED_S)
        session.reserved = True

    def _turn_ended(self, call_id: CallId, appended_tokens: int, reached: Reached | None) -> None:
        turn = self._turns.pop(call_id, None)
        if turn is None:
            return
        session = turn.session
        session.num_tokens = len(turn.call.base_tokens) + appended_tokens
        session.reached = session.reached.until(session.num_tokens) if reached is None else reached
        session.window_start = turn.call.recipe.stored_until(session.num_tokens)
        session.given = turn.call
        session.is_behind = True
        self._start(self._publish(session))

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _publish(self, session: _Session) -> None:
        async with session.lock:
            if self._sessions.get(session.session_id) is not session:
                return
            try:
                await self._gather(session)
                before = session.manifest
                await self._publish_now(session)
                await self._delete_replaced(session, before)
            except (KVServiceError, TimeoutError) as error:
                # What was gathered is kept: the next turn or renewal publishes it.
                self._note_failure("publish", session.session_id, error)

    async def _gather(self, session: _Session) -> None:
        """Adds what was written to the session's frames."""
        place = (session.tenant_tag, session.session_id)
        async with asyncio.timeout(WRITTEN_TIMEOUT_S):
            await asyncio.wrap_future(self._frames.settled(*place))
        session.unplaced += self._frames.take(*place)
        if session.is_outdated:
            session.frames, session.window, session.manifest = FrameTable(), None, None
        placed = await self._sized(session, session.unplaced)
        session.unplaced.clear()
        own = session.session_id
        session.frames = session.frames.with_frames((own, frame) for frame in placed if frame.role != WINDOW_ROLE)
        windows = [frame for frame in placed if frame.role == WINDOW_ROLE]
        if windows:
            newest = [each for each in windows if each.chunk_hash == windows[-1].chunk_hash]
            session.window = FrameTable.of((own, frame) for frame in newest).chunks[0]
            session.superseded += [each for each in windows if each not in newest]
        given, session.given = session.given, None
        if given is not None:
            self._name_anothers(session, given)

    def _name_anothers(self, session: _Session, given: EngineCall) -> None:
        """Names frames of other sessions for what this one took over from their memory, and so never wrote."""
        tag, table = session.tenant_tag, session.frames
        covered = min((chunk.start for chunk in table.chunks), default=session.window_start)
        if covered == SINK_TOKENS:
            return
        frame_set = self._frames.frame_sets.of(given.recipe)
        others = [
            each
            for each in self._sessions.values()
            if each is not session
            and (each.tenant_tag, each.fingerprint) == (tag, frame_set.fingerprint)
            and not each.is_outdated
        ]
        written = {chunk.chunk_hash: (each, chunk) for each in others for chunk in each.frames.chunks}
        token_ids = (*given.base_tokens, *given.document_tokens, *given.prompt_tokens)
        ends = chain(tag, token_ids[:covered]) if written else []
        for first in range(0, len(ends), frame_set.chunk_groups):
            stop = min(first + frame_set.chunk_groups, len(ends))
            name = chunk_name(tag, ends[stop - 1], SINK_TOKENS + first * GROUP_TOKENS, frame_set.codec)
            if name not in written:
                return
            other, chunk = written[name]
            frames = list(FrameTable(other.frames.columns, (chunk,)).frames())
            session.frames = session.frames.with_frames(frames)
            owner = self._sessions.get(chunk.home)
            if owner is not None:
                owner.is_shared = True
                owner.shared |= {frame for _, frame in frames}
                owner.is_behind = True

    async def _sized(self, session: _Session, frames: list[FrameRef]) -> list[FrameRef]:
        """The frames with their sizes; a writer that doesn't tell them leaves them to be asked for. Less those gone."""
        unknown = [frame for frame in frames if not frame.stored_bytes]
        if not unknown:
            return list(frames)
        named = self._manifest(session)
        sizes = await self._blobs.sizes([key_of(named, session.session_id, frame) for frame in unknown])
        known = [frame for frame in frames if frame.stored_bytes]
        return known + [replace(frame, stored_bytes=size) for frame, size in zip(unknown, sizes, strict=True) if size]

    async def _publish_now(self, session: _Session) -> None:
        for _ in range(TRIES):
            manifest = self._manifest(session)
            # Of one that has no frames, a manifest still says how its tokens were computed.
            if session.window_start == SINK_TOKENS and not manifest.frames.chunks and session.manifest is None:
                break
            try:
                session.manifest = await self._ledger.publish_manifest(
                    manifest,
                    session.position,
                    bytes_by_home=charged_bytes(
                        manifest, self._blobs.allocator, also=session.shared - _own_frames(manifest)
                    ),
                    ttl_s=self._ttl_s,
                    reservation_id=session.session_id if session.reserved else "",
                )
            except Conflict as error:
                if not await self._find_again(session, error):
                    return
                continue
            session.position = Position(session.position.epoch, session.manifest.version)
            session.reserved = False
            self._published += 1
            break
        if session.reserved:
            await self._ledger.reserve_bytes(session.tenant, session.session_id, 0, RESERVED_S)
            session.reserved = False
        session.is_behind = False

    async def _delete_replaced(self, session: _Session, before: Manifest | None) -> None:
        """Deletes frames of the session's own that no manifest names any more. Whoever reads them now misses them."""
        now, home = session.manifest, session.session_id
        if now is None or now is before:
            return
        named = {frame.chunk_hash for frame in _own_frames(now) | session.shared}
        # What was written of a turn under way is named by the next one.
        named.update(chunk.chunk_hash for chunk in session.frames.chunks if chunk.home == home)
        if session.window is not None:
            named.add(session.window.chunk_hash)
        old = _own_frames(before) if before is not None else frozenset()
        superseded, session.superseded = session.superseded, []
        await self._blobs.delete(
            [key_of(now, home, frame) for frame in (*old, *superseded) if frame.chunk_hash not in named]
        )

    async def _find_again(self, session: _Session, error: Conflict) -> bool:
        """Sees what a refused publication means. Whether another try may pass."""
        found = Position(int(error.metadata["epoch"]), int(error.metadata["version"]))
        if error.reason == "home_gone":
            own = [each for each in session.frames.frames() if each[0] == session.session_id]
            session.frames = FrameTable.of(own)
            if session.window is not None and session.window.home != session.session_id:
                session.window = None
        elif found.epoch > session.position.epoch:
            logger.warning("session_fenced", extra={"session_id": session.session_id, "epoch": found.epoch})
            self._fenced += 1
            self._drop(session)
            return False
        elif found.epoch == session.position.epoch:
            # The answer to an earlier publication of ours was lost.
            session.position = found
        else:
            # The store came back empty or older, or the lease has expired: nobody owns the session, so we may.
            if session.session_id not in await self._store.existing_sessions([session.session_id]):
                self._drop(session)
                return False
            session.position = await self._ledger.acquire_session(
                session.tenant, session.session_id, self._worker_id, self._ttl_s
            )
        return True

    def _manifest(self, session: _Session) -> Manifest:
        before = session.manifest
        return Manifest(
            session_id=session.session_id,
            tenant=session.tenant,
            tenant_tag=session.tenant_tag,
            fingerprint=session.fingerprint,
            epoch=session.position.epoch,
            version=0,
            num_tokens=session.num_tokens,
            window_start=session.window_start,
            frames=session.frames.until(session.window_start),
            codec=session.codec,
            reached=session.reached,
            window=self._window(session),
            is_shared=session.is_shared,
            document_id=before.document_id if before is not None else None,
            parent=before.parent if before is not None else None,
        )

    def _window(self, session: _Session) -> Chunk | None:
        """The session's window, if it is of all that was computed."""
        window = session.window
        return window if window is not None and window.stop == session.reached.num_computed else None

    def _drop(self, session: _Session) -> None:
        del self._sessions[session.session_id]
        self._frames.forget(session.tenant_tag, session.session_id)

    def _note_failure(self, doing: str, session_id: SessionId, error: Exception) -> None:
        reason = error.reason if isinstance(error, KVServiceError) else "timeout"
        self._failures[reason] += 1
        logger.warning("not_published", extra={"doing": doing, "session_id": session_id, "why": str(error) or reason})


def _own_frames(manifest: Manifest) -> frozenset[FrameRef]:
    """Those that a manifest names in the session's own home."""
    return frozenset(frame for home, frame in manifest.named() if home == manifest.session_id)
