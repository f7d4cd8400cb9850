"""Frames and keys: what was written comes back, and nothing else ever does."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvservice.errors import CorruptFrame, InternalError
from kvservice.tier import header as header_module
from kvservice.tier import wire
from kvservice.tier.header import FrameHeader, FrameRole, chunk_hash, frame_key
from kvservice.tier.wire import decode_frame, encode_frame
from kvservice.types import SessionId

TAG = bytes(range(16))
FINGERPRINT = bytes(range(32))
HEADER = FrameHeader(
    tenant_tag=TAG,
    session_id=SessionId("ab" * 16),
    fingerprint=FINGERPRINT,
    layer_group=0,
    role=FrameRole.KV,
    chunk_hash=chunk_hash(TAG, b"", range(64)),
    start=16,
    stop=80,
    shape=(2, 3, 4),
    dtype="bfloat16",
)
PAYLOAD = bytes(range(48))
FIELDS_1 = {
    "version": 1,
    "key": HEADER.key.decode(),
    "tenant": TAG.hex(),
    "fingerprint": FINGERPRINT.hex(),
    "group": 0,
    "role": "kv",
    "span": [16, 80],
    "shape": [2, 3, 4],
    "dtype": "bfloat16",
    "codec": "raw",
    "raw": 48,
    "stored": 48,
}
GOLDEN_FRAME = "e1344daec90cd9bd"
GOLDEN_FRAME_1 = "78592a7c1511d99f"


def reason_of(key: bytes, data: bytes) -> str:
    with pytest.raises(CorruptFrame) as caught:
        decode_frame(key, data)
    return caught.value.reason


def reframed(of_version: int = 2, /, **changes: object) -> bytes:
    """A frame whose checksum is right and whose header says something else; of version 1, a field of its JSON."""
    if of_version == 1:
        fields = FIELDS_1 | changes
        packed, magic = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode(), b"KVC1"
    else:
        names = ("role", "dtype", "dims", "params", "codec_len", "fp_len", "key_len", "group", "key_id")
        names += ("start", "stop", "raw", "stored", "tag")
        old = bytes(encode_frame(HEADER, PAYLOAD))
        packed = old[8 : 8 + int.from_bytes(old[4:8], "little")]
        fields = dict(zip(names, wire._FIXED.unpack_from(packed), strict=True))
        rest = changes.pop("rest", packed[wire._FIXED.size :])
        packed, magic = wire._FIXED.pack(*(fields | changes).values()) + rest, b"KVC2"
    return sealed(magic + len(packed).to_bytes(4, "little") + packed + PAYLOAD)


def sealed(body: bytes) -> bytes:
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


@given(
    shape=st.lists(st.integers(0, 6), max_size=4).map(tuple),
    dtype=st.sampled_from(["bfloat16", "float16", "float32", "uint8", "int8"]),
    role=st.sampled_from(FrameRole),
    group=st.integers(0, 999_999),
    start=st.integers(0, 2**31),
    length=st.integers(1, 64),
    data=st.data(),
)
def test_frame_round_trips(shape, dtype, role, group, start, length, data):
    header = replace(HEADER, shape=shape, dtype=dtype, role=role, layer_group=group, start=start, stop=start + length)
    payload = data.draw(st.binary(min_size=header.raw_bytes, max_size=header.raw_bytes))
    decoded, stored = decode_frame(header.key, encode_frame(header, payload))
    assert decoded == header
    assert bytes(stored) == payload


@given(cut=st.integers(0, len(encode_frame(HEADER, PAYLOAD)) - 1))
def test_every_truncation_is_found(cut):
    frame = bytes(encode_frame(HEADER, PAYLOAD))
    assert reason_of(HEADER.key, frame[:cut]) in ("truncated", "checksum")


def test_frame_cut_in_its_payload_is_called_truncated():
    frame = bytes(encode_frame(HEADER, PAYLOAD))
    assert reason_of(HEADER.key, frame[:-20]) == "truncated"


def test_every_single_changed_byte_is_found():
    frame = bytearray(encode_frame(HEADER, PAYLOAD))
    for position in range(len(frame)):
        for flip in (0x01, 0x80, 0xFF):
            frame[position] ^= flip
            reason_of(HEADER.key, frame)
            frame[position] ^= flip


def test_frame_under_another_key_is_refused():
    other = replace(HEADER, session_id=SessionId("cd" * 16))
    assert reason_of(other.key, encode_frame(HEADER, PAYLOAD)) == "key"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (b"KVC3" + bytes(100), "version"),
        (b"PNG!" + bytes(100), "magic"),
        (b"KVC2\xff\xff\xff\xff" + bytes(100), "header"),
        (b"KVC2\xff\x00\x00\x00" + bytes(100), "truncated"),
        (reframed(stored=47), "header"),
        (reframed(raw=47), "header"),
        (reframed(dims=2), "header"),
        (reframed(dims=255, params=255), "header"),
        (reframed(start=80, stop=16), "header"),
        (reframed(stop=2**63), "header"),
        (reframed(role=200), "header"),
        (reframed(dtype=200), "header"),
        (reframed(fp_len=3), "header"),
        (reframed(tag=b"\xff" * 16), "key"),
        (reframed(group=7), "key"),
        (reframed(rest=b""), "header"),
        (sealed(b"KVC2" + bytes(4)), "header"),
        (b"KVC1\xff\xff\xff\xff" + bytes(100), "header"),
        (b"KVC1\xff\x00\x00\x00" + bytes(100), "truncated"),
        (reframed(1, version=2), "version"),
        (reframed(1, stored=47), "header"),
        (reframed(1, shape=[2, 3, 5]), "header"),
        (reframed(1, shape=[2**40, 2**40]), "header"),
        (reframed(1, span=[80, 16]), "header"),
        (reframed(1, role="secret"), "header"),
        (reframed(1, dtype="complex64"), "header"),
        (reframed(1, codec="zstd"), "header"),
        (reframed(1, tenant="ff" * 16), "header"),
        (reframed(1, fingerprint="ff" * 32), "key"),
        (reframed(1, more=1), "header"),
    ],
)
def test_damaged_frame_is_refused_with_its_reason(data, reason):
    assert reason_of(HEADER.key, data) == reason


def test_payload_is_a_view_not_a_copy():
    frame = encode_frame(HEADER, PAYLOAD)
    _, payload = decode_frame(HEADER.key, frame)
    assert payload.obj is frame
    assert payload.readonly


def test_payload_that_does_not_fit_its_shape_cannot_be_written():
    with pytest.raises(InternalError, match="payload of 47 bytes"):
        encode_frame(HEADER, PAYLOAD[:-1])


def test_payload_over_the_limit_cannot_be_written(monkeypatch):
    monkeypatch.setattr(header_module, "MAX_PAYLOAD_BYTES", 47)
    with pytest.raises(InternalError):
        encode_frame(HEADER, PAYLOAD)


def test_wire_format_of_a_known_frame_has_not_changed():
    assert xxhash.xxh3_64_hexdigest(bytes(encode_frame(HEADER, PAYLOAD))) == GOLDEN_FRAME


def test_frame_of_version_1_is_still_read():
    frame = reframed(1)
    assert xxhash.xxh3_64_hexdigest(frame) == GOLDEN_FRAME_1
    header, payload = decode_frame(HEADER.key, frame)
    assert header == HEADER
    assert bytes(payload) == PAYLOAD


@given(position=st.integers(0, 10**6), patch=st.binary(min_size=1, max_size=40), resealed=st.booleans())
def test_damage_anywhere_is_refused_or_changes_nothing_but_the_payload(position, patch, resealed):
    frame = bytearray(encode_frame(HEADER, PAYLOAD))
    start = position % (len(frame) - 8)
    frame[start : start + len(patch)] = patch[: len(frame) - 8 - start]
    data = sealed(bytes(frame[:-8])) if resealed else bytes(frame)
    with contextlib.suppress(CorruptFrame):
        header, payload = decode_frame(HEADER.key, data)
        assert (header.key, len(payload)) == (HEADER.key, header.raw_bytes if header.codec == "raw" else 48)


@given(data=st.binary(max_size=400), magic=st.sampled_from([b"KVC1", b"KVC2", b""]))
def test_any_bytes_are_refused_with_a_reason(data, magic):
    with pytest.raises(CorruptFrame):
        decode_frame(HEADER.key, sealed(magic + data))


def test_codec_its_params_and_the_key_id_are_kept():
    header = replace(HEADER, codec="values8", codec_params=(64, 7), tag_key_id=3)
    decoded, stored = decode_frame(header.key, encode_frame(header, [b"ab", b"c"]))
    assert decoded == header
    assert bytes(stored) == b"abc"


def test_key_has_the_form_that_the_design_gives():
    key = frame_key(TAG, SessionId("s1"), FINGERPRINT, 3, FrameRole.SHARED_KEY, b"\xaa" * 16)
    assert key == b"kv1:{000102030405060708090a0b0c0d0e0f:s1}:000102030405:3:shared_key:" + b"aa" * 16


@pytest.mark.parametrize("session_id", ["", "a}b", "a:b", "a*", "x" * 65])
def test_session_id_that_would_break_a_key_is_refused(session_id):
    with pytest.raises(InternalError, match="session_id="):
        frame_key(TAG, SessionId(session_id), FINGERPRINT, 0, FrameRole.KV, bytes(16))


def test_chunk_hash_depends_on_tokens_on_what_came_before_and_on_the_tenant():
    first = chunk_hash(TAG, b"", [1, 2, 3])
    assert len(first) == 16
    assert first == chunk_hash(TAG, b"", (1, 2, 3))
    others = [chunk_hash(TAG, b"", [1, 2]), chunk_hash(TAG, first, [1, 2, 3]), chunk_hash(bytes(16), b"", [1, 2, 3])]
    assert len({first, *others}) == 4


def test_chunk_hash_refuses_a_previous_hash_of_another_length():
    with pytest.raises(InternalError, match="15 bytes"):
        chunk_hash(TAG, bytes(15), [1])
