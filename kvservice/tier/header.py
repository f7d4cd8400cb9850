"""What a frame says of itself, and the key it is kept under. Knows nothing of how either is packed or kept."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod

import numpy as np

from kvservice.errors import CorruptFrame, InternalError
from kvservice.types import SessionId

TAG_BYTES = 16
CHUNK_HASH_BYTES = 16
MAX_HEADER_BYTES = 1 << 10
MAX_PAYLOAD_BYTES = 64 << 20
MAX_DIMS = 8
MAX_PARAMS = 8
MIN_FINGERPRINT_BYTES = 6
MAX_FINGERPRINT_BYTES = 64
MAX_POSITION = 1 << 40

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "uint8": 1, "int8": 1}
DTYPES = tuple(ITEM_BYTES)
_KEY = re.compile(
    rb"kv1:\{(?P<tag>[0-9a-f]{32}):(?P<session>[A-Za-z0-9_-]{1,64})\}:(?P<fp12>[0-9a-f]{12}):"
    rb"(?P<group>[0-9]{1,6}):(?P<role>[a-z_]{1,16}):(?P<chunk>[0-9a-f]{32})"
)
_SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CODEC = re.compile(r"[a-z0-9_+-]{1,24}")


class FrameRole(Enum):
    """What a frame's payload is. The order of members is part of the format."""

    KV = "kv"
    """Keys and values: of a layer, or, of a group whose layers share keys, some of its rows."""
    SHARED_KEY = "shared_key"
    VALUE = "value"
    CENTROID = "centroid"
    WINDOW = "window"
    """Keys and values of the sinks, and of what follows the session's last group: `[1, kv, 16 + span, 2, d]`."""


ROLES = tuple(FrameRole)


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """What a frame says of its payload.

    Attributes:
        tenant_tag: 16 bytes that stand for the tenant.
        fingerprint: 6 to 64 bytes that stand for all that shapes stored KV (serving.md §4).
        layer_group: index of the part of a group that it is: of the layer, unless layers share keys.
        chunk_hash: names the content: 16 bytes.
        start: first token position.
        stop: one past the last token position.
        shape: of the raw payload.
        dtype: of the raw payload: bfloat16, float16, float32, uint8 or int8.
        codec: how the raw payload was made into the stored one; "raw" is not at all.
        codec_params: what the codec needs to be undone.
        tag_key_id: which of the server's secrets the tenant tag was made with.
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
    codec_params: tuple[int, ...] = ()
    tag_key_id: int = 0

    @property
    def key(self) -> bytes:
        """The key that the frame is kept under."""
        return frame_key(
            self.tenant_tag, self.session_id, self.fingerprint, self.layer_group, self.role, self.chunk_hash
        )

    @property
    def raw_bytes(self) -> int:
        """Bytes of the payload before the codec."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@functools.lru_cache(maxsize=1024)
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
        fingerprint[:6].hex().encode(),
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


def corrupt(reason: str, found: str) -> CorruptFrame:
    """What is raised for a frame that fails a check."""
    return CorruptFrame(f"frame fails its check ({reason}): {found}", reason=reason)


def key_parts(key: bytes) -> tuple[bytes, SessionId, int, bytes]:
    """Tenant tag, session, layer group and chunk hash that a frame's key names.

    Raises:
        CorruptFrame: it is no frame key.
    """
    parts = _KEY.fullmatch(key)
    if parts is None:
        raise corrupt("key", f"{key!r} is no frame key")
    return (
        bytes.fromhex(parts["tag"].decode()),
        SessionId(parts["session"].decode()),
        int(parts["group"]),
        bytes.fromhex(parts["chunk"].decode()),
    )


def check_header(header: FrameHeader, raw_bytes: int, stored_bytes: int) -> None:
    """What is true of every frame, written or read. `raw_bytes` are the header's own.

    Raises:
        ValueError: it isn't.
    """
    if header.dtype not in ITEM_BYTES or not _CODEC.fullmatch(header.codec):
        raise ValueError(f"dtype {header.dtype!r}, codec {header.codec!r}")
    if not 0 <= header.start < header.stop <= MAX_POSITION:
        raise ValueError(f"span {header.start}-{header.stop}")
    if len(header.shape) > MAX_DIMS or len(header.codec_params) > MAX_PARAMS:
        raise ValueError(f"shape {header.shape}, codec's params {header.codec_params}")
    if (
        not MIN_FINGERPRINT_BYTES <= len(header.fingerprint) <= MAX_FINGERPRINT_BYTES
        or len(header.chunk_hash) != CHUNK_HASH_BYTES
    ):
        raise ValueError(f"fingerprint of {len(header.fingerprint)}, chunk hash of {len(header.chunk_hash)} bytes")
    if max(raw_bytes, stored_bytes) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"payload of {stored_bytes} bytes, {raw_bytes} raw: the most are {MAX_PAYLOAD_BYTES}")
    if header.codec == "raw" and raw_bytes != stored_bytes:
        raise ValueError(f"payload of {stored_bytes} bytes, shape {header.shape} of {header.dtype}")
