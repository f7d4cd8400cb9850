"""Bytes that a value takes in a Redis, by size class of its allocator. Pure; knows nothing of sessions.

Counted is what `MEMORY USAGE` counts of a string: the value and the key with their headers, the object, and the entry
in the table of keys. A frame of one byte over a size class takes up to a quarter more than one just under it.
"""

from __future__ import annotations

from enum import Enum

ENTRY_BYTES = 24
OBJECT_BYTES = 16
TINY_STEP_BYTES = 16
MIN_CHUNK_BYTES = 24
"""The least that libc's malloc gives out."""
BULK_BYTES = 32 * 1024
"""A value from this size on is kept in the buffer that it was read into, with two bytes for the end of the line."""
BULK_END_BYTES = 2


class Allocator(Enum):
    """What a redis-server was built with."""

    JEMALLOC = "jemalloc"
    LIBC = "libc"

    @classmethod
    def of(cls, mem_allocator: str) -> Allocator:
        """From what `INFO memory` says; an unknown one counts as libc, which rounds least."""
        return cls.JEMALLOC if mem_allocator.startswith("jemalloc") else cls.LIBC


def size_class(num_bytes: int, allocator: Allocator) -> int:
    """What the allocator gives out for a request of `num_bytes`."""
    if allocator is Allocator.LIBC:
        # A header of 8 bytes, rounded to 16; the header isn't usable.
        return max(MIN_CHUNK_BYTES, -(-(num_bytes + 8) // 16) * 16 - 8)
    if num_bytes <= 8:
        return 8
    if num_bytes <= 8 * TINY_STEP_BYTES:
        return -(-num_bytes // TINY_STEP_BYTES) * TINY_STEP_BYTES
    # Four classes for each doubling.
    step = 1 << ((num_bytes - 1).bit_length() - 3)
    return -(-num_bytes // step) * step


def allocated_bytes(value_bytes: int, key_bytes: int, allocator: Allocator) -> int:
    """What `MEMORY USAGE` says of a string of `value_bytes` under a key of `key_bytes`, within 5 %.

    Of values under 100 bytes, which servers keep in several ways, it says a little more.
    """
    key = size_class(_string_bytes(key_bytes), allocator) + ENTRY_BYTES
    ending = BULK_END_BYTES if value_bytes >= BULK_BYTES else 0
    return size_class(_string_bytes(value_bytes + ending), allocator) + OBJECT_BYTES + key


def _string_bytes(num_bytes: int) -> int:
    """A Redis string: a header by its length, the bytes, a zero."""
    header = 1 if num_bytes < 32 else 3 if num_bytes < 256 else 5 if num_bytes < 65_536 else 9
    return header + num_bytes + 1
