from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis

from kvservice.config.recipes import POD, RECALL
from kvservice.errors import ConfigError, InternalError
from kvservice.tier import chunks
from kvservice.tier.base import open_source, open_tier
from kvservice.tier.chunks import MAX_FRAME_BYTES, MIN_FRAME_BYTES, OVERHEAD_BYTES, groups_per_chunk, size_class
from kvservice.tier.frame_sets import Chunk, FrameSet, FrameSets, kv_fingerprint
from kvservice.tier.groups import GroupFrames, layer_memory
from kvservice.tier.reader import FrameReader, FrameWant
from kvservice.tier.wire import decode_frame
from kvservice.tier.writer import WriteBehind
from kvservice.types import GROUP_TOKENS, SINK_TOKENS, SessionId

TAG = bytes(range(16))
SESSION = SessionId("session-1")
LAYERS = 2
# 90 KiB a layer: a chunk has 5 groups.
FRAMES = FrameSet(kv_fingerprint(weights="abc"), (LAYERS, 5, GROUP_TOKENS, 2, 72), torch.bfloat16)
# Three rows fewer, so that parts are of 4 and 3.
SHARED = replace(FRAMES, fingerprint=kv_fingerprint(weights="abc", anchors="0"), shared_rows=7)
SETS = FrameSets(FRAMES, SHARED)
FLUSH_S = 10.0


def tokens_of(num_groups: int) -> list[int]:
    return list(range(SINK_TOKENS + num_groups * GROUP_TOKENS))


def groups_of(num_groups: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_groups, *FRAMES.group_shape, generator=generator).to(torch.bfloat16)


@pytest.fixture
def behind(kv_url: str):
    writer = WriteBehind(open_tier(kv_url))
    writer.start()
    yield writer
    writer.close(FLUSH_S)


@pytest.fixture
def writer(behind: WriteBehind) -> GroupFrames:
    return GroupFrames(behind, SETS)


def stored(kv_url: str) -> dict[tuple[int, int, int], bytes]:
    """Payloads by first and last group, and layer."""
    client = Redis.from_url(kv_url)
    frames = [decode_frame(key, client.get(key)) for key in client.scan_iter("kv1:*") if client.type(key) == b"string"]
    client.close()
    return {
        ((header.start - 16) // 64, (header.stop - 16) // 64, header.layer_group): bytes(payload)
        for header, payload in frames
    }


def bytes_of(groups: torch.Tensor, layer: int) -> bytes:
    return groups[:, layer].contiguous().view(torch.uint8).numpy().tobytes()


def test_full_chunk_becomes_a_frame_for_each_layer(writer, behind, kv_url) -> None:
    groups = groups_of(5)
    writer.write(TAG, SESSION, RECALL, 0, tokens_of(5), groups)
    assert behind.flush(FLUSH_S)
    assert stored(kv_url) == {(0, 5, layer): bytes_of(groups, layer) for layer in range(LAYERS)}
    assert writer.bytes_of(TAG, SESSION) == writer.stats().stored_bytes > 5 * FRAMES.group_bytes


def test_chunks_are_the_same_however_groups_come(writer, behind, kv_url) -> None:
    groups = groups_of(12)
    start = 0
    for count in (1, 3, 2, 5, 1):
        writer.write(TAG, SESSION, RECALL, start, tokens_of(start + count), groups[start : start + count])
        start += count
    assert behind.flush(FLUSH_S)
    one_by_one = set(Redis.from_url(kv_url).keys("kv1:*"))
    writer.write(TAG, SESSION, RECALL, 0, tokens_of(12), groups)
    assert behind.flush(FLUSH_S)
    assert set(Redis.from_url(kv_url).keys("kv1:*")) == one_by_one
    assert stored(kv_url).keys() == {(a, a + 5, layer) for a in (0, 5) for layer in range(LAYERS)}


def test_checkpoint_writes_what_there_is_and_the_full_chunk_takes_its_place(writer, behind, kv_url) -> None:
    groups = groups_of(5)
    writer.write(TAG, SESSION, RECALL, 0, tokens_of(2), groups[:2])
    writer.checkpoint(TAG, SESSION)
    assert behind.flush(FLUSH_S)
    assert [(chunk.first_group, chunk.stop_group) for chunk in writer.chunks_of(TAG, SESSION)] == [(0, 2)]
    writer.checkpoint(TAG, SESSION)
    assert behind.stats().written_frames == LAYERS
    writer.write(TAG, SESSION, RECALL, 2, tokens_of(5), groups[2:])
    assert behind.flush(FLUSH_S)
    assert [(chunk.first_group, chunk.stop_group) for chunk in writer.chunks_of(TAG, SESSION)] == [(0, 5)]
    assert stored(kv_url)[0, 5, 1] == bytes_of(groups, 1)


def test_checkpoint_of_a_session_without_groups_is_nothing(writer, behind) -> None:
    writer.checkpoint(TAG, SESSION)
    assert behind.stats().written_frames == 0
    assert writer.chunks_of(TAG, SESSION) == []


def test_what_follows_other_tokens_has_other_names_and_leaves_a_gap(writer, behind) -> None:
    writer.write(TAG, SESSION, RECALL, 0, tokens_of(7), groups_of(7))
    writer.checkpoint(TAG, SESSION)
    assert behind.flush(FLUSH_S)
    before = writer.chunks_of(TAG, SESSION)
    others = [*tokens_of(5), *([9] * 3 * GROUP_TOKENS)]
    writer.write(TAG, SESSION, RECALL, 5, others, groups_of(3))
    writer.checkpoint(TAG, SESSION)
    assert behind.flush(FLUSH_S)
    after = writer.chunks_of(TAG, SESSION)
    assert after[0] == before[0]
    assert (after[1].first_group, after[1].stop_group) == (5, 8)
    assert after[1].name != before[1].name
    # Group 6 is of the text of group 5 no more: nothing leads up to it.
    writer.write(TAG, SESSION, RECALL, 7, tokens_of(9), groups_of(2))
    writer.checkpoint(TAG, SESSION)
    assert behind.flush(FLUSH_S)
    assert writer.chunks_of(TAG, SESSION) == after[:1]


def test_tail_that_is_cut_goes_on_from_there(writer, behind) -> None:
    writer.write(TAG, SESSION, RECALL, 0, tokens_of(4), groups_of(4))
    writer.write(TAG, SESSION, RECALL, 2, tokens_of(5), groups_of(3, seed=1))
    assert behind.flush(FLUSH_S)
    assert [(chunk.first_group, chunk.stop_group) for chunk in writer.chunks_of(TAG, SESSION)] == [(0, 5)]


def test_session_longest_without_a_group_gives_up_its_tail_when_there_are_too_many(behind) -> None:
    writer = GroupFrames(behind, SETS, max_tail_bytes=3 * FRAMES.group_bytes)
    other = SessionId("other")
    writer.write(TAG, SESSION, RECALL, 0, tokens_of(2), groups_of(2))
    writer.write(TAG, other, RECALL, 0, tokens_of(2), groups_of(2))
    assert behind.flush(FLUSH_S)
    assert [(chunk.first_group, chunk.stop_group) for chunk in writer.chunks_of(TAG, SESSION)] == [(0, 2)]
    assert writer.chunks_of(TAG, other) == []
    writer.write(TAG, SESSION, RECALL, 2, tokens_of(5), groups_of(3))
    assert behind.flush(FLUSH_S)
    spans = [(chunk.first_group, chunk.stop_group) for chunk in writer.chunks_of(TAG, SESSION)]
    assert spans == [(0, 2), (2, 5)]


def test_session_that_is_gone_keeps_no_tail_and_what_was_queued_is_written(writer, behind) -> None:
    writer.write(TAG, SESSION, RECALL, 0, tokens_of(2), groups_of(2))
    writer.write(TAG, SessionId("other"), RECALL, 0, tokens_of(2), groups_of(2))
    writer.checkpoint(TAG, SESSION)
    assert writer.begins_at(TAG, SESSION, RECALL, 2) == 2
    writer.forget(SESSION)
    # Groups are wanted from the start of the chunk again: none of them is here.
    assert writer.begins_at(TAG, SESSION, RECALL, 2) == 0
    assert writer.begins_at(TAG, SessionId("other"), RECALL, 2) == 2
    assert behind.flush(FLUSH_S)
    assert [(chunk.first_group, chunk.stop_group) for chunk in writer.chunks_of(TAG, SESSION)] == [(0, 2)]


def test_chunk_that_was_given_up_is_no_part_of_the_session(kv_url) -> None:
    behind = WriteBehind(open_tier(kv_url))
    behind.start()
    behind.close(FLUSH_S)
    writer = GroupFrames(behind, SETS)
    writer.write(TAG, SESSION, RECALL, 0, tokens_of(5), groups_of(5))
    assert writer.chunks_of(TAG, SESSION) == []
    assert behind.stats().failures == {"closed": LAYERS}


def test_deleted_session_leaves_nothing(writer, behind, kv_url) -> None:
    writer.write(TAG, SESSION, RECALL, 0, tokens_of(7), groups_of(7))
    writer.delete(TAG, SESSION)
    writer.checkpoint(TAG, SESSION)
    assert behind.flush(FLUSH_S)
    assert stored(kv_url) == {}
    assert writer.bytes_of(TAG, SESSION) == 0
    assert writer.chunks_of(TAG, SESSION) == []


def test_what_has_expired_is_forgotten(behind) -> None:
    now = 0.0
    writer = GroupFrames(behind, SETS, clock=lambda: now)
    writer.write(TAG, SESSION, RECALL, 0, tokens_of(5), groups_of(5))
    assert behind.flush(FLUSH_S)
    now = behind.ttl_s + 1
    writer.write(TAG, SessionId("other"), RECALL, 0, tokens_of(5), groups_of(5))
    assert writer.chunks_of(TAG, SESSION) == []


def test_full_queue_holds_the_engine_up_and_drops_nothing(kv_url) -> None:
    behind = WriteBehind(open_tier(kv_url), max_pending_bytes=FRAMES.group_bytes)
    behind.start()
    try:
        writer = GroupFrames(behind, SETS)
        writer.write(TAG, SESSION, RECALL, 0, tokens_of(10), groups_of(10))
        assert behind.flush(FLUSH_S)
        assert behind.stats().written_frames == 2 * LAYERS
        assert not behind.stats().failures
    finally:
        behind.close(FLUSH_S)


def test_waiting_for_room_ends_as_soon_as_there_is_some(kv_url) -> None:
    behind = WriteBehind(open_tier(kv_url), max_pending_bytes=FRAMES.group_bytes)
    behind.start()
    try:
        writer = GroupFrames(behind, SETS)
        waiter = threading.Thread(target=writer.wait_for_room, args=(1, FLUSH_S))
        writer.write(TAG, SESSION, RECALL, 0, tokens_of(5), groups_of(5))
        waiter.start()
        waiter.join(FLUSH_S / 2)
        assert not waiter.is_alive()
        assert behind.flush(FLUSH_S)
        assert writer.has_room(1)
    finally:
        behind.close(FLUSH_S)


def test_unknown_codec_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of raw, zstd, values8, values4"):
        FrameSet(FRAMES.fingerprint, FRAMES.group_shape, torch.bfloat16, "gzip")


def test_layers_of_a_group_are_its_memory() -> None:
    group = torch.zeros(FRAMES.group_shape, dtype=torch.bfloat16)
    layer_memory(group)[1][:2] = b"\x80\x3f"
    assert group[1, 0, 0, 0, 0] == 1


def test_what_shapes_stored_kv_changes_the_fingerprint() -> None:
    assert kv_fingerprint(weights="a", rope_theta=1.0) == kv_fingerprint(rope_theta=1.0, weights="a")
    assert kv_fingerprint(weights="a") != kv_fingerprint(weights="b")


def test_headers_of_a_chunk_name_its_layers_and_its_span() -> None:
    headers = FRAMES.headers(TAG, SESSION, Chunk(5, 10, bytes(16)))
    assert [header.layer_group for header in headers] == [0, 1]
    assert {(header.start, header.stop, header.shape) for header in headers} == {(336, 656, (5, 5, 64, 2, 72))}


@given(st.integers(64, 4 << 20))
def test_frames_are_neither_too_small_nor_too_large_nor_wasteful(group_bytes) -> None:
    count = groups_per_chunk(group_bytes)
    frame = count * group_bytes + OVERHEAD_BYTES
    assert frame <= MAX_FRAME_BYTES or count == 1
    assert frame >= MIN_FRAME_BYTES or frame + group_bytes > MAX_FRAME_BYTES
    assert frame <= size_class(frame) < frame * 1.26


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (1, 4 << 10),
        (100 << 10, 112 << 10),
        (224 << 10, 224 << 10),
        ((224 << 10) + 1, 256 << 10),
        (1_600_000, 1792 << 10),
    ],
)
def test_size_classes_are_jemallocs(num_bytes, expected) -> None:
    assert size_class(num_bytes) == expected


@pytest.mark.parametrize(
    ("group_bytes", "expected"), [(49_152, 9), (262_144, 3), (131_072, 6), (2_048, 196), (2 << 20, 1)]
)
def test_spans_of_known_models(group_bytes, expected) -> None:
    assert groups_per_chunk(group_bytes) == expected


def test_chunks_of_other_starts_or_codecs_have_other_names() -> None:
    names = [
        chunks.chunk_name(TAG, b"e" * 16, 16, "raw"),
        chunks.chunk_name(TAG, b"e" * 16, 80, "raw"),
        chunks.chunk_name(TAG, b"e" * 16, 16, "zstd"),
        chunks.chunk_name(TAG, b"f" * 16, 16, "raw"),
        chunks.chunk_name(bytes(16), b"e" * 16, 16, "raw"),
    ]
    assert len(set(names)) == 5


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_what_chunks_of_names_is_read_back_bit_for_bit(behind, kv_url, codec) -> None:
    frame_set = FrameSet(FRAMES.fingerprint, FRAMES.group_shape, torch.bfloat16, codec)
    writer = GroupFrames(behind, FrameSets(frame_set))
    groups, out = groups_of(7), torch.zeros_like(groups_of(7))
    writer.write(TAG, SESSION, RECALL, 0, tokens_of(7), groups)
    writer.checkpoint(TAG, SESSION)
    assert behind.flush(FLUSH_S)
    reader = FrameReader(open_source(kv_url))
    wants = []
    for chunk in writer.chunks_of(TAG, SESSION):
        pieces = [layer_memory(group) for group in out[chunk.first_group : chunk.stop_group]]
        headers = frame_set.headers(TAG, SESSION, chunk)
        wants += [FrameWant(header, into) for header, into in zip(headers, zip(*pieces, strict=True), strict=True)]
    assert [read.miss for read in reader.fetch(wants, time.monotonic() + FLUSH_S)] == [None] * len(wants)
    reader.close()
    assert torch.equal(out, groups)


def test_rows_of_a_group_that_shares_keys_are_cut_into_as_many_parts_as_layers_would_have_them() -> None:
    assert (SHARED.num_parts, SHARED.group_bytes) == (2, FRAMES.group_bytes * 7 // 10)
    assert [header.shape[1] for header in SHARED.headers(TAG, SESSION, Chunk(0, 3, bytes(16)))] == [3, 4]
    assert SHARED.part_bytes * SHARED.chunk_groups + OVERHEAD_BYTES >= MIN_FRAME_BYTES
    # Windows have all keys, whoever shares them behind.
    assert SHARED.window_bytes(10) == FRAMES.window_bytes(10)
    whole = replace(SHARED, shared_rows=2 * 5)
    assert (whole.num_parts, whole.part_bytes, whole.chunk_groups) == (2, FRAMES.part_bytes, FRAMES.chunk_groups)
    memory = memoryview(bytes(SHARED.group_bytes))
    assert [len(part) for part in SHARED.parts_of(memory)] == [SHARED.group_bytes * 3 // 7, SHARED.group_bytes * 4 // 7]


def test_sessions_of_both_kinds_have_frames_of_their_own(writer, behind, kv_url) -> None:
    packed = torch.randn(8, 7, *FRAMES.group_shape[2:]).to(torch.bfloat16)
    for first in range(0, 8, 4):
        writer.write(TAG, SESSION, POD, first, tokens_of(first + 4), packed[first : first + 4])
    writer.checkpoint(TAG, SESSION)
    writer.write(TAG, SessionId("other"), RECALL, 0, tokens_of(5), groups_of(5))
    assert behind.flush(FLUSH_S)
    n = SHARED.chunk_groups
    spans = [(chunk.first_group, chunk.stop_group) for chunk in writer.chunks_of(TAG, SESSION)]
    assert spans == [(first, min(first + n, 8)) for first in range(0, 8, n)]
    with Redis.from_url(kv_url) as client:
        keys = [key for key in client.keys("kv1:*") if client.type(key) == b"string"]
        frames = [decode_frame(key, client.get(key))[0] for key in keys]
    kinds = {(each.session_id, each.fingerprint) for each in frames}
    assert kinds == {(SESSION, SHARED.fingerprint), (SessionId("other"), FRAMES.fingerprint)}
    assert writer.begins_at(TAG, SessionId("new"), POD, n + 1) == n


def test_a_session_that_shares_and_one_that_doesnt_go_on_from_nothing_of_each_other(writer, behind) -> None:
    writer.write(TAG, SESSION, RECALL, 0, tokens_of(2), groups_of(2))
    writer.write(TAG, SESSION, POD, 2, tokens_of(3), torch.zeros(1, 7, *FRAMES.group_shape[2:], dtype=torch.bfloat16))
    writer.checkpoint(TAG, SESSION)
    assert behind.flush(FLUSH_S)
    assert writer.chunks_of(TAG, SESSION) == []


def test_frames_of_sessions_that_nobody_spoke_of_are_a_fault() -> None:
    assert FrameSets().fingerprints == (b"", b"")
    with pytest.raises(InternalError):
        FrameSets(FRAMES).of(POD)
