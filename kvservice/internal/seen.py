"""What a caller has of an answer, in a few bytes: whether a stream that was cut may go on. Knows no events."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

DIGEST_BYTES = 16


class SeenDigest:
    """BLAKE2b over token ids in order, each of 4 bytes, the lowest first."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=DIGEST_BYTES)

    def add(self, token_ids: Iterable[int]) -> None:
        """Takes the next tokens."""
        for token_id in token_ids:
            self._hash.update(token_id.to_bytes(4, "little"))

    def value(self) -> bytes:
        """The digest of all that was added so far."""
        return self._hash.digest()
