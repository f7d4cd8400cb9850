"""What the engine asks of the tier below host memory. Beside its consumer; implemented in `tier`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kvservice.types import RecipeSpec, SessionId, TierStats


class GroupWriter(Protocol):
    """Writes groups behind the engine. Never blocks, save in `wait_for_room`, and never drops while it has room."""

    @property
    def stores(self) -> bool:
        """Whether what it is given is kept anywhere."""
        ...

    def has_room(self, num_groups: int) -> bool:
        """Whether that many groups can be taken now. While not, prefill waits."""
        ...

    def wait_for_room(self, num_groups: int, timeout_s: float) -> None:
        """Blocks until there is room, at most `timeout_s`."""
        ...

    def write(
        self,
        tenant_tag: bytes,
        session_id: SessionId,
        recipe: RecipeSpec,
        first_group: int,
        token_ids: Sequence[int],
        groups: Tensor,
    ) -> None:
        """Takes groups as they lie in host memory, `[n, ...]`; the tensor is the writer's from then on.

        Args:
            tenant_tag: stands for the tenant in keys.
            session_id: the session.
            recipe: how it keeps its KV.
            first_group: number of the first group.
            token_ids: all tokens of the session up to the end of the last group: they name the content.
            groups: the KV.
        """
        ...

    def begins_at(self, tenant_tag: bytes, session_id: SessionId, recipe: RecipeSpec, first_group: int) -> int:
        """From which group on `write` wants groups, when `first_group` is the first new one: that one or an earlier."""
        ...

    def checkpoint(self, tenant_tag: bytes, session_id: SessionId) -> None:
        """Writes what of a session's groups still waits for more of them."""
        ...

    def takes_window(self, num_tokens: int) -> bool:
        """Whether there is room for a window of so many tokens. Nothing waits for that: it saves computing it."""
        ...

    def write_window(
        self,
        tenant_tag: bytes,
        session_id: SessionId,
        recipe: RecipeSpec,
        start: int,
        token_ids: Sequence[int],
        pairs: Tensor,
    ) -> None:
        """Takes the KV of a session's sinks and of what follows its groups; the tensor is the writer's from then on.

        Args:
            tenant_tag: stands for the tenant in keys.
            session_id: the session.
            recipe: how it keeps its KV.
            start: the position behind its last group.
            token_ids: all its tokens that have KV.
            pairs: `[layers, kv, n, 2, d]` on the CPU.
        """
        ...

    def forget(self, session_id: SessionId) -> None:
        """A session is gone from here: nothing is kept in memory any more to write longer blobs with."""
        ...

    def delete(self, tenant_tag: bytes, session_id: SessionId) -> None:
        """Deletes all blobs of a session."""
        ...

    def bytes_of(self, tenant_tag: bytes, session_id: SessionId) -> int:
        """Bytes written for a session and not deleted."""
        ...

    def stats(self) -> TierStats:
        """What has been written, and what has not."""
        ...


class NoWriter:
    """No tier below host memory: nothing is written."""

    stores = False
    """Nothing is kept."""

    def has_room(self, num_groups: int) -> bool:  # noqa: ARG002 -- part of the protocol
        """Always."""
        return True

    def wait_for_room(self, num_groups: int, timeout_s: float) -> None:
        """Returns at once."""

    def write(
        self,
        tenant_tag: bytes,
        session_id: SessionId,
        recipe: RecipeSpec,
        first_group: int,
        token_ids: Sequence[int],
        groups: Tensor,
    ) -> None:
        """Forgets."""

    def begins_at(self, tenant_tag: bytes, session_id: SessionId, recipe: RecipeSpec, first_group: int) -> int:  # noqa: ARG002 -- part of the protocol
        """The new ones."""
        return first_group

    def checkpoint(self, tenant_tag: bytes, session_id: SessionId) -> None:
        """Nothing waits."""

    def takes_window(self, num_tokens: int) -> bool:  # noqa: ARG002 -- part of the protocol
        """Nobody does."""
        return False

    def write_window(
        self,
        tenant_tag: bytes,
        session_id: SessionId,
        recipe: RecipeSpec,
        start: int,
        token_ids: Sequence[int],
        pairs: Tensor,
    ) -> None:
        """Forgets."""

    def forget(self, session_id: SessionId) -> None:
        """Nothing is kept."""

    def delete(self, tenant_tag: bytes, session_id: SessionId) -> None:
        """Nothing to delete."""

    def bytes_of(self, tenant_tag: bytes, session_id: SessionId) -> int:  # noqa: ARG002 -- part of the protocol
        """None."""
        return 0

    def stats(self) -> TierStats:
        """Nothing, and not connected."""
        return TierStats()
