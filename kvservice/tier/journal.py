"""Which frames of which sessions have been written: from the thread that writes to whoever publishes manifests.

    engine thread ── submit ──► writer ── on_done, mover thread ──► journal ──► publisher, event loop

Keeps frames of watched sessions only, until they are taken.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from kvservice.tier.base import Buffer, TierBackend
from kvservice.tier.frame_sets import FrameSets
from kvservice.tier.header import FrameHeader
from kvservice.tier.sealing import Keyring
from kvservice.tier.writer import DEFAULT_TTL_S, Done, WriteBehind
from kvservice.types import FrameRef, SessionId


@dataclass(slots=True)
class _Entry:
    pending: int = 0
    written: list[FrameRef] = field(default_factory=list)
    waiters: list[Future[None]] = field(default_factory=list)


class FrameJournal:
    """Notes frames as they are submitted and written. All methods may be called from any thread and none blocks.

    Args:
        frame_sets: what the frames look like.
    """

    def __init__(self, frame_sets: FrameSets) -> None:
        self.frame_sets = frame_sets
        self._lock = threading.Lock()
        self._entries: dict[tuple[bytes, SessionId], _Entry] = {}

    def watch(self, tenant_tag: bytes, session_id: SessionId) -> None:
        """From now on, keeps what is written of a session."""
        with self._lock:
            self._entries.setdefault((tenant_tag, session_id), _Entry())

    def forget(self, tenant_tag: bytes, session_id: SessionId) -> None:
        """Keeps nothing of a session any more; who waits for it needn't."""
        with self._lock:
            entry = self._entries.pop((tenant_tag, session_id), None)
        if entry is not None:
            _resolve(entry.waiters)

    def submitted(self, header: FrameHeader) -> None:
        """A frame is about to be handed to the writer."""
        with self._lock:
            if (entry := self._entry(header)) is not None:
                entry.pending += 1

    def ended(self, header: FrameHeader, *, stored_bytes: int | None) -> None:
        """A frame was written, with so many bytes if that is known, else 0; or, with None, was not."""
        waiters: list[Future[None]] = []
        with self._lock:
            entry = self._entry(header)
            # One that was forgotten and watched again meanwhile has never counted this frame.
            if entry is None or not entry.pending:
                return
            entry.pending -= 1
            if stored_bytes is not None:
                entry.written.append(
                    FrameRef(
                        header.layer_group,
                        header.role.value,
                        header.start,
                        header.stop,
                        header.chunk_hash,
                        stored_bytes,
                    )
                )
            if not entry.pending:
                waiters, entry.waiters = entry.waiters, []
        _resolve(waiters)

    def settled(self, tenant_tag: bytes, session_id: SessionId) -> Future[None]:
        """Done once no frame of the session is on its way."""
        waiter: Future[None] = Future()
        with self._lock:
            entry = self._entries.get((tenant_tag, session_id))
            if entry is not None and entry.pending:
                entry.waiters.append(waiter)
                return waiter
        waiter.set_result(None)
        return waiter

    def take(self, tenant_tag: bytes, session_id: SessionId) -> list[FrameRef]:
        """What was written of a session since it was last asked, in that order."""
        with self._lock:
            entry = self._entries.get((tenant_tag, session_id))
            if entry is None:
                return []
            written, entry.written = entry.written, []
            return written

    def _entry(self, header: FrameHeader) -> _Entry | None:
        return self._entries.get((header.tenant_tag, header.session_id))


class JournaledWriter(WriteBehind):
    """A `WriteBehind` that notes in a journal what becomes of each frame."""

    def __init__(
        self,
        backend: TierBackend,
        journal: FrameJournal,
        *,
        ttl_s: float = DEFAULT_TTL_S,
        keyring: Keyring | None = None,
    ) -> None:
        super().__init__(backend, ttl_s=ttl_s, keyring=keyring)
        self._journal = journal

    def submit(self, header: FrameHeader, payload: Buffer | Sequence[Buffer], on_done: Done | None = None) -> bool:
        """See `WriteBehind.submit`."""

        def done(written: bool) -> None:
            self._journal.ended(header, stored_bytes=0 if written else None)
            if on_done is not None:
                on_done(written)

        self._journal.submitted(header)
        taken = super().submit(header, payload, done)
        if not taken:
            self._journal.ended(header, stored_bytes=None)
        return taken


def _resolve(waiters: list[Future[None]]) -> None:
    for waiter in waiters:
        if waiter.set_running_or_notify_cancel():
            waiter.set_result(None)
