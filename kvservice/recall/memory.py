"""All KV of one sequence over device and host, kept consistent. Knows nothing of scheduling, models or Redis."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvservice.compression.methods import Stages, reuse_of, stages_of
from kvservice.compression.protocols import ScanTally
from kvservice.errors import InternalError
from kvservice.kv.arena import Arena
from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Owner
from kvservice.kv.sequence import SequenceState
from kvservice.recall.choosing import Query, choose_by_clusters, choose_by_scores, new_index
from kvservice.recall.clusters import SequenceClusters
from kvservice.recall.distant import DistantKV
from kvservice.recall.held import HeldTokens
from kvservice.recall.index import SequenceIndex
from kvservice.recall.looking import Looking
from kvservice.recall.packed import PackedTokens, most_groups
from kvservice.recall.parking import Parking, Place
from kvservice.recall.reach import Reach, ReachLog
from kvservice.recall.residency import RecallSlots
from kvservice.recall.sharing import KeptKeys, SharedCells
from kvservice.tier.host import HostTier
from kvservice.tier.swap import SwapSpace
from kvservice.types import BLOCK_TOKENS, GROUP_TOKENS, SINK_TOKENS, Distant, RecipeSpec

ADOPTED_GROUPS = 8
"""Groups that are indexed at a time when KV is restored: bounds the memory that it takes."""


class RecallCounters:
    """What recall did, since the sequence began.

    Attributes:
        tally: int64 `[3]`, counted by whoever recalls: tokens looked up in slots, tokens found there, bytes fetched.
        streamed_bytes: host KV that was attended to in full, through the staging ring, or read to index it.
        scan: groups that indexes had to look at, of those kinds that count them.
        gated: rows of followers, each a query in a query head, whose share of distant attention was known beforehand.
        skipped: of those, the rows that left distant tokens out.
        follower_tally: int64 `[1]`, counted likewise: of the bytes that decode steps fetched, those of followers.
        arrived_bytes: of those, what a simulated link had brought when it was needed.
    """

    __slots__ = ("arrived_bytes", "follower_tally", "gated", "scan", "skipped", "streamed_bytes", "tally")

    def __init__(self) -> None:
        self.tally = torch.zeros(3, dtype=torch.int64)
        self.follower_tally = torch.zeros(1, dtype=torch.int64)
        self.arrived_bytes = 0
        self.streamed_bytes = 0
        self.scan = ScanTally()
        self.gated = 0
        self.skipped = 0

    @property
    def lookups(self) -> int:
        """Tokens looked up in recall slots."""
        return int(self.tally[0])

    @property
    def hits(self) -> int:
        """Tokens found there."""
        return int(self.tally[1])

    @property
    def recalled_bytes(self) -> int:
        """Bytes fetched from host memory."""
        return int(self.tally[2])

    @property
    def follower_bytes(self) -> int:
        """Of the bytes that decode steps fetched from host memory, those of followers: values alone."""
        return int(self.follower_tally[0])

    def note(self, lookups: int, hits: int, num_bytes: int) -> None:
        """Adds to the tally."""
        self.tally += torch.tensor([lookups, hits, num_bytes])

    def copy(self) -> RecallCounters:
        """The counters as they are now."""
        twin = RecallCounters()
        twin.tally, twin.streamed_bytes, twin.scan = self.tally.clone(), self.streamed_bytes, replace(self.scan)
        twin.gated, twin.skipped = self.gated, self.skipped
        twin.follower_tally, twin.arrived_bytes = self.follower_tally.clone(), self.arrived_bytes
        return twin


@dataclass(frozen=True, slots=True)
class SharedStore:
    """Where sequences that share distant keys between layers keep them.

    Attributes:
        cells: which share them.
        host: for their groups alone.
    """

    cells: SharedCells
    host: HostTier


@dataclass(frozen=True, slots=True)
class Store:
    """Where sequences keep their KV."""

    arena: Arena
    host: HostTier
    swap: SwapSpace
    shared: SharedStore | None = None
    separators: frozenset[int] = frozenset()

    def host_of(self, recipe: RecipeSpec) -> HostTier:
        """Where the groups of a recipe's sequences are."""
        return self.host if self.shared is None or not recipe.shares_keys else self.shared.host


class SequenceMemory:
    """The KV of one sequence: window on the device, distant groups in the tier, their index, recall slots.

    Attributes:
        counts_shared: it reserves for what it shares and may not share for ever. Of those that hold a block, all do
            but the one that first had it, as long as that goes on from what it has.
        shared: how it shares distant keys between layers; None: it doesn't.
        held: what it holds, of one that drops tokens; None: it doesn't.
        looking: what of all that it holds answers look at; None: at everything.

    Raises:
        InternalError: the recipe shares keys, and there is no plan for that.
    """

    def __init__(self, recipe: RecipeSpec, store: Store) -> None:
        if recipe.shares_keys and store.shared is None:
            raise InternalError(f"recipe {recipe.name!r} shares distant keys, and nobody said which")
        host = store.host_of(recipe)
        self.recipe = recipe
        self.shared = store.shared.cells if store.shared and recipe.shares_keys else None
        self.state = SequenceState(store.arena)
        stages = stages_of(recipe)
        self.held = None if stages is None else _held(recipe, stages, self.state, store)
        plan = reuse_of(recipe)
        self.looking = None if plan is None else Looking(plan, self.state)
        self.distant = DistantKV(host, store.arena.layout.head_dim)
        self.index = new_index(recipe, store.arena, self.shared)
        self.reaches = ReachLog()
        self.counters = RecallCounters()
        self.counts_shared = False
        self._store = store
        self._slots: RecallSlots | None = None
        self._rollback: int | None = None
        self._kept_keys = KeptKeys(host)
        self._begun_at: int | None = None
        self._parking = Parking(store.arena, store.swap)

    # -- bytes -------------------------------------------------------------------------------------------------------

    @property
    def window_bytes(self) -> int:
        """Arena bytes of sinks and window, shared ones included."""
        own = (
            self.state.window_bytes + (self._packed.num_bytes if self._packed else 0)
            if self.place is Place.DEVICE
            else 0
        )
        return own + self._parking.held_bytes(Owner.WINDOW)

    @property
    def prepared_bytes(self) -> int:
        """Of those, room for tokens of a step that hasn't ended."""
        return self.state.prepared_bytes if self.place is Place.DEVICE else 0

    @property
    def index_bytes(self) -> int:
        """Arena bytes of the index, shared ones included."""
        own = self.index.num_bytes if self.index and self.place is Place.DEVICE else 0
        return own + self._parking.held_bytes(Owner.INDEX)

    @property
    def slot_bytes(self) -> int:
        """Arena bytes of the recall slots."""
        return self._slots.num_bytes if self._slots else 0

    @property
    def host_bytes(self) -> int:
        """Bytes in the host tier, shared ones included."""
        return self.distant.num_bytes + self._kept_keys.num_bytes + self.parked_bytes

    @property
    def parked_bytes(self) -> int:
        """Of those, what its device part takes while it isn't on the device."""
        return self._parking.num_groups * self._store.arena.layout.group_bytes

    @property
    def device_bytes(self) -> int:
        """All that the sequence takes on the device."""
        return self.window_bytes + self.index_bytes + self.slot_bytes

    @property
    def layout(self) -> KVLayout:
        """Of its KV."""
        return self._store.arena.layout

    @property
    def returning_bytes(self) -> int:
        """Device bytes that it takes when it is back; 0 while it is on the device."""
        return self._parking.num_blocks * self._store.arena.layout.block_bytes

    def shared_bytes_lost(self, num_kept: int) -> tuple[int, int]:
        """Device and host bytes that it shares now, and may not when it goes on from its first `num_kept` tokens.

        What slides out of a shared window, and what is given up of a shared sequence, frees nothing while somebody
        else holds it, and a shared block is copied before it is written to: then two hold what one does now (see
        `Ledger`). Sinks and whole blocks of keys are never written to again.
        """
        state = self.state
        if not self.counts_shared and num_kept >= self.num_computed:
            return (0, 0)
        layout = self._store.arena.layout
        groups = self.recipe.distant_groups(min(num_kept, self.num_computed))
        host = self.distant.num_shared_from(groups) * self._store.host_of(self.recipe).group_bytes
        if self.place is not Place.DEVICE:
            return (0, host)
        column = min(num_kept, state.num_computed) // BLOCK_TOKENS
        if self.recipe.slides:
            column = min(column, 1)
        shared = state.num_shared_from(0 if self.held else column)
        shared += self._packed.num_shared() if self._packed else 0
        shared += self.index.num_shared_from(groups) if self.index else 0
        return (shared * layout.block_bytes, host)

    def swap_bytes(self) -> int:
        """Host bytes that its device blocks would take."""
        num_blocks = self._window_blocks().numel() + (self.index.blocks().numel() if self.index else 0)
        return self._parking.groups_for(num_blocks) * self._store.arena.layout.group_bytes

    @property
    def num_computed(self) -> int:
        """Leading tokens whose KV is held, wherever."""
        computed = self.state.num_computed
        return computed if self._rollback is None else min(computed, self._rollback)

    @property
    def num_dropped(self) -> int:
        """Tokens whose KV was there and made room: they will be computed again."""
        return max(0, self.reaches.end - self.num_computed)

    # -- going on ----------------------------------------------------------------------------------------------------

    def slots(self) -> RecallSlots:
        """The recall slots, allocated when first asked for."""
        if self._slots is None:
            self._slots = RecallSlots(
                self._store.arena, self.recipe.recalled_tokens, self.shared.groups if self.shared else None
            )
        return self._slots

    @property
    def key_index(self) -> SequenceIndex | None:
        """The low-bit keys by which kernels may choose in place of `choose`, if that is how its recipe chooses."""
        index = self.index
        if isinstance(index, SequenceIndex) and index.is_key_index and not self.recipe.per_query_head:
            return index
        return None

    def choose(self, query: Query) -> Tensor:
        """The distant tokens that queries recall, counted from the first distant one.

        Returns:
            int64 `[kv, num_queries, n]` on the CPU, in order of position, so that neither slots nor the order of equal
            scores show in sums over them.

        Raises:
            InternalError: the recipe keeps no index.
        """
        if self.index is None:
            raise InternalError(f"recipe {self.recipe.name!r} keeps no index to select by")
        if isinstance(self.index, SequenceClusters):
            # What had left the window when the first token that selects was computed; until then, what has by now.
            first = self.recipe.distant_groups(self.reaches.full_prefix)
            chosen = choose_by_clusters(self.index, self.recipe, query, first, self._distant_keys)
        else:
            chosen = choose_by_scores(self.index, self.recipe, query, self.counters.scan)
        return chosen.sort(-1).values.cpu()

    def commit(self, num_tokens: int, reach: Reach) -> Tensor | None:
        """Counts computed tokens in, and moves what no longer belongs in the window to the tier.

        Returns:
            The groups that moved, `[n, layers, kv, 64, 2, d]` or as `SharedGroups` lie, on the CPU and nobody else's;
            or None.
        """
        state = self.state
        self.reaches.record(state.num_computed, state.num_computed + num_tokens, reach)
        state.commit(num_tokens)
        if self.held is not None:
            self.held.commit()
            return None
        count = (self.recipe.window_start(state.num_computed) - state.window_start) // GROUP_TOKENS
        if count <= 0:
            return None
        groups = state.read_groups(count)
        if self.index:
            self.index.append(groups)
        leaving = groups.cpu()
        if self.shared:
            self._keep_keys(leaving, self.shared)
            leaving = self.shared.groups.pack(leaving)
        self.distant.append(leaving)
        state.drop_groups(count)
        self.check()
        return leaving

    def begin_call(self) -> None:
        """From now on it may have to come back to the tokens that it has: see `end_call`."""
        self._begun_at = self.reaches.end

    def end_call(self) -> None:
        """The call is over, kept or rolled back: keys that were left for that are dropped."""
        self._begun_at = None
        if self._rollback is None:
            self._kept_keys.drop()

    def _keep_keys(self, groups: Tensor, shared: SharedCells) -> None:
        """Of groups that leave the window, keeps the keys of those that were in it when the call began."""
        if self._begun_at is None:
            return
        window = range(self.recipe.window_start(self._begun_at), self._begun_at + 1)
        for number, group in enumerate(groups, start=self.distant.num_groups):
            if SINK_TOKENS + number * GROUP_TOKENS in window:
                self._kept_keys.keep(number, shared.groups.dropped_keys(group.unsqueeze(0))[0])

    def begin_answer(self, num_tokens: int) -> None:
        """Its first `num_tokens` tokens are given; those behind them will be an answer's."""
        for methods in (self.held, self.looking):
            if methods is not None:
                methods.read_until = num_tokens

    @property
    def depends_on_tokens_alone(self) -> bool:
        """Whether KV computed with every token in sight may be another sequence's: no method had a say in it."""
        return self.held is None and self.looking is None

    def kept_of(self, num_tokens: int) -> int:
        """Of its first `num_tokens` tokens, the leading ones that it can go on from without computing them again."""
        if self.held is not None and num_tokens < self.num_computed:
            return 0
        return min(num_tokens, self.num_computed)

    def truncate(self, num_tokens: int) -> None:
        """Takes the sequence back to its first `num_tokens` tokens, bit for bit as it was when it had those.

        Groups that had left the window since then come back from the tier. If its device part is away, that is done
        when it has come back.

        Where layers share keys, groups that left the window before the call began lack keys, so they can't come back:
        then the sequence goes back to where that window begins, and `num_dropped` tokens must be computed again.
        What was dropped for good can't come back, so a sequence that drops tokens goes back to its beginning.
        """
        state = self.state
        if self.place is not Place.DEVICE:
            del state.tokens[num_tokens:]
            self.reaches.truncate(num_tokens)
            num_tokens = self.kept_of(num_tokens)
            self._rollback = num_tokens if self._rollback is None else min(self._rollback, num_tokens)
            return
        if self.kept_of(num_tokens) < min(num_tokens, state.num_computed):
            tokens = state.tokens[:num_tokens]
            self.forget()
            state.tokens = tokens
            self.reaches.truncate(num_tokens)
            return
        computed = min(num_tokens, state.num_computed)
        if self.looking and computed < state.num_computed:
            self.looking.forget()
        self.counts_shared |= computed < state.num_computed
        # One that went back to the beginning of its window stays there.
        goes_back = computed < state.num_computed
        count = (state.window_start - self.recipe.window_start(computed)) // GROUP_TOKENS if goes_back else 0
        if count > 0:
            # Of those groups, what lies beyond the new end doesn't come back.
            first = self.recipe.window_start(computed)
            back = min(count, max(0, -(-(computed - first) // GROUP_TOKENS)))
            groups = self._load_whole(count, back)
            if groups is None:
                computed, back = first, 0
            # What lies behind those groups goes first: a sequence never holds more than it reserved.
            state.shrink(max(state.window_start, computed))
            state.retreat(count - back)
            if back and groups is not None:
                state.restore_groups(groups)
            self.distant.drop_last(count)
            self._kept_keys.drop(self.distant.num_groups)
            if self.index:
                self.index.truncate(self.distant.num_groups)
            if self.distant.num_groups == 0:
                self._drop_slots()
            elif self._slots:
                self._slots.clear()
        state.shrink(computed)
        del state.tokens[num_tokens:]
        self.reaches.truncate(num_tokens)

    def _load_whole(self, count: int, first: int) -> Tensor | None:
        """Of the last `count` groups the first `first`, `[first, layers, kv, 64, 2, d]`; None if they lack keys."""
        groups = self.distant.load_last(count, first)
        if self.shared is None or first == 0:
            return groups
        start = self.distant.num_groups - count
        keys = self._kept_keys.of(range(start, start + first))
        return None if keys is None else self.shared.groups.unpack(groups, keys)

    # -- what was computed elsewhere ---------------------------------------------------------------------------------

    @property
    def num_adopted(self) -> int:
        """Of a sequence that has adopted what it holds: its groups."""
        return max(0, self.state.num_computed - SINK_TOKENS) // GROUP_TOKENS

    def adopt(self, pairs: Tensor) -> None:
        """Takes the KV of the next tokens as if it had computed them: sinks, or a window.

        Args:
            pairs: `[layers, kv, n, 2, d]`.

        Raises:
            InternalError: there is no place for them.
        """
        state = self.state
        if self.place is not Place.DEVICE or (state.num_computed and state.num_computed < SINK_TOKENS):
            raise InternalError(f"KV of {state.num_computed} tokens is held: sinks come first, and whole")
        state.put(pairs)
        self.check()

    def adopt_groups(self, groups: Tensor, num_tokens: int) -> None:
        """Takes the KV of the groups behind those that were adopted, as far as it is sure where they belong.

        Args:
            groups: as they lie in host memory, `[n, ...]` on the CPU, from group 0 on.
            num_tokens: leading tokens that there will be KV of at least. What is distant of those is taken now, or all
                where nothing is distant, or where groups lack keys, so that they can't be anything else.

        Raises:
            InternalError: something else than sinks and distant groups is computed.
        """
        first = self.num_adopted
        stop = len(groups) if self.shared else self.recipe.distant_groups(num_tokens)
        if self.place is not Place.DEVICE or self.state.num_computed != SINK_TOKENS + first * GROUP_TOKENS:
            raise InternalError(f"KV of {self.state.num_computed} tokens is held: groups come behind groups")
        if self.recipe.distant is Distant.RESIDENT:
            self.state.put_groups(groups[first:])
            return
        for start in range(first, stop, ADOPTED_GROUPS):
            some = groups[start : min(start + ADOPTED_GROUPS, stop)]
            if self.index:
                whole = self.shared.groups.unpack(some) if self.shared else some
                self.index.append(whole.to(self._store.arena.device))
            self.distant.append(some)
        self.state.skip(max(0, stop - first))
        self.check()

    def adopt_rest(self, groups: Tensor, window: Tensor | None) -> None:
        """Takes the last groups, and the window behind them if there is one.

        Args:
            groups: as in `adopt_groups`, all there are. Those that aren't adopted yet belong on the device.
            window: `[layers, kv, n, 2, d]`.
        """
        self.state.put_groups(groups[self.num_adopted :])
        if window is not None:
            self.state.put(window)
        self.check()

    # -- what is stored in the tier below ----------------------------------------------------------------------------

    @property
    def num_stored_groups(self) -> int:
        """Groups that belong in the tier below: those that are distant, or, where nothing is, that are complete."""
        if self.recipe.distant is not Distant.RESIDENT:
            return self.distant.num_groups
        return (self.recipe.stored_until(self.state.num_computed) - SINK_TOKENS) // GROUP_TOKENS

    def stored_groups(self, first: int, stop: int) -> Tensor:
        """A copy of the groups from `first` to `stop - 1` as they are stored."""
        if self.recipe.distant is Distant.RESIDENT:
            return self.state.read_groups(stop - first, first).cpu()
        return self.distant.load(first, stop)

    def stored_window(self) -> Tensor:
        """A copy of the sinks and of what follows the stored groups, `[layers, kv, n, 2, d]` on the CPU."""
        on_device = self.num_stored_groups if self.recipe.distant is Distant.RESIDENT else 0
        return self.state.read_around(on_device).cpu()

    def fork(self) -> SequenceMemory:
        """The same sequence once more. Nothing is copied: what both hold is shared until one of them writes to it."""
        twin = SequenceMemory(self.recipe, self._store)
        twin.counts_shared = True
        twin.state = self.state.fork()
        twin.distant = self.distant.fork()
        twin.index = self.index.fork() if self.index else None
        twin.held = self.held.fork(twin.state) if self.held else None
        twin.looking = self.looking.fork(twin.state) if self.looking else None
        twin.reaches = self.reaches.fork()
        return twin

    # -- making room -------------------------------------------------------------------------------------------------

    @property
    def place(self) -> Place:
        """Where its device part is."""
        return self._parking.place

    def swap_out(self) -> None:
        """Begins to move its device part to the host. Recall slots are dropped: they hold copies."""
        self._drop_slots()
        if self.state.prepared_bytes:  # of a chunk on its way through the layers, which is read again
            self.state.shrink(self.state.num_computed)
        blocks = {Owner.WINDOW: self._window_blocks()}
        if self.index:
            blocks[Owner.INDEX] = self.index.blocks()
        self._parking.leave(blocks)

    def swap_in(self) -> None:
        """Begins to bring it back."""
        self._parking.come_back()

    @property
    def is_moving(self) -> bool:
        """Whether its device part is on its way to the host or back."""
        return self.place in (Place.LEAVING, Place.RETURNING)

    def poll(self) -> Place:
        """Ends a move that is done, and says how far it has come.

        Raises:
            InternalError: the move failed: `forget` what was moved, or `close`.
        """
        blocks = self._parking.poll()
        if blocks is not None:
            window, count = blocks[Owner.WINDOW], self.state.blocks().numel()
            self.state.move_to(window[:count])
            if self._packed:
                self._packed.move_to(window[count:])
            if self.index:
                self.index.move_to(blocks[Owner.INDEX])
            rollback, self._rollback = self._rollback, None
            if rollback is not None:
                # Tokens that were put behind since then have no KV.
                tokens = list(self.state.tokens)
                self.truncate(rollback)
                self.state.tokens = tokens
            if self._begun_at is None:
                self._kept_keys.drop()
        return self.place

    def forget(self) -> None:
        """Drops all KV. Tokens stay, and how each was computed, so that it can be computed again."""
        self._drop_slots()
        self._rollback = None
        self._kept_keys.drop()
        if self.held:
            self.held.forget()
        if self.looking:
            self.looking.forget()
        self.distant.drop_last(self.distant.num_groups)
        if self.place is not Place.DEVICE:
            self._parking.close()
            self.state.forget()
            if self._packed:
                self._packed.forget()
            if self.index:
                self.index.forget()
            return
        tokens = list(self.state.tokens)
        self.state.close()
        if self._packed:
            self._packed.close()
        self.state.tokens = tokens
        if self.index:
            self.index.truncate(0)

    def close(self) -> None:
        """Frees everything."""
        self.forget()
        self.state.tokens = []

    # -- checks ------------------------------------------------------------------------------------------------------

    def blocks(self) -> Tensor:
        """Every device block it holds, int32 `[n]`."""
        held = [self._parking.blocks()]
        if self.place is Place.DEVICE:
            held.append(self._window_blocks())
            if self.index:
                held.append(self.index.blocks())
        if self._slots:
            held.append(self._slots.blocks())
        return torch.cat(held)

    def parked_groups(self) -> list[int]:
        """Every host group that its device part takes."""
        return self._parking.host_groups

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

    @property
    def _packed(self) -> PackedTokens | None:
        return self.held.packed if self.held else None

    def _window_blocks(self) -> Tensor:
        """Device blocks of sinks and window, and behind them those of packed tokens."""
        return torch.cat([self.state.blocks(), self._packed.blocks()]) if self._packed else self.state.blocks()

    def _distant_keys(self, layer: int, start: int, stop: int) -> Tensor:
        """See `KeySource`."""
        arena, num_kv = self._store.arena, self._store.arena.layout.num_kv_heads
        offsets = torch.arange(start, stop).expand(num_kv, -1)
        pairs = torch.empty(offsets.numel(), 2 * arena.layout.head_dim, dtype=arena.layout.dtype, device=arena.device)
        self.distant.gather(layer, offsets, pairs)
        self.counters.streamed_bytes += pairs.nbytes
        return pairs.view(num_kv, stop - start, 2, -1)[:, :, 0]

    def _drop_slots(self) -> None:
        if self._slots:
            self._slots.close()
            self._slots = None


def _held(recipe: RecipeSpec, stages: Stages, state: SequenceState, store: Store) -> HeldTokens:
    if stages.codec is None:
        return HeldTokens(stages, state, store.separators)
    packed = PackedTokens(stages.codec, stages.limits.bits, store.arena)
    return HeldTokens(stages, state, store.separators, packed, most_groups(recipe, stages.codec, store.arena.layout))
