"""How KV is laid out in a tier: keys and self-checking frames. Knows nothing of where they are kept.

    "KVC1" │ header length, u32 │ header, canonical JSON │ payload │ xxh3-64 of all before, u64

All integers are little-endian. The header repeats the key, so a value under a wrong key is found out. A frame that
fails a check is a miss to its reader, never an answer.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod

import numpy as np
import xxhash

from kvservice.errors import CorruptFrame, InternalError
from kvservice.tier.base import Buffer
from kvservice.types import SessionId

MAGIC = b"KVC1"
FORMAT_VERSION = 1
TAG_BYTES = 16
CHUNK_HASH_BYTES = 16
MAX_HEADER_BYTES = 16 << 10
MAX_PAYLOAD_BYTES = 64 << 20
MAX_DIMS = 8

_HEADER_LEN = struct.Struct("<I")
_CHECKSUM = struct.Struct("<Q")
_HEAD_BYTES = len(MAGIC) + _HEADER_LEN.size

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "uint8": 1, "int8": 1}
_KEY = re.compile(
    rb"kv1:\{(?P<tag>[0-9a-f]{32}):(?P<session>[A-Za-z0-9_-]{1,64})\}:(?P<fp12>[0-9a-f]{12}):"
    rb"(?P<group>[0-9]{1,6}):(?P<role>[a-z_]{1,16}):(?P<chunk>[0-9a-f]{32})"
)
_SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FIELDS = frozenset(
    ("version", "key", "tenant", "fingerprint", "group", "role", "span", "shape", "dtype", "codec", "raw", "stored")
)


class FrameRole(Enum):
    """What a frame's payload is."""

    KV = "kv"
    """Keys and values, of every layer of the layer group."""
    SHARED_KEY = "shared_key"
    VALUE = "value"
    CENTROID = "centroid"


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """What a frame says of its payload.

    Attributes:
        tenant_tag: 16 bytes that stand for the tenant.
        fingerprint: at least 6 bytes that stand for all that shapes stored KV (serving.md §4).
        layer_group: index of the layer group; 0 if all layers are one.
        chunk_hash: `chunk_hash` of the tokens of the span.
        start: first token position.
        stop: one past the last token position.
        shape: of the raw payload.
        dtype: of the raw payload: bfloat16, float16, float32, uint8 or int8.
        codec: how the raw payload was made into the stored one; "raw" is not at all.
    """

    tenant_tag: bytes
    session_id: SessionId
    fingerprint: bytes
    layer_group: int
    role: FrameRole
    chunk_hash: bytes
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: str
    codec: str = "raw"

    @property
    def key(self) -> bytes:
        """The key that the frame is kept under."""
        return frame_key(
            self.tenant_tag, self.session_id, self.fingerprint, self.layer_group, self.role, self.chunk_hash
        )

    @property
    def raw_bytes(self) -> int:
        """Bytes of the payload before the codec."""
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


def session_tag(tenant_tag: bytes, session_id: SessionId) -> bytes:
    """The part of a key that all frames of a session share: a hash tag, so they share a slot of a Redis cluster.

    Raises:
        InternalError: the tag isn't 16 bytes, or the id has other characters than letters, digits, "_" and "-".
    """
    if len(tenant_tag) != TAG_BYTES:
        raise InternalError(f"tenant tag of {len(tenant_tag)} bytes: must be {TAG_BYTES}")
    if not _SESSION.fullmatch(session_id):
        raise InternalError(f"session_id={session_id!r}: must be 1-64 letters, digits, '_' or '-'")
    return f"{{{tenant_tag.hex()}:{session_id}}}".encode()


def frame_key(
    tenant_tag: bytes,
    session_id: SessionId,
    fingerprint: bytes,
    layer_group: int,
    role: FrameRole,
    chunk_hash: bytes,
) -> bytes:
    """`kv1:{<tag>:<session>}:<first 12 hex digits of the fingerprint>:<layer group>:<role>:<chunk hash>`."""
    tag = session_tag(tenant_tag, session_id)
    return b"kv1:%b:%b:%d:%b:%b" % (
        tag,
        fingerprint.hex()[:12].encode(),
        layer_group,
        role.value.encode(),
        chunk_hash.hex().encode(),
    )


def chunk_hash(tenant_tag: bytes, previous: bytes, token_ids: Sequence[int]) -> bytes:
    """16 bytes that stand for `token_ids` after all that `previous` stands for.

    Keyed by the tenant's tag: nobody can tell from a key which text it stands for, or that two tenants share one.

    Args:
        tenant_tag: the key, 16 bytes.
        previous: hash of the chunk before; empty for the first.
        token_ids: each in [0, 2**32).
    """
    if len(previous) not in (0, CHUNK_HASH_BYTES):
        raise InternalError(f"previous chunk hash of {len(previous)} bytes: must be 0 or {CHUNK_HASH_BYTES}")
    digest = hashlib.blake2b(previous, key=tenant_tag, digest_size=CHUNK_HASH_BYTES, person=b"kv1-chunk")
    digest.update(np.asarray(token_ids, dtype="<u4").tobytes())
    return digest.digest()


def encode_frame(header: FrameHeader, payload: Buffer) -> bytearray:
    """The frame of one payload. Copies the payload once.

    Raises:
        InternalError: the header contradicts itself or the payload, or a size is over its limit.
    """
    stored = memoryview(payload).cast("B")
    packed = _pack_header(header, len(stored))
    if len(stored) > MAX_PAYLOAD_BYTES or len(packed) > MAX_HEADER_BYTES:
        raise InternalError(
            f"frame with a header of {len(packed)} and a payload of {len(stored)} bytes: "
            f"the most are {MAX_HEADER_BYTES} and {MAX_PAYLOAD_BYTES}"
        )
    body = _HEAD_BYTES + len(packed)
    end = body + len(stored)
    frame = bytearray(end + _CHECKSUM.size)
    frame[: len(MAGIC)] = MAGIC
    _HEADER_LEN.pack_into(frame, len(MAGIC), len(packed))
    frame[_HEAD_BYTES:body] = packed
    frame[body:end] = stored
    _CHECKSUM.pack_into(frame, end, xxhash.xxh3_64_intdigest(memoryview(frame)[:end]))
    return frame


def decode_frame(key: bytes, data: Buffer) -> tuple[FrameHeader, memoryview]:
    """The header and the payload of a frame found under `key`. The payload is a view of `data`.

    Raises:
        CorruptFrame: it isn't what was written under this key; `reason` is truncated, magic, version, checksum, key
            or header.
    """
    view = memoryview(data).cast("B").toreadonly()
    if len(view) < _HEAD_BYTES + _CHECKSUM.size:
        raise _corrupt("truncated", f"{len(view)} bytes")
    if view[: len(MAGIC)] != MAGIC:
        reason = "version" if view[:3] == MAGIC[:3] else "magic"
        raise _corrupt(reason, f"it begins with {bytes(view[: len(MAGIC)])!r}")
    (header_len,) = _HEADER_LEN.unpack_from(view, len(MAGIC))
    if header_len > MAX_HEADER_BYTES:
        raise _corrupt("header", f"header of {header_len} bytes")
    body, end = _HEAD_BYTES + header_len, len(view) - _CHECKSUM.size
    if body > end:
        raise _corrupt("truncated", f"{len(view)} bytes")
    (expected,) = _CHECKSUM.unpack_from(view, end)
    if xxhash.xxh3_64_intdigest(view[:end]) != expected:
        # The header may still be legible: it tells a cut frame from a damaged one.
        reason = "truncated" if _is_cut(view[_HEAD_BYTES:body], end - body) else "checksum"
        raise _corrupt(reason, f"{len(view)} bytes")
    header = _parse_header(key, bytes(view[_HEAD_BYTES:body]), end - body)
    return header, view[body:end]


def _corrupt(reason: str, found: str) -> CorruptFrame:
    return CorruptFrame(f"frame fails its check ({reason}): {found}", reason=reason)


def _pack_header(header: FrameHeader, stored_bytes: int) -> bytes:
    fields = {
        "version": FORMAT_VERSION,
        "key": header.key.decode("ascii"),
        "tenant": header.tenant_tag.hex(),
        "fingerprint": header.fingerprint.hex(),
        "group": header.layer_group,
        "role": header.role.value,
        "span": [header.start, header.stop],
        "shape": list(header.shape),
        "dtype": header.dtype,
        "codec": header.codec,
        "raw": header.raw_bytes if header.dtype in _ITEM_BYTES else -1,
        "stored": stored_bytes,
    }
    packed = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")
    try:
        # The reader's own checks, so that nothing is written that can't be read.
        _parse_header(header.key, packed, stored_bytes)
    except CorruptFrame as error:
        raise InternalError(f"frame can't be written: {error.message}") from error
    return packed


def _is_cut(packed: memoryview, stored_bytes: int) -> bool:
    try:
        stored = json.loads(bytes(packed))["stored"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return False
    return isinstance(stored, int) and stored > stored_bytes


def _parse_header(key: bytes, packed: bytes, stored_bytes: int) -> FrameHeader:
    try:
        fields = json.loads(packed)
    except (ValueError, RecursionError):
        raise _corrupt("header", "not JSON") from None
    if not isinstance(fields, dict) or fields.get("version") != FORMAT_VERSION:
        found = fields.get("version") if isinstance(fields, dict) else fields
        raise _corrupt("version", f"format version {found!r}, known is {FORMAT_VERSION}")
    if fields.keys() != _FIELDS:
        raise _corrupt("header", f"fields {sorted(fields)}")
    if fields["key"] != key.decode("latin-1"):
        raise _corrupt("key", f"it was written as {fields['key']!r}")
    parts = _KEY.fullmatch(key)
    if parts is None:
        raise _corrupt("key", f"{key!r} is no frame key")
    try:
        header = _header_of(fields, parts)
    except (ValueError, TypeError, KeyError) as error:
        raise _corrupt("header", str(error)) from None
    if header.key != key:
        raise _corrupt("key", "its fields make another key")
    if fields["stored"] != stored_bytes or (header.codec == "raw" and fields["raw"] != stored_bytes):
        raise _corrupt("header", f"payload of {stored_bytes} bytes, shape {header.shape} of {header.dtype}")
    return header


def _header_of(fields: dict[str, object], parts: re.Match[bytes]) -> FrameHeader:
    start, stop = _integers(fields["span"])
    shape = _integers(fields["shape"])
    dtype, codec = fields["dtype"], fields["codec"]
    if fields["tenant"] != parts["tag"].decode("ascii") or fields["group"] != int(parts["group"]):
        raise ValueError(f"tenant {fields['tenant']!r}, group {fields['group']!r} under another's key")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES or not isinstance(codec, str):
        raise ValueError(f"dtype {dtype!r}, codec {codec!r}")
    if not 0 <= start < stop or len(shape) > MAX_DIMS:
        raise ValueError(f"span {start}-{stop}, shape {shape}")
    raw_bytes = prod(shape) * _ITEM_BYTES[dtype]
    if raw_bytes != fields["raw"] or raw_bytes > MAX_PAYLOAD_BYTES:
        raise ValueError(f"raw size {fields['raw']!r}, shape {shape} of {dtype}")
    return FrameHeader(
        tenant_tag=bytes.fromhex(str(fields["tenant"])),
        session_id=SessionId(parts["session"].decode("ascii")),
        fingerprint=bytes.fromhex(str(fields["fingerprint"])),
        layer_group=int(parts["group"]),
        role=FrameRole(fields["role"]),
        chunk_hash=bytes.fromhex(parts["chunk"].decode("ascii")),
        start=start,
        stop=stop,
        shape=shape,
        dtype=dtype,
        codec=codec,
    )


def _integers(value: object) -> tuple[int, ...]:
    """A JSON list as a tuple of integers ≥ 0."""
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise ValueError(f"{value!r} is no list of integers")
    return tuple(value)
