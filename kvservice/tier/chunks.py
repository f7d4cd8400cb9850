"""How many groups of 64 tokens go into one frame, and what such a chunk is called. Pure arithmetic.

A chunk's span follows from its absolute position alone: chunk `i` is groups `[i * n, (i + 1) * n)`. So sessions that
share a document, and forks, have the same chunks, whatever their prefill was cut into.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from kvservice.tier.header import CHUNK_HASH_BYTES, chunk_hash
from kvservice.types import GROUP_TOKENS, SINK_TOKENS

MIN_FRAME_BYTES = 400_000
"""Of all but a session's last frame: below, a store's work for each value outweighs that for its bytes."""
MAX_FRAME_BYTES = 1_800_000
"""Above, one value keeps a single-threaded store from everyone else for too long."""
OVERHEAD_BYTES = 288
"""Most that a frame has beside its payload (242-269 with KV of one layer), and a store's own header of a value."""
GOOD_FILL = 0.85
"""Share of its size class that a frame should take up: of the spans that do, the shortest is best."""
CLASSES_PER_DOUBLING = 4
PAGE_BYTES = 4096


def size_class(num_bytes: int) -> int:
    """What jemalloc takes for a large allocation: four sizes to each doubling, and whole pages."""
    step = max(PAGE_BYTES, 1 << max(0, (num_bytes - 1).bit_length() - 1 - CLASSES_PER_DOUBLING.bit_length() + 1))
    return -(-num_bytes // step) * step


def groups_per_chunk(group_bytes: float) -> int:
    """How many groups make a chunk, when a frame stores `group_bytes` of each.

    Frames are between `MIN_FRAME_BYTES` and `MAX_FRAME_BYTES`, as far as whole groups allow, and end as closely as
    they can under a size of the store's allocator: what is left over there is memory lost.
    """
    most = max(1, int((MAX_FRAME_BYTES - OVERHEAD_BYTES) // group_bytes))
    least = min(most, -(-(MIN_FRAME_BYTES - OVERHEAD_BYTES) // group_bytes))
    spans = range(max(1, int(least)), most + 1)
    return next((n for n in spans if _fill(n * group_bytes) >= GOOD_FILL), None) or max(
        spans, key=lambda n: _fill(n * group_bytes)
    )


def _fill(payload_bytes: float) -> float:
    stored = int(payload_bytes) + OVERHEAD_BYTES
    return stored / size_class(stored)


def chain(tenant_tag: bytes, token_ids: Sequence[int]) -> list[bytes]:
    """A hash for each whole group of `token_ids`, which stands for all tokens up to the group's end."""
    name = chunk_hash(tenant_tag, b"", token_ids[:SINK_TOKENS])
    names = []
    for start in range(SINK_TOKENS, len(token_ids) - GROUP_TOKENS + 1, GROUP_TOKENS):
        name = chunk_hash(tenant_tag, name, token_ids[start : start + GROUP_TOKENS])
        names.append(name)
    return names


def window_end(tenant_tag: bytes, ends: Sequence[bytes], start: int, token_ids: Sequence[int]) -> bytes:
    """A hash that stands for all of `token_ids`, of which those from `start` on are no whole groups, or no frames.

    Args:
        tenant_tag: the key of the hash.
        ends: `chain` of the tokens.
        start: where groups end: at least one.
        token_ids: all tokens.
    """
    return chunk_hash(tenant_tag, ends[(start - SINK_TOKENS) // GROUP_TOKENS - 1], token_ids[start:])


def chunk_name(tenant_tag: bytes, end: bytes, start: int, codec: str) -> bytes:
    """16 bytes that name a chunk's frames.

    Two frames of one name hold the same: another span or codec is another name, so none can take another's place.

    Args:
        tenant_tag: the key of the hash.
        end: `chain`'s hash of the chunk's last group.
        start: first token position.
        codec: of the frames.
    """
    digest = hashlib.blake2b(end, key=tenant_tag, digest_size=CHUNK_HASH_BYTES, person=b"kv1-frame")
    digest.update(start.to_bytes(8, "little") + codec.encode())
    return digest.digest()
