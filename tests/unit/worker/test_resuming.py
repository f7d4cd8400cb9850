"""Which of the chunks that a manifest names are taken, and when."""

from __future__ import annotations

from kvservice.tier.chunks import chain, chunk_name
from kvservice.tier.groups import Chunk
from kvservice.tier.restore import StoredChunk, usable
from kvservice.types import SessionId
from kvservice.worker.resuming import TRY_AGAIN_S, Speeds

TAG = b"t" * 16
TOKENS = list(range(16 + 64 * 12))


def stored(first: int, stop: int, tokens=TOKENS, codec: str = "raw") -> StoredChunk:
    name = chunk_name(TAG, chain(TAG, tokens)[stop - 1], 16 + 64 * first, codec)
    return StoredChunk(SessionId("home"), Chunk(first, stop, name))


def test_chunks_of_the_sessions_own_tokens_are_taken_up_to_the_first_gap():
    chunks = [stored(0, 5), stored(5, 7), stored(8, 10)]
    assert usable(TAG, TOKENS, chunks, "raw") == chunks[:2]
    assert usable(TAG, TOKENS, chunks[1:], "raw") == []


def test_a_chunk_of_other_tokens_another_tenant_or_another_codec_is_not_taken():
    other = [*TOKENS[:400], 7, *TOKENS[401:]]
    chunks = [stored(0, 5), stored(5, 10)]
    assert usable(TAG, other, chunks, "raw") == chunks[:1]
    assert usable(b"u" * 16, TOKENS, chunks, "raw") == []
    assert usable(TAG, TOKENS, chunks, "values8") == []


def test_a_chunk_that_ends_behind_the_session_is_not_taken():
    chunks = [stored(0, 5), stored(5, 10)]
    assert usable(TAG, TOKENS[: 16 + 64 * 10 - 1], chunks, "raw") == chunks[:1]


def test_of_two_chunks_at_one_place_the_one_of_the_sessions_tokens_is_taken():
    other = [*TOKENS[:20], 7, *TOKENS[21:]]
    assert usable(TAG, TOKENS, [stored(0, 4, other), stored(0, 5)], "raw") == [stored(0, 5)]


def test_what_was_measured_decides_between_fetching_and_computing():
    speeds = Speeds(lambda: 0.0)
    assert speeds.fetching_is_faster(1 << 40, 1)
    speeds.note_fetch(1000, 1.0)
    assert speeds.fetching_is_faster(1 << 40, 1)
    speeds.note_prefill(100, 1.0)
    assert speeds.fetching_is_faster(999, 100)
    assert not speeds.fetching_is_faster(1001, 100)
    # Too little to learn from.
    speeds.note_prefill(1, 1000.0)
    assert not speeds.fetching_is_faster(1001, 100)


def test_tier_that_was_slow_is_tried_again_and_believed_when_it_is_fast():
    now = [0.0]
    speeds = Speeds(lambda: now[0])
    speeds.note_prefill(1000, 1.0)
    speeds.note_fetch(1000, 100.0)
    assert not speeds.fetching_is_faster(1000, 100)
    now[0] += TRY_AGAIN_S
    assert speeds.fetching_is_faster(1000, 100)
    # One at a time finds out.
    assert not speeds.fetching_is_faster(1000, 100)
    speeds.note_fetch(1000, 0.001)
    assert speeds.fetching_is_faster(1000, 100)
