"""Payloads sealed at rest by AES-256-GCM, under a key of each tenant's own. Knows nothing of tiers.

    operator's keys, by id ── HKDF with the tenant's tag ──► tenant's key ── AES-GCM, bound to the frame ──► payload

A sealed frame says so in its codec, `raw+gcm` in place of `raw`, and which of the operator's keys it is sealed with.
Keys are rotated by adding one and making it the current one: frames under an older key are read while that is kept.
"""

from __future__ import annotations

import functools
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kvservice.errors import ConfigError
from kvservice.tier.base import Buffer
from kvservice.tier.header import FrameHeader, corrupt

SUFFIX = "+gcm"
KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
SEAL_BYTES = NONCE_BYTES + TAG_BYTES
"""By which a sealed payload is longer."""
MAX_KEY_ID = (1 << 32) - 1


def is_sealed(header: FrameHeader) -> bool:
    """Whether a frame's payload is sealed."""
    return header.codec.endswith(SUFFIX)


class Keyring:
    """The operator's keys. For several threads.

    Args:
        keys: 32 bytes each, by id.
        current: id of the one to seal with.
    """

    def __init__(self, keys: Mapping[int, bytes], current: int) -> None:
        self._keys = dict(keys)
        self._current = current
        self._of_tenant = functools.lru_cache(maxsize=1024)(self._derive)

    def seal(self, header: FrameHeader, pieces: Sequence[Buffer]) -> tuple[FrameHeader, bytes]:
        """The header and the payload of the sealed frame, of the stored payload in pieces."""
        nonce = os.urandom(NONCE_BYTES)
        sealed = self._of_tenant(self._current, header.tenant_tag).encrypt(
            nonce, b"".join(bytes(piece) for piece in pieces), _bound(header, self._current)
        )
        params = (*header.codec_params, self._current)
        return replace(header, codec=header.codec + SUFFIX, codec_params=params), nonce + sealed

    def open(self, header: FrameHeader, stored: memoryview) -> tuple[FrameHeader, memoryview]:
        """The inverse of `seal`.

        Raises:
            CorruptFrame: sealed with a key that isn't here (`key_id`), or not what was sealed (`seal`).
        """
        if not header.codec_params or header.codec_params[-1] not in self._keys:
            raise corrupt("key_id", f"sealed with key {header.codec_params[-1:]}, known are {sorted(self._keys)}")
        key_id = header.codec_params[-1]
        plain = replace(header, codec=header.codec.removesuffix(SUFFIX), codec_params=header.codec_params[:-1])
        try:
            payload = self._of_tenant(key_id, header.tenant_tag).decrypt(
                bytes(stored[:NONCE_BYTES]), stored[NONCE_BYTES:], _bound(plain, key_id)
            )
        except (InvalidTag, ValueError):
            raise corrupt("seal", f"{len(stored)} bytes under key {key_id}") from None
        return plain, memoryview(payload)

    def _derive(self, key_id: int, tenant_tag: bytes) -> AESGCM:
        derived = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=b"kv1-seal" + tenant_tag)
        return AESGCM(derived.derive(self._keys[key_id]))


def _bound(header: FrameHeader, key_id: int) -> bytes:
    """What a payload can't be taken away from: its frame's key, span, form, and the key it is sealed with."""
    form = f"{header.start} {header.stop} {header.shape} {header.dtype} {header.codec} {header.codec_params} {key_id}"
    return header.key + b"\0" + form.encode()


def load_keyring(path: Path) -> Keyring:
    """Reads a file of keys: `{"current": 2, "keys": {"1": "64 hexadecimal digits", "2": "…"}}`.

    Raises:
        ConfigError: it can't be read, others may read it, or it isn't of that form.
    """
    try:
        text, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"file of KV keys {path}: {error.strerror}; give the path of a readable file") from None
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        raise ConfigError(f"file of KV keys {path}: other users may read it; run: chmod 600 {path}")
    try:
        record = json.loads(text)
        keys = {int(key_id): bytes.fromhex(digits) for key_id, digits in record["keys"].items()}
        current = int(record["current"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        # What is wrong with it may be a part of a key.
        raise _malformed(path) from None
    if current not in keys or any(len(key) != KEY_BYTES for key in keys.values()):
        raise _malformed(path)
    if not all(0 <= key_id <= MAX_KEY_ID for key_id in keys):
        raise _malformed(path)
    return Keyring(keys, current)


def _malformed(path: Path) -> ConfigError:
    return ConfigError(
        f'file of KV keys {path}: must hold {{"current": 1, "keys": {{"1": "64 hexadecimal digits"}}}}, with the '
        "current key among the keys"
    )
