from __future__ import annotations

import threading

import pytest
import torch
from redis import Redis

from kvservice.tier.base import open_tier
from kvservice.tier.groups import GroupFrames, kv_fingerprint
from kvservice.tier.wire import decode_frame
from kvservice.tier.writer import WriteBehind
from kvservice.types import GROUP_TOKENS, SINK_TOKENS, SessionId

TAG = bytes(range(16))
SESSION = SessionId("session-1")
FINGERPRINT = kv_fingerprint(weights="abc")
SHAPE = (2, 1, GROUP_TOKENS, 2, 8)
GROUP_BYTES = 2 * GROUP_TOKENS * 2 * 8 * 2
FLUSH_S = 10.0


def tokens_of(num_groups: int) -> list[int]:
    return list(range(SINK_TOKENS + num_groups * GROUP_TOKENS))


def groups_of(num_groups: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_groups, *SHAPE, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@pytest.fixture
def behind(kv_url: str):
    writer = WriteBehind(open_tier(kv_url))
    writer.start()
    yield writer
    writer.close(FLUSH_S)


def stored(kv_url: str) -> dict[tuple[int, int], bytes]:
    """Payloads by token span."""
    client = Redis.from_url(kv_url)
    frames = [decode_frame(key, client.get(key)) for key in client.scan_iter("kv1:*") if client.type(key) == b"string"]
    client.close()
    return {(header.start, header.stop): bytes(payload) for header, payload in frames}


def test_each_group_becomes_one_frame_with_its_bytes_and_its_span(behind: WriteBehind, kv_url: str) -> None:
    writer = GroupFrames(behind, FINGERPRINT, GROUP_BYTES)
    groups = groups_of(3)
    writer.write(TAG, SESSION, 0, tokens_of(3), groups)
    assert behind.flush(FLUSH_S)
    assert stored(kv_url) == {
        (16 + 64 * i, 80 + 64 * i): bytes(groups[i].view(torch.uint8).numpy().tobytes()) for i in range(3)
    }
    assert writer.bytes_of(TAG, SESSION) == writer.stats().stored_bytes > 3 * GROUP_BYTES


def test_a_group_has_the_same_key_whenever_it_is_written(behind: WriteBehind, kv_url: str) -> None:
    writer = GroupFrames(behind, FINGERPRINT, GROUP_BYTES)
    writer.write(TAG, SESSION, 0, tokens_of(3), groups_of(3))
    writer.write(TAG, SESSION, 2, tokens_of(3), groups_of(3)[2:])
    assert behind.flush(FLUSH_S)
    assert len(stored(kv_url)) == 3


def test_a_group_after_other_tokens_has_another_key(behind: WriteBehind, kv_url: str) -> None:
    writer = GroupFrames(behind, FINGERPRINT, GROUP_BYTES)
    others = [9, *tokens_of(1)[1:]]
    writer.write(TAG, SESSION, 0, tokens_of(1), groups_of(1))
    writer.write(TAG, SESSION, 0, others, groups_of(1))
    assert behind.flush(FLUSH_S)
    client = Redis.from_url(kv_url)
    assert len([key for key in client.scan_iter("kv1:*") if client.type(key) == b"string"]) == 2
    client.close()


def test_a_deleted_session_leaves_nothing(behind: WriteBehind, kv_url: str) -> None:
    writer = GroupFrames(behind, FINGERPRINT, GROUP_BYTES)
    writer.write(TAG, SESSION, 0, tokens_of(2), groups_of(2))
    writer.delete(TAG, SESSION)
    assert behind.flush(FLUSH_S)
    assert stored(kv_url) == {}
    assert writer.bytes_of(TAG, SESSION) == 0


def test_a_full_queue_holds_the_engine_up_and_drops_nothing(kv_url: str) -> None:
    behind = WriteBehind(open_tier(kv_url), max_pending_bytes=GROUP_BYTES)
    behind.start()
    try:
        writer = GroupFrames(behind, FINGERPRINT, GROUP_BYTES)
        writer.write(TAG, SESSION, 0, tokens_of(8), groups_of(8))
        assert behind.flush(FLUSH_S)
        assert behind.stats().written_frames == 8
        assert not behind.stats().failures
    finally:
        behind.close(FLUSH_S)


def test_waiting_for_room_ends_as_soon_as_there_is_some(kv_url: str) -> None:
    behind = WriteBehind(open_tier(kv_url), max_pending_bytes=GROUP_BYTES)
    behind.start()
    try:
        writer = GroupFrames(behind, FINGERPRINT, GROUP_BYTES)
        waiter = threading.Thread(target=writer.wait_for_room, args=(1, FLUSH_S))
        writer.write(TAG, SESSION, 0, tokens_of(1), groups_of(1))
        waiter.start()
        waiter.join(FLUSH_S / 2)
        assert not waiter.is_alive()
        assert behind.flush(FLUSH_S)
        assert writer.has_room(1)
    finally:
        behind.close(FLUSH_S)


def test_what_shapes_stored_kv_changes_the_fingerprint() -> None:
    assert kv_fingerprint(weights="a", rope_theta=1.0) == kv_fingerprint(rope_theta=1.0, weights="a")
    assert kv_fingerprint(weights="a") != kv_fingerprint(weights="b")
