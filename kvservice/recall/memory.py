"""All KV of one sequence over device and host, kept consistent. Knows nothing of scheduling, models or Redis."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvservice.compression.protocols import RECALL_INDEXES
from kvservice.errors import InternalError
from kvservice.kv.arena import Arena
from kvservice.kv.sequence import SequenceState
from kvservice.recall.distant import DistantKV
from kvservice.recall.index import SequenceIndex
from kvservice.recall.residency import RecallSlots
from kvservice.tier.host import HostTier
from kvservice.types import GROUP_TOKENS, SINK_TOKENS, RecipeSpec


@dataclass(slots=True)
class RecallCounters:
    """What recall did, since the sequence began."""

    lookups: int = 0
    hits: int = 0
    recalled_bytes: int = 0
    streamed_bytes: int = 0


class SequenceMemory:
    """The KV of one sequence: window on the device, distant groups in the tier, their index, recall slots."""

    def __init__(self, recipe: RecipeSpec, arena: Arena, host: HostTier) -> None:
        layout = arena.layout
        self.recipe = recipe
        self.state = SequenceState(arena)
        self.distant = DistantKV(host, layout.num_kv_heads, layout.head_dim)
        self.index: SequenceIndex | None = None
        if recipe.index is not None:
            self.index = SequenceIndex(RECALL_INDEXES.get(recipe.index), recipe.index_bits, arena)
        self.counters = RecallCounters()
        self._arena = arena
        self._slots: RecallSlots | None = None

    @property
    def index_bytes(self) -> int:
        """Arena bytes of the index."""
        return self.index.num_bytes if self.index else 0

    @property
    def slot_bytes(self) -> int:
        """Arena bytes of the recall slots."""
        return self._slots.num_bytes if self._slots else 0

    @property
    def host_bytes(self) -> int:
        """Bytes in the host tier."""
        return self.distant.num_groups * self._arena.layout.group_bytes

    @property
    def device_bytes(self) -> int:
        """All that the sequence takes on the device."""
        return self.state.window_bytes + self.index_bytes + self.slot_bytes

    def slots(self) -> RecallSlots:
        """The recall slots, allocated when first asked for."""
        if self._slots is None:
            self._slots = RecallSlots(self._arena, self.recipe.recalled_tokens)
        return self._slots

    def slide(self) -> Tensor | None:
        """Moves what no longer belongs in the window to the tier.

        Returns:
            The groups that moved, `[n, layers, kv, 64, 2, d]` on the CPU and nobody else's, or None.
        """
        state = self.state
        count = (self.recipe.window_start(state.num_computed) - state.window_start) // GROUP_TOKENS
        if count <= 0:
            return None
        groups = state.read_groups(count)
        if self.index:
            self.index.append(groups)
        leaving = groups.cpu()
        self.distant.append(leaving)
        state.drop_groups(count)
        return leaving

    def truncate(self, num_tokens: int) -> None:
        """Takes the sequence back to its first `num_tokens` tokens, bit for bit as it was when it had those.

        Groups that had left the window since then come back from the tier.
        """
        state = self.state
        computed = min(num_tokens, state.num_computed)
        count = (state.window_start - self.recipe.window_start(computed)) // GROUP_TOKENS
        if count > 0:
            groups = self.distant.load_last(count)
            # What lies behind those groups goes first: a sequence never holds more than it reserved.
            state.shrink(max(state.window_start, computed))
            state.restore_groups(groups)
            self.distant.drop_last(count)
            if self.index:
                self.index.truncate(self.distant.num_groups)
            if self._slots:
                self._slots.clear()
        state.shrink(computed)
        del state.tokens[num_tokens:]

    def check(self) -> None:
        """Raises InternalError unless window, tier and index tell the same story."""
        distant = self.state.window_start - SINK_TOKENS
        indexed = self.index.num_groups if self.index else self.distant.num_groups
        if distant != self.distant.num_groups * GROUP_TOKENS or indexed != self.distant.num_groups:
            raise InternalError(
                f"{distant} distant tokens, {self.distant.num_groups} groups in the tier, {indexed} in the index"
            )
        if self.state.num_computed > len(self.state.tokens):
            raise InternalError(f"KV of {self.state.num_computed} tokens, {len(self.state.tokens)} token ids")

    def close(self) -> None:
        """Frees everything."""
        self.state.close()
        self.distant.drop_last(self.distant.num_groups)
        if self.index:
            self.index.truncate(0)
        if self._slots:
            self._slots.close()
            self._slots = None
