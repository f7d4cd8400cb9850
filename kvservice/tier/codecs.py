"""How a frame's payload is made smaller, and whole again. Knows payloads, and nothing of frames or stores.

    raw       as it is
    zstd      lossless: of each number its last byte, which has sign and exponent, through zstd; the rest as it is
    values8   keys as they are; of values, 8 bits a number, with a scale and a least value for each row
    values4   the same with 4 bits, two numbers a byte: of a row's first and second half

Keys stay as they are: recall ranks tokens by them, and attention weighs by them. Payloads of KV are
`[groups, kv heads, 64, 2, d]`, of values `[groups, kv heads, 64, d]`; pieces are groups.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from kvservice.errors import ConfigError
from kvservice.tier.base import Buffer
from kvservice.tier.header import ITEM_BYTES, FrameHeader, FrameRole, corrupt

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ZSTD_LEVEL = 1
ZSTD_RATIO = 0.7
"""What is left of bf16 KV, about."""
SCALE_BYTES = 8
"""A scale and a least value, fp32."""

_VALUE_BITS = {"values8": 8, "values4": 4}
CODECS = ("raw", "zstd", *_VALUE_BITS)
LOSSLESS = frozenset(("raw", "zstd"))


def check_codec(codec: str) -> None:
    """Raises ConfigError unless there is such a codec."""
    if codec not in CODECS:
        raise ConfigError(f"codec {codec!r}: choose one of {', '.join(CODECS)}")


def expected_bytes(codec: str, role: FrameRole, shape: tuple[int, ...], dtype: str) -> float:
    """Bytes of a payload once it is encoded; of zstd about."""
    raw = prod(shape) * ITEM_BYTES[dtype]
    if codec == "zstd":
        return raw * ZSTD_RATIO
    if codec not in _VALUE_BITS or role not in (FrameRole.KV, FrameRole.VALUE):
        return raw
    num_values = prod(shape) // (2 if role is FrameRole.KV else 1)
    coded = num_values * _VALUE_BITS[codec] // 8 + num_values // shape[-1] * SCALE_BYTES
    return raw - num_values * ITEM_BYTES[dtype] + coded


def codec_for(codec: str, role: FrameRole) -> str:
    """The codec for payloads of a role, where values are to have `codec`: whatever has no values stays raw."""
    return "raw" if codec in _VALUE_BITS and role not in (FrameRole.KV, FrameRole.VALUE) else codec


def encode(header: FrameHeader, pieces: Sequence[Buffer]) -> list[Buffer]:
    """The stored payload, in pieces, by the header's codec. Raw pieces are passed on as they are."""
    if header.codec == "raw":
        return list(pieces)
    if header.codec == "zstd":
        return _pack(pieces, ITEM_BYTES[header.dtype])
    return _quantise(header, pieces)


def decode(header: FrameHeader, stored: memoryview, into: Sequence[memoryview]) -> None:
    """Undoes `encode`: writes the raw payload into pieces of memory, one for each group.

    Raises:
        CorruptFrame: the stored payload isn't what the codec makes, or the pieces have other sizes.
    """
    if not into or len({len(piece) for piece in into}) > 1 or sum(map(len, into)) != header.raw_bytes:
        raise corrupt("header", f"{header.raw_bytes} bytes for {[len(piece) for piece in into]}")
    try:
        if header.codec == "raw":
            _scatter(stored, into)
        elif header.codec == "zstd":
            _unpack(stored, into, ITEM_BYTES[header.dtype])
        else:
            _dequantise(header, stored, into)
    except (ValueError, IndexError, RuntimeError, zstd.ZstdError) as error:
        raise corrupt("codec", f"{header.codec}: {error}") from None


def _scatter(stored: memoryview, into: Sequence[memoryview]) -> None:
    start = 0
    for piece in into:
        piece[:] = stored[start : start + len(piece)]
        start += len(piece)


def _pack(pieces: Sequence[Buffer], item_bytes: int) -> list[Buffer]:
    numbers = np.concatenate([np.frombuffer(piece, np.uint8) for piece in pieces]).reshape(-1, item_bytes)
    packed = zstd.compress(numbers[:, -1].tobytes(), level=ZSTD_LEVEL)
    return [np.ascontiguousarray(numbers[:, :-1]).data.cast("B"), packed]


def _unpack(stored: memoryview, into: Sequence[memoryview], item_bytes: int) -> None:
    num_items = sum(map(len, into)) // item_bytes
    rest = num_items * (item_bytes - 1)
    unpacker = zstd.ZstdDecompressor()
    # Bounded: what a damaged or hostile payload unpacks to is never made whole.
    last = unpacker.decompress(stored[rest:], max_length=num_items + 1)
    if len(last) != num_items or not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"{len(last)} of {num_items} last bytes")
    first = np.frombuffer(stored[:rest], np.uint8).reshape(num_items, item_bytes - 1)
    start = 0
    for piece in into:
        numbers = np.frombuffer(piece, np.uint8).reshape(-1, item_bytes)
        stop = start + len(numbers)
        numbers[:, :-1] = first[start:stop]
        numbers[:, -1] = np.frombuffer(last, np.uint8)[start:stop]
        start = stop


def _quantise(header: FrameHeader, pieces: Sequence[Buffer]) -> list[Buffer]:
    bits = _VALUE_BITS[header.codec]
    rows = np.stack([_rows(header, piece) for piece in pieces])
    values = _floats(np.ascontiguousarray(rows[..., -1, :]), header.dtype)
    least = values.min(-1, keepdims=True)
    scale = (values.max(-1, keepdims=True) - least) / np.float32(2**bits - 1)
    # A row of equal values has no scale: its codes are 0.
    codes = np.rint((values - least) / np.maximum(scale, np.finfo(np.float32).tiny)).astype(np.uint8)
    if bits == 4:
        half = codes.shape[-1] // 2
        codes = codes[..., :half] | codes[..., half:] << 4
    made = [rows[..., :-1, :], scale, least, codes]
    return [np.ascontiguousarray(part).view(np.uint8).data.cast("B") for part in made if part.size]


def _dequantise(header: FrameHeader, stored: memoryview, into: Sequence[memoryview]) -> None:
    bits = _VALUE_BITS.get(header.codec)
    if bits is None or header.role not in (FrameRole.KV, FrameRole.VALUE):
        raise ValueError("no such codec for this role")
    width = header.shape[-1]
    num_rows = prod(header.shape[:-1]) // (2 if header.role is FrameRole.KV else 1)
    key_bytes = num_rows * width * ITEM_BYTES[header.dtype] if header.role is FrameRole.KV else 0
    scales = num_rows * SCALE_BYTES // 2
    if len(stored) != key_bytes + 2 * scales + num_rows * width * bits // 8:
        raise ValueError(f"{len(stored)} bytes for {num_rows} rows of {width}")
    # The last but one is of K and V: one of keys if there are any, and one of values.
    shape = (len(into), *_rows(header, into[0]).shape)
    keys = np.frombuffer(stored[:key_bytes], np.uint8).reshape(*shape[:-2], shape[-2] - 1, shape[-1])
    scale = np.frombuffer(stored[key_bytes : key_bytes + scales], "<f4").reshape(*shape[:-2], 1)
    least = np.frombuffer(stored[key_bytes + scales : key_bytes + 2 * scales], "<f4").reshape(*shape[:-2], 1)
    codes = np.frombuffer(stored[key_bytes + 2 * scales :], np.uint8).reshape(*shape[:-2], -1)
    if bits == 4:
        codes = np.concatenate((codes & 0xF, codes >> 4), -1)
    with np.errstate(over="ignore", invalid="ignore"):
        most = scale * np.float32(2**bits - 1) + least
    # Of any finite values the scale is no less than 0, and they all lie between the least and the most.
    if not (np.isfinite(most).all() and np.isfinite(least).all() and (scale >= 0).all()):
        raise ValueError("scales that no values have")
    values = codes * scale
    values += least
    made = torch.from_numpy(values).to(getattr(torch, header.dtype)).view(torch.uint8).numpy()
    for index, piece in enumerate(into):
        rows = _rows(header, piece)
        rows[..., :-1, :] = keys[index]
        rows[..., -1, :] = made[index]


def _rows(header: FrameHeader, piece: Buffer) -> NDArray[np.uint8]:
    """One group as bytes `[kv heads, 64, 2 or 1, bytes of a row]`, a view of its memory; values are the last."""
    parts = 2 if header.role is FrameRole.KV else 1
    row_bytes = header.shape[-1] * ITEM_BYTES[header.dtype]
    return np.frombuffer(piece, np.uint8).reshape(header.shape[1], header.shape[2], parts, row_bytes)


def _floats(rows: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    if dtype == "bfloat16":
        # A bf16 is the upper half of an fp32.
        return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return rows.view({"float16": "<f2", "float32": "<f4"}[dtype]).astype(np.float32)
