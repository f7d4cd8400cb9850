"""Payloads sealed at rest: opened by the right key for the right frame, and by nothing else."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from redis import Redis

from kvservice.errors import ConfigError, CorruptFrame
from kvservice.tier.base import open_source, open_tier
from kvservice.tier.header import FrameHeader, FrameRole, chunk_hash
from kvservice.tier.reader import FrameReader, FrameWant, Miss
from kvservice.tier.sealing import SEAL_BYTES, Keyring, is_sealed, load_keyring
from kvservice.tier.writer import WriteBehind
from kvservice.types import SessionId

TAG = b"t" * 16
PAYLOAD = bytes(range(256)) * 8
HEADER = FrameHeader(
    TAG, SessionId("s"), TAG, 0, FrameRole.KV, chunk_hash(TAG, b"", [1]), 16, 80, (2, 1, 64, 2, 4), "bfloat16"
)
KEYS = {1: b"1" * 32, 2: b"2" * 32}


def sealed(keyring=None, header=HEADER):
    made, stored = (keyring or Keyring(KEYS, 1)).seal(header, [memoryview(PAYLOAD)[:1000], memoryview(PAYLOAD)[1000:]])
    return made, memoryview(stored)


def test_what_was_sealed_is_opened_and_says_what_it_is():
    header, stored = sealed()
    assert is_sealed(header)
    assert (header.codec, header.codec_params, header.key) == ("raw+gcm", (1,), HEADER.key)
    assert len(stored) == len(PAYLOAD) + SEAL_BYTES
    plain, payload = Keyring(KEYS, 2).open(header, stored)
    assert (plain, bytes(payload)) == (HEADER, PAYLOAD)


def test_no_two_seals_are_alike():
    assert bytes(sealed()[1]) != bytes(sealed()[1])


@pytest.mark.parametrize("place", [0, 11, 12, 500, -1])
def test_any_changed_byte_is_found(place):
    header, stored = sealed()
    damaged = bytearray(stored)
    damaged[place] ^= 1
    with pytest.raises(CorruptFrame) as caught:
        Keyring(KEYS, 1).open(header, memoryview(damaged))
    assert caught.value.reason == "seal"


@pytest.mark.parametrize(
    "change",
    [
        {"tenant_tag": b"u" * 16},
        {"session_id": SessionId("other")},
        {"layer_group": 1},
        {"start": 0},
        {"chunk_hash": b"x" * 16},
        {"codec_params": (2,)},
    ],
)
def test_seal_holds_for_its_frame_and_its_key_alone(change):
    header, stored = sealed()
    with pytest.raises(CorruptFrame):
        Keyring(KEYS, 1).open(replace(header, **change), stored)


def test_key_that_is_gone_is_named():
    header, stored = sealed()
    with pytest.raises(CorruptFrame) as caught:
        Keyring({2: b"2" * 32}, 2).open(header, stored)
    assert caught.value.reason == "key_id"


@pytest.fixture
def write(kv_url):
    def put(keyring, header=HEADER):
        writer = WriteBehind(open_tier(kv_url), keyring=keyring)
        writer.start()
        assert writer.submit(header, [memoryview(PAYLOAD)[:1024], memoryview(PAYLOAD)[1024:]])
        assert writer.flush(5.0)
        writer.close(5.0)

    return put


def read(kv_url, keyring, header=HEADER):
    reader = FrameReader(open_source(kv_url), keyring=keyring)
    memory = bytearray(len(PAYLOAD))
    try:
        (result,) = reader.fetch(
            [FrameWant(header, [memoryview(memory)[:1024], memoryview(memory)[1024:]])], time.monotonic() + 5
        )
    finally:
        reader.close()
    return result.miss or bytes(memory)


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_tier_holds_nothing_legible_and_gives_it_back(kv_url, write, codec):
    header = replace(HEADER, codec=codec)
    write(Keyring(KEYS, 1), header)
    with Redis.from_url(kv_url) as client:
        assert PAYLOAD[:64] not in client.get(header.key)
    assert read(kv_url, Keyring(KEYS, 1), header) == PAYLOAD


def test_rotation_loses_nothing_until_the_old_key_goes(kv_url, write):
    write(Keyring(KEYS, 1))
    assert read(kv_url, Keyring(KEYS, 2)) == PAYLOAD
    assert read(kv_url, Keyring({2: KEYS[2]}, 2)) is Miss.VERSION
    assert read(kv_url, None) is Miss.VERSION
    assert read(kv_url, Keyring({1: b"9" * 32}, 1)) is Miss.CHECKSUM
    write(Keyring({2: KEYS[2]}, 2))
    assert read(kv_url, Keyring({2: KEYS[2]}, 2)) == PAYLOAD


def test_frames_from_before_are_read_once_there_are_keys(kv_url, write):
    write(None)
    assert read(kv_url, Keyring(KEYS, 1)) == PAYLOAD


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys.json"

    def write(record, mode=0o600):
        path.write_text(record if isinstance(record, str) else json.dumps(record))
        path.chmod(mode)
        return path

    return write


def test_keys_come_from_a_file(key_file):
    path = key_file({"current": 2, "keys": {"1": "31" * 32, "2": "32" * 32}})
    header, stored = sealed(load_keyring(path))
    assert header.codec_params == (2,)
    assert bytes(Keyring(KEYS, 1).open(header, stored)[1]) == PAYLOAD


@pytest.mark.parametrize(
    "record",
    [
        "[" * 100_000,
        "{}",
        {"current": 3, "keys": {"1": "31" * 32}},
        {"current": 1, "keys": {"1": "31"}},
        {"current": 1, "keys": ["31" * 32]},
        {"current": "x", "keys": {"1": "31" * 32}},
        {"current": float("inf"), "keys": {"1": "31" * 32}},
        {"current": -1, "keys": {"-1": "31" * 32}},
    ],
)
def test_malformed_file_is_refused_and_shows_no_key(key_file, record):
    with pytest.raises(ConfigError, match="must hold") as caught:
        load_keyring(key_file(record))
    assert "3131" not in caught.value.message


def test_file_that_others_may_read_is_refused(key_file):
    with pytest.raises(ConfigError, match="chmod 600"):
        load_keyring(key_file({"current": 1, "keys": {"1": "31" * 32}}, 0o640))
