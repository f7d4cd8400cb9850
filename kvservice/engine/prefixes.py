"""Which held sequence begins with the same tokens as a new call. Knows token ids and names; no KV.

A prefix is named by a hash chained over its groups of 64 tokens. The tenant's tag and the recipe are hashed first, so
nobody meets another tenant's names, or KV that was made otherwise.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence

from kvservice.types import GROUP_TOKENS, SINK_TOKENS, SessionId

_DIGEST_BYTES = 16


class PrefixIndex:
    """Sequences by the names of their prefixes of 16 + 64k tokens."""

    def __init__(self) -> None:
        self._holders: dict[bytes, dict[SessionId, None]] = {}
        self._names: dict[SessionId, list[bytes]] = {}

    def update(self, session_id: SessionId, tenant_tag: bytes, recipe: str, tokens: Sequence[int]) -> None:
        """Makes the prefixes of a sequence known.

        Args:
            session_id: the sequence.
            tenant_tag: of its tenant; without one nothing is known.
            recipe: how its KV is kept.
            tokens: those whose KV depends on nothing but tokens. Those it was last updated with still begin them.
        """
        if not tenant_tag:
            return
        known = self._names.setdefault(session_id, [])
        for name in _names(tenant_tag, recipe, tokens, known):
            known.append(name)
            self._holders.setdefault(name, {})[session_id] = None

    def remove(self, session_id: SessionId) -> None:
        """Forgets a sequence."""
        for name in self._names.pop(session_id, ()):
            holders = self._holders[name]
            del holders[session_id]
            if not holders:
                del self._holders[name]

    def longest(self, tenant_tag: bytes, recipe: str, tokens: Sequence[int]) -> tuple[SessionId | None, int]:
        """The sequence that shares the longest known prefix of `tokens`, and that prefix's length."""
        found: tuple[SessionId | None, int] = (None, 0)
        if not tenant_tag or not self._holders:
            return found
        for number, name in enumerate(_names(tenant_tag, recipe, tokens, [])):
            holders = self._holders.get(name)
            if holders is None:
                break
            found = (next(reversed(holders)), SINK_TOKENS + (number + 1) * GROUP_TOKENS)
        return found


def _names(tenant_tag: bytes, recipe: str, tokens: Sequence[int], known: list[bytes]) -> Iterator[bytes]:
    """The names of the prefixes after those that are known."""
    name = known[-1] if known else _hash(recipe.encode() + array("I", tokens[:SINK_TOKENS]).tobytes(), tenant_tag)
    for start in range(SINK_TOKENS + len(known) * GROUP_TOKENS, len(tokens) - GROUP_TOKENS + 1, GROUP_TOKENS):
        name = _hash(name + array("I", tokens[start : start + GROUP_TOKENS]).tobytes(), tenant_tag)
        yield name


def _hash(data: bytes, key: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES, key=key, person=b"kv1-prefix").digest()
