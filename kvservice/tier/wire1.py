"""The header of frames of version 1, canonical JSON. They are read, and no longer written."""

from __future__ import annotations

import json
from math import prod

from kvservice.tier.header import ITEM_BYTES, MAX_DIMS, MAX_PAYLOAD_BYTES, FrameHeader, FrameRole, corrupt, key_parts

MAX_HEADER_BYTES = 16 << 10
_FIELDS = frozenset(
    ("version", "key", "tenant", "fingerprint", "group", "role", "span", "shape", "dtype", "codec", "raw", "stored")
)


def stored_bytes(packed: bytes) -> int:
    """Bytes of the payload by a header that may be damaged; 0 where it doesn't say."""
    try:
        stored = json.loads(packed)["stored"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return 0
    return stored if isinstance(stored, int) else 0


def parse_header(key: bytes, packed: bytes, num_bytes: int) -> FrameHeader:
    """The header of a frame that was found under `key` with a payload of `num_bytes`.

    Raises:
        CorruptFrame: it isn't what was written under this key; `reason` is version, header or key.
    """
    try:
        fields = json.loads(packed)
    except (ValueError, RecursionError):
        raise corrupt("header", "not JSON") from None
    if not isinstance(fields, dict) or fields.get("version") != 1:
        found = fields.get("version") if isinstance(fields, dict) else fields
        raise corrupt("version", f"format version {found!r} in a frame of version 1")
    if fields.keys() != _FIELDS:
        raise corrupt("header", f"fields {sorted(fields)}")
    if fields["key"] != key.decode("latin-1"):
        raise corrupt("key", f"it was written as {fields['key']!r}")
    try:
        header = _header_of(fields, key)
    except (ValueError, TypeError, KeyError) as error:
        raise corrupt("header", str(error)) from None
    if header.key != key:
        raise corrupt("key", "its fields make another key")
    if fields["stored"] != num_bytes or header.raw_bytes != num_bytes:
        raise corrupt("header", f"payload of {num_bytes} bytes, shape {header.shape} of {header.dtype}")
    return header


def _header_of(fields: dict[str, object], key: bytes) -> FrameHeader:
    tag, session_id, group, name = key_parts(key)
    start, stop = _integers(fields["span"])
    shape = _integers(fields["shape"])
    dtype = fields["dtype"]
    if fields["tenant"] != tag.hex() or fields["group"] != group:
        raise ValueError(f"tenant {fields['tenant']!r}, group {fields['group']!r} under another's key")
    # Version 1 never had another codec.
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES or fields["codec"] != "raw":
        raise ValueError(f"dtype {dtype!r}, codec {fields['codec']!r}")
    if not 0 <= start < stop or len(shape) > MAX_DIMS:
        raise ValueError(f"span {start}-{stop}, shape {shape}")
    raw_bytes = prod(shape) * ITEM_BYTES[dtype]
    if raw_bytes != fields["raw"] or raw_bytes > MAX_PAYLOAD_BYTES:
        raise ValueError(f"raw size {fields['raw']!r}, shape {shape} of {dtype}")
    return FrameHeader(
        tenant_tag=tag,
        session_id=session_id,
        fingerprint=bytes.fromhex(str(fields["fingerprint"])),
        layer_group=group,
        role=FrameRole(fields["role"]),
        chunk_hash=name,
        start=start,
        stop=stop,
        shape=shape,
        dtype=dtype,
    )


def _integers(value: object) -> tuple[int, ...]:
    """A JSON list as a tuple of integers ≥ 0."""
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise ValueError(f"{value!r} is no list of integers")
    return tuple(value)
