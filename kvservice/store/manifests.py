"""What of a session's KV lies in the tier, and how that is written down. Knows nothing of Redis, leases or tensors.

A frame lies under its *home*: the session or document whose hash tag its key carries. A session's own frames lie under
its own id; those that a fork or a document brought, under the id of who wrote them. Nothing is copied.

Packed, a manifest is

    header length, u32 │ header, JSON │ chunks: start, stop, home, row as u32, hash of 16 bytes │ rows of sizes, u32

all little-endian. Most chunks have the same sizes, so a row of sizes is kept once however many chunks have it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kvservice.errors import InternalError
from kvservice.types import NOTHING_REACHED, FrameRef, Reached, SessionId, TenantId

MANIFEST_FORMAT = 1
HASH_BYTES = 16
WINDOW_ROLE = "window"

_HEADER_LEN = struct.Struct("<I")
_CHUNK = np.dtype([("start", "<u4"), ("stop", "<u4"), ("home", "<u4"), ("row", "<u4"), ("hash", f"V{HASH_BYTES}")])


@dataclass(frozen=True, slots=True)
class Chunk:
    """All frames of one span of tokens.

    Attributes:
        start: first token position.
        stop: one past the last token position.
        chunk_hash: stands for the tokens up to `stop`.
        home: the session or document that the frames lie under.
        stored_bytes: of each frame, in the order of the table's columns; 0: there is no such frame.
    """

    start: int
    stop: int
    chunk_hash: bytes
    home: SessionId
    stored_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FrameTable:
    """The frames of a manifest: chunks by position, and of each the size of every (layer group, role)."""

    columns: tuple[tuple[int, str], ...] = ()
    chunks: tuple[Chunk, ...] = ()

    @classmethod
    def of(cls, frames: Iterable[tuple[SessionId, FrameRef]]) -> FrameTable:
        """The table of frames with their homes. Of two frames of one place the later one counts."""
        sizes: dict[tuple[int, int, bytes, SessionId], dict[tuple[int, str], int]] = {}
        for home, frame in frames:
            chunk = sizes.setdefault((frame.start, frame.stop, frame.chunk_hash, home), {})
            chunk[frame.layer_group, frame.role] = frame.stored_bytes
        columns = tuple(sorted({column for chunk in sizes.values() for column in chunk}))
        chunks = (Chunk(*place, tuple(chunk.get(each, 0) for each in columns)) for place, chunk in sizes.items())
        return cls(columns, tuple(sorted(chunks, key=lambda chunk: (chunk.start, chunk.stop, chunk.chunk_hash))))

    def frames(self) -> Iterator[tuple[SessionId, FrameRef]]:
        """Each frame with its home, in the order of positions."""
        for chunk in self.chunks:
            for (layer_group, role), stored_bytes in zip(self.columns, chunk.stored_bytes, strict=True):
                if stored_bytes:
                    frame = FrameRef(layer_group, role, chunk.start, chunk.stop, chunk.chunk_hash, stored_bytes)
                    yield chunk.home, frame

    def until(self, stop: int) -> FrameTable:
        """The chunks that end at or before `stop`."""
        return replace(self, chunks=tuple(chunk for chunk in self.chunks if chunk.stop <= stop))

    def with_frames(self, frames: Iterable[tuple[SessionId, FrameRef]]) -> FrameTable:
        """This table and `frames`. A chunk that overlaps with a new one of other tokens goes: tokens have changed."""
        new = FrameTable.of(frames)
        if not new.chunks:
            return self
        kept = [chunk for chunk in self.chunks if not any(_overlaps(chunk, other) for other in new.chunks)]
        places = {_place(chunk) for chunk in new.chunks}
        added_to = [chunk for chunk in self.chunks if _place(chunk) in places]
        if added_to or (kept and self.columns != new.columns):
            same = replace(self, chunks=(*kept, *added_to))
            return FrameTable.of([*same.frames(), *new.frames()])
        return FrameTable(new.columns, tuple(sorted((*kept, *new.chunks), key=_place)))

    @property
    def homes(self) -> frozenset[SessionId]:
        """Where the frames lie."""
        return frozenset(chunk.home for chunk in self.chunks)

    @property
    def num_frames(self) -> int:
        """How many frames there are."""
        return sum(sum(1 for size in chunk.stored_bytes if size) for chunk in self.chunks)


def _overlaps(old: Chunk, new: Chunk) -> bool:
    return old.start < new.stop and new.start < old.stop


def _place(chunk: Chunk) -> tuple[int, int, bytes]:
    return chunk.start, chunk.stop, chunk.chunk_hash


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a reader needs to find a session's KV again.

    Attributes:
        session_id: the session, or the document if the manifest is a document's own.
        tenant: whose bytes they are.
        tenant_tag: stands for the tenant in the frames' keys; 16 bytes.
        fingerprint: of the model, the recipe's stored part and so on; a reader with another one has no use for it.
        epoch: of the owner that published it.
        version: grows by one with each publication; the store sets it.
        num_tokens: tokens that the session had.
        window_start: first position that isn't distant: frames end there at the latest.
        frames: which there are, and where they lie.
        codec: how payloads are stored.
        document_id: the shared document that the session begins with, if it does.
        parent: the session it was forked from, if it was.
        reached: how the session's tokens were computed.
        window: what follows the frames, and the sinks: a frame of role `window` for each layer, from 0 on.
        is_shared: others may name frames in the session's home, so none of them is deleted before its time.
    """

    session_id: SessionId
    tenant: TenantId
    tenant_tag: bytes
    fingerprint: bytes
    epoch: int
    version: int
    num_tokens: int
    window_start: int
    frames: FrameTable = field(default_factory=FrameTable)
    codec: str = "raw"
    document_id: SessionId | None = None
    parent: SessionId | None = None
    reached: Reached = NOTHING_REACHED
    is_shared: bool = False
    window: Chunk | None = None

    def named(self) -> Iterator[tuple[SessionId, FrameRef]]:
        """Each frame with its home, those of the window last."""
        yield from self.frames.frames()
        if self.window is not None:
            yield from FrameTable(window_columns(len(self.window.stored_bytes)), (self.window,)).frames()

    @property
    def homes(self) -> frozenset[SessionId]:
        """Where the frames lie."""
        return self.frames.homes | ({self.window.home} if self.window is not None else set())


def window_columns(num_layers: int) -> tuple[tuple[int, str], ...]:
    """The columns of a table of windows."""
    return tuple((layer, WINDOW_ROLE) for layer in range(num_layers))


def pack_manifest(manifest: Manifest) -> bytes:
    """The manifest as bytes."""
    table = manifest.frames
    homes = sorted(table.homes)
    rows = sorted({chunk.stored_bytes for chunk in table.chunks})
    header = {
        "format": MANIFEST_FORMAT,
        "session": manifest.session_id,
        "tenant": manifest.tenant,
        "tag": manifest.tenant_tag.hex(),
        "fingerprint": manifest.fingerprint.hex(),
        "epoch": manifest.epoch,
        "version": manifest.version,
        "tokens": manifest.num_tokens,
        "window_start": manifest.window_start,
        "codec": manifest.codec,
        "computed": manifest.reached.num_computed,
        "selected": [list(span) for span in manifest.reached.selected],
        "shared": manifest.is_shared,
        "document": manifest.document_id,
        "parent": manifest.parent,
        "window": None if manifest.window is None else _packed_window(manifest.window),
        "columns": [list(column) for column in table.columns],
        "homes": homes,
        "chunks": len(table.chunks),
        "rows": len(rows),
    }
    number_of_home = {home: number for number, home in enumerate(homes)}
    number_of_row = {row: number for number, row in enumerate(rows)}
    chunks = np.zeros(len(table.chunks), dtype=_CHUNK)
    for index, chunk in enumerate(table.chunks):
        place = (chunk.start, chunk.stop, number_of_home[chunk.home], number_of_row[chunk.stored_bytes])
        chunks[index] = (*place, chunk.chunk_hash)
    packed = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    sizes = np.asarray(rows, dtype="<u4").tobytes()
    return _HEADER_LEN.pack(len(packed)) + packed + chunks.tobytes() + sizes


def unpack_manifest(data: bytes) -> Manifest:
    """The inverse of `pack_manifest`; what it reads it checks.

    Raises:
        InternalError: it isn't a manifest of this format.
    """
    try:
        (length,) = _HEADER_LEN.unpack_from(data)
        body = _HEADER_LEN.size + length
        header = json.loads(data[_HEADER_LEN.size : body])
        if header["format"] != MANIFEST_FORMAT:
            raise ValueError(f"format {header['format']!r}, known is {MANIFEST_FORMAT}")
        return Manifest(
            session_id=SessionId(header["session"]),
            tenant=TenantId(header["tenant"]),
            tenant_tag=bytes.fromhex(header["tag"]),
            fingerprint=bytes.fromhex(header["fingerprint"]),
            epoch=int(header["epoch"]),
            version=int(header["version"]),
            num_tokens=int(header["tokens"]),
            window_start=int(header["window_start"]),
            frames=_unpacked_table(header, data[body:]),
            codec=str(header["codec"]),
            reached=Reached(
                int(header["computed"]), tuple((int(start), int(stop)) for start, stop in header["selected"])
            ),
            is_shared=bool(header["shared"]),
            # Manifests of before have none.
            window=_unpacked_window(header.get("window")),
            document_id=header["document"] and SessionId(header["document"]),
            parent=header["parent"] and SessionId(header["parent"]),
        )
    except (struct.error, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise InternalError(f"a manifest is illegible: {error!r}", reason="illegible_manifest") from error


def _packed_window(window: Chunk) -> dict[str, Any]:
    return {
        "start": window.start,
        "stop": window.stop,
        "hash": window.chunk_hash.hex(),
        "home": window.home,
        "sizes": list(window.stored_bytes),
    }


def _unpacked_window(packed: Mapping[str, Any] | None) -> Chunk | None:
    if packed is None:
        return None
    return Chunk(
        int(packed["start"]),
        int(packed["stop"]),
        bytes.fromhex(packed["hash"]),
        SessionId(packed["home"]),
        tuple(int(size) for size in packed["sizes"]),
    )


def _unpacked_table(header: Mapping[str, Any], body: bytes) -> FrameTable:
    columns = tuple((int(group), str(role)) for group, role in header["columns"])
    num_chunks, num_rows = int(header["chunks"]), int(header["rows"])
    chunk_bytes = num_chunks * _CHUNK.itemsize
    if len(body) != chunk_bytes + num_rows * len(columns) * 4:
        raise ValueError(f"{len(body)} bytes for {num_chunks} chunks and {num_rows} rows of {len(columns)} sizes")
    rows = np.frombuffer(body[chunk_bytes:], dtype="<u4").reshape(num_rows, len(columns)).tolist()
    chunks = np.frombuffer(body[:chunk_bytes], dtype=_CHUNK)
    homes = [SessionId(home) for home in header["homes"]]
    return FrameTable(
        columns,
        tuple(
            Chunk(int(start), int(stop), bytes(name), homes[int(home)], tuple(rows[int(row)]))
            for start, stop, home, row, name in chunks.tolist()
        ),
    )
