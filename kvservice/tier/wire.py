"""Self-checking frames: how one piece of KV is written, and read again. Knows nothing of where frames are kept.

    "KVC2" │ header bytes, u32 │ header │ payload │ xxh3-64 of all before, u64

    header   role, dtype, dims, params, codec bytes, fingerprint bytes: u8 each; key bytes, u16; layer group, u32;
             tag's key id, u32; start, stop, raw bytes, stored bytes: u64 each; tenant tag, 16 bytes;
             shape, u32 each; codec's params, u32 each; codec, fingerprint, key

All integers are little-endian. The header repeats the key, so a value under a wrong key is found out. A frame that
fails a check is a miss to its reader, never an answer. Frames of version 1 can still be read: see `wire1`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import xxhash

from kvservice.errors import InternalError
from kvservice.tier import wire1
from kvservice.tier.base import Buffer
from kvservice.tier.header import (
    DTYPES,
    MAX_HEADER_BYTES,
    ROLES,
    FrameHeader,
    check_header,
    corrupt,
    key_parts,
)

MAGIC = b"KVC2"
MAGIC_1 = b"KVC1"

HEAD = struct.Struct("<4sI")
"""What each frame begins with, of any version: magic, and bytes of the header."""
CHECKSUM = struct.Struct("<Q")
_FIXED = struct.Struct("<6BHII4Q16s")
MIN_FRAME_BYTES = HEAD.size + CHECKSUM.size


def encode_frame(header: FrameHeader, payload: Buffer | Sequence[Buffer]) -> bytearray:
    """The frame of one payload, which may be in several pieces. Copies the payload once.

    Raises:
        InternalError: the header contradicts itself or the payload, or a size is over its limit.
    """
    pieces = [payload] if isinstance(payload, Buffer) else payload
    views = [memoryview(piece).cast("B") for piece in pieces]
    stored_bytes = sum(map(len, views))
    head = pack_head(header, stored_bytes)
    frame = bytearray(len(head) + stored_bytes + CHECKSUM.size)
    frame[: len(head)] = head
    end = len(head)
    for view in views:
        frame[end : end + len(view)] = view
        end += len(view)
    CHECKSUM.pack_into(frame, end, xxhash.xxh3_64_intdigest(memoryview(frame)[:end]))
    return frame


def pack_head(header: FrameHeader, stored_bytes: int, key: bytes | None = None) -> bytes:
    """All of a frame before its payload. `key` is the header's, where the caller has it.

    Raises:
        InternalError: the header contradicts itself or the payload's size, or a size is over its limit.
    """
    key, codec, raw_bytes = key or header.key, header.codec.encode(), header.raw_bytes
    try:
        # The reader's own checks, so that nothing is written that can't be read.
        check_header(header, raw_bytes, stored_bytes)
        packed = b"".join(
            (
                _FIXED.pack(
                    ROLES.index(header.role),
                    DTYPES.index(header.dtype),
                    len(header.shape),
                    len(header.codec_params),
                    len(codec),
                    len(header.fingerprint),
                    len(key),
                    header.layer_group,
                    header.tag_key_id,
                    header.start,
                    header.stop,
                    raw_bytes,
                    stored_bytes,
                    header.tenant_tag,
                ),
                struct.pack(f"<{len(header.shape) + len(header.codec_params)}I", *header.shape, *header.codec_params),
                codec,
                header.fingerprint,
                key,
            )
        )
    except (ValueError, struct.error) as error:
        raise InternalError(f"frame can't be written: {error}") from error
    return HEAD.pack(MAGIC, len(packed)) + packed


def decode_frame(key: bytes, data: Buffer) -> tuple[FrameHeader, memoryview]:
    """The header and the stored payload of a frame found under `key`. The payload is a view of `data`.

    Raises:
        CorruptFrame: it isn't what was written under this key; `reason` is truncated, magic, version, checksum, key
            or header.
    """
    view = memoryview(data).cast("B").toreadonly()
    if len(view) < MIN_FRAME_BYTES:
        raise corrupt("truncated", f"{len(view)} bytes")
    magic, header_bytes = HEAD.unpack_from(view)
    if magic not in (MAGIC, MAGIC_1):
        raise corrupt("version" if magic[:3] == MAGIC[:3] else "magic", f"it begins with {magic!r}")
    if header_bytes > (MAX_HEADER_BYTES if magic == MAGIC else wire1.MAX_HEADER_BYTES):
        raise corrupt("header", f"header of {header_bytes} bytes")
    body, end = HEAD.size + header_bytes, len(view) - CHECKSUM.size
    if body > end:
        raise corrupt("truncated", f"{len(view)} bytes")
    packed = bytes(view[HEAD.size : body])
    (expected,) = CHECKSUM.unpack_from(view, end)
    if xxhash.xxh3_64_intdigest(view[:end]) != expected:
        # The header may still be legible: it tells a cut frame from a damaged one.
        stored = wire1.stored_bytes(packed) if magic == MAGIC_1 else _stored_bytes(packed)
        raise corrupt("truncated" if stored > end - body else "checksum", f"{len(view)} bytes")
    parse = wire1.parse_header if magic == MAGIC_1 else _parse_header
    return parse(key, packed, end - body), view[body:end]


def _stored_bytes(packed: bytes) -> int:
    """Bytes of the payload by a header that may be damaged; 0 where it is too short to say."""
    return int(_FIXED.unpack_from(packed)[12]) if len(packed) >= _FIXED.size else 0


def _parse_header(key: bytes, packed: bytes, stored_bytes: int) -> FrameHeader:
    try:
        role, dtype, dims, params, codec_bytes, fingerprint_bytes, key_bytes, *rest = _FIXED.unpack_from(packed)
        group, key_id, start, stop, raw_bytes, stored, tag = rest
        numbers = struct.unpack_from(f"<{dims + params}I", packed, _FIXED.size)
        names = _FIXED.size + 4 * len(numbers)
        codec, fingerprint, echo = _split(packed[names:], codec_bytes, fingerprint_bytes, key_bytes)
        if echo != key:
            raise corrupt("key", f"it was written as {echo!r}")
        _, session_id, _, name = key_parts(key)
        header = FrameHeader(
            tenant_tag=tag,
            session_id=session_id,
            fingerprint=fingerprint,
            layer_group=group,
            role=ROLES[role],
            chunk_hash=name,
            start=start,
            stop=stop,
            shape=numbers[:dims],
            dtype=DTYPES[dtype],
            codec=codec.decode("ascii"),
            codec_params=numbers[dims:],
            tag_key_id=key_id,
        )
        check_header(header, header.raw_bytes, stored_bytes)
    except (struct.error, ValueError, IndexError) as error:
        raise corrupt("header", str(error)) from None
    if (stored, raw_bytes) != (stored_bytes, header.raw_bytes):
        raise corrupt("header", f"payload of {stored_bytes} bytes, shape {header.shape} of {header.dtype}")
    if header.key != key:
        raise corrupt("key", "its fields make another key")
    return header


def _split(packed: bytes, *sizes: int) -> tuple[bytes, ...]:
    if len(packed) != sum(sizes):
        raise ValueError(f"names of {len(packed)} bytes, which should be {sum(sizes)}")
    parts, start = [], 0
    for size in sizes:
        parts.append(packed[start : start + size])
        start += size
    return tuple(parts)
