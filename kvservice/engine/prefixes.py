"""Which held sequence begins with the same tokens as a new call. Knows token ids and names; no KV."""

from __future__ import annotations

from collections.abc import Sequence

from kvservice.internal.prefixes import MAX_REPORTED, prefix_names, prefix_tokens, reported
from kvservice.types import SessionId


class PrefixIndex:
    """Sequences by the names of their prefixes of 16 + 64k tokens."""

    def __init__(self) -> None:
        self._holders: dict[bytes, dict[SessionId, None]] = {}
        self._names: dict[SessionId, list[bytes]] = {}  # last updated last
        self._reported: tuple[int, ...] | None = None

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
        self._reported = None
        known = self._names[session_id] = self._names.pop(session_id, [])
        for name in prefix_names(tenant_tag, recipe, tokens, known):
            known.append(name)
            self._holders.setdefault(name, {})[session_id] = None

    def remove(self, session_id: SessionId) -> None:
        """Forgets a sequence."""
        self._reported = None
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
        for number, name in enumerate(prefix_names(tenant_tag, recipe, tokens)):
            holders = self._holders.get(name)
            if holders is None:
                break
            found = (next(reversed(holders)), prefix_tokens(number))
        return found

    def report(self) -> tuple[int, ...]:
        """Names for gateways, of the sequences updated last; the same object until something changes."""
        if self._reported is None:
            found: dict[int, None] = {}
            for names in reversed(self._names.values()):
                found.update(dict.fromkeys(reported(names)))
                if len(found) >= MAX_REPORTED:
                    break
            self._reported = tuple(found)[:MAX_REPORTED]
        return self._reported
