"""The sequences an engine holds, the bytes promised to them, and how room is made. Knows no steps and no models.

A sequence that must make room goes to host memory, and comes back bit for bit as it was; where the host has no room
either, an idle one is dropped and a running one forgets its KV, which is computed again. A sequence on its way to the
host keeps its bytes until it is there: nothing is ever promised twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvservice.compression.sharing import SharingPlan
from kvservice.config.engine import EngineConfig
from kvservice.engine.demand import Demand, Wish
from kvservice.engine.prefixes import PrefixIndex
from kvservice.errors import QUOTA_KEY, BudgetTooSmall, ConfigError, InternalError, Overloaded, QuotaExceeded
from kvservice.kernels.memory import device_memory
from kvservice.kv.arena import Arena
from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Ledger, Owner, Reservation
from kvservice.kv.occupancy import ByteSeconds, Occupancy
from kvservice.recall.distant import StagingRing, staging_blocks
from kvservice.recall.memory import SequenceMemory, SharedStore, Store
from kvservice.recall.parking import Place
from kvservice.recall.sharing import SharedCells
from kvservice.tier.host import HostTier
from kvservice.tier.swap import SwapSpace
from kvservice.types import (
    BLOCK_TOKENS,
    Headroom,
    ModelShape,
    RecipeSpec,
    RestoredKv,
    RestoredWindow,
    SessionId,
    TenantTerms,
)

logger = logging.getLogger(__name__)

NOTHING = Reservation(0, 0)

OBSERVE_INTERVAL_S = 0.05
"""Running sequences' bytes are added up over time in steps of at least so long."""

QUOTA_RETRY_AFTER_S = 1.0
"""When a running call of the tenant may have ended: a guess."""


@dataclass(slots=True)
class Evictions:
    """What making room has cost so far."""

    idle_swapped: int = 0
    idle_dropped: int = 0
    swapped: int = 0
    forgotten: int = 0


@dataclass(slots=True)
class _Holding:
    """A sequence that is held.

    Attributes:
        tenant: whose it is.
        occupancy: the bytes that it has taken over time.
        granted: what it has bytes for; None for an idle one, and for one that made room until it asks again.
    """

    memory: SequenceMemory
    tenant: bytes
    occupancy: Occupancy
    is_busy: bool = True
    granted: Wish | None = None


class HeldSequences:
    """Arena, host tier and ledger, and the sequences in them.

    A sequence is *busy* while a call runs on it. Idle ones stay, so that the next call finds their KV, until another
    sequence needs their bytes: then the least recently used goes first.

    Args:
        shape: of the model, under `plan`.
        layout: of its KV.
        config: budgets.
        device: the model's.
        plan: how distant keys are shared, by recipes that do that; None: none can.
        clock: seconds, monotonic.
        separators: tokens that end a part of a sentence, for methods that keep these.

    Raises:
        ConfigError: `kv_bytes` doesn't hold the prefill workspace.
    """

    def __init__(
        self,
        shape: ModelShape,
        layout: KVLayout,
        config: EngineConfig,
        device: torch.device,
        plan: SharingPlan | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        separators: frozenset[int] = frozenset(),
    ) -> None:
        self._clock = clock
        staging = staging_blocks(shape.num_kv_heads)
        num_blocks = config.kv_bytes // layout.block_bytes
        # A step's prefill tokens stay beside the window until it has slid over them. Each sequence may round up.
        chunk_columns = config.step_tokens // BLOCK_TOKENS + config.max_prefills
        for_sequences = num_blocks - staging - chunk_columns * layout.num_cells
        if for_sequences < 0:
            needed = (num_blocks - for_sequences) * layout.block_bytes
            raise ConfigError(
                f"kv_bytes={config.kv_bytes}: the prefill workspace alone takes {needed} bytes; give more, or lower "
                f"step_tokens={config.step_tokens}",
                field="kv_bytes",
            )
        self.ledger = Ledger(for_sequences * layout.block_bytes, config.host_bytes)
        memory = device_memory(num_blocks * layout.block_bytes, device)
        self.arena = Arena(layout, num_blocks, staging, self.ledger, device, memory)
        self.ring = StagingRing(self.arena)
        self.evictions = Evictions()
        self._demand = Demand(shape)
        self._host = HostTier(
            layout,
            config.host_bytes // layout.group_bytes,
            self.ledger,
            pin=device.type == "cuda",
            gives_back=plan is not None and device.type != "cuda",
        )
        self._shared: SharedStore | None = None
        if plan is not None:
            cells = SharedCells(plan, layout)
            num_groups = config.host_bytes // cells.groups.group_bytes
            # Both segments could take all of `host_bytes`; the ledger sees to it that together they don't.
            host = HostTier(layout, num_groups, self.ledger, pin=False, groups=cells.groups, gives_back=True)
            self._shared = SharedStore(cells, host)
        self._store = Store(self.arena, self._host, SwapSpace(self.arena, self._host), self._shared, separators)
        self._held: dict[SessionId, _Holding] = {}  # least recently used first
        self._moving: dict[SessionId, SequenceMemory] = {}
        self._prefixes = PrefixIndex()
        self._observed_at = clock()
        self._unclaimed: dict[SessionId, ByteSeconds] = {}
        self._left_over: dict[bytes, ByteSeconds] = {}

    # -- who is here -------------------------------------------------------------------------------------------------

    def get(self, session_id: SessionId) -> SequenceMemory | None:
        """The sequence, if it is held."""
        holding = self._held.get(session_id)
        return holding.memory if holding else None

    def is_busy(self, session_id: SessionId) -> bool:
        """Whether a call runs on it."""
        holding = self._held.get(session_id)
        return holding is not None and holding.is_busy

    def ids(self) -> list[SessionId]:
        """All held sequences, the least recently used first."""
        return list(self._held)

    def new(self, recipe: RecipeSpec) -> SequenceMemory:
        """A sequence without tokens. It is held once it is `add`ed."""
        return SequenceMemory(recipe, self._store)

    def groups_of(self, restored: RestoredKv, recipe: RecipeSpec) -> Tensor:
        """The groups that have come from a tier for a sequence, `[n, ...]` as its recipe has them in host memory."""
        dtype, groups = self.arena.layout.dtype, self._store.host_of(recipe).groups
        arrived = restored.memory[: restored.num_arrived * groups.group_bytes]
        if not arrived:
            return torch.empty(0, *groups.shape, dtype=dtype)
        return torch.frombuffer(arrived, dtype=dtype).view(-1, *groups.shape)

    def window_of(self, window: RestoredWindow) -> Tensor:
        """Sinks and window from a tier, `[layers, kv, n, 2, d]`."""
        layout = self.arena.layout
        numbers = torch.frombuffer(window.memory, dtype=layout.dtype)
        return numbers.view(layout.num_layers, layout.num_kv_heads, -1, 2, layout.head_dim)

    def add(self, session_id: SessionId, memory: SequenceMemory, tenant: bytes) -> None:
        """Holds a tenant's sequence from now on, busy, in place of one of the same name."""
        holding = self._held.pop(session_id, None)
        if holding is not None and holding.memory is not memory:
            self._free(session_id, holding)
            holding = None
        if holding is None:
            holding = _Holding(memory, tenant, Occupancy(self._clock()))
            self.ledger.reserve_shared(session_id, Reservation(memory.device_bytes, memory.host_bytes))
        holding.is_busy = True
        self._held[session_id] = holding
        self._observe(holding)

    def settle(self, session_id: SessionId) -> None:
        """The call has ended: the sequence is idle and gives back what it reserved beyond what it holds."""
        holding = self._held[session_id]
        holding.is_busy, holding.granted = False, None
        holding.memory.end_call()
        self._fit(session_id)
        self._observe(holding)

    def drop(self, session_id: SessionId) -> tuple[int, int]:
        """Frees a sequence. Returns its device and host bytes; (0, 0) if it isn't held."""
        holding = self._held.pop(session_id, None)
        return (0, 0) if holding is None else self._free(session_id, holding)

    def close(self) -> None:
        """Drops everything."""
        for session_id in self.ids():
            self.drop(session_id)
        self._store.swap.close()

    def num_parked(self) -> int:
        """Held sequences that are in host memory, or on their way there or back."""
        return sum(holding.memory.place is not Place.DEVICE for holding in self._held.values())

    # -- prefixes ----------------------------------------------------------------------------------------------------

    def publish(self, session_id: SessionId, tenant_tag: bytes) -> None:
        """Lets calls of the same tenant find what of the sequence depends on its tokens alone."""
        memory = self._held[session_id].memory
        if not memory.depends_on_tokens_alone:
            return
        tokens = memory.state.tokens[: min(memory.reaches.full_prefix, memory.state.num_computed)]
        self._prefixes.update(session_id, tenant_tag, memory.recipe.name, tokens)

    def unpublish(self, session_id: SessionId) -> None:
        """Forgets the sequence's prefixes: it is about to lose tokens."""
        self._prefixes.remove(session_id)

    def longest_prefix(
        self, tenant_tag: bytes, recipe: RecipeSpec, tokens: Sequence[int]
    ) -> tuple[SessionId | None, int]:
        """The sequence on the device that shares the longest prefix of `tokens`, and that prefix's length."""
        session_id, length = self._prefixes.longest(tenant_tag, recipe.name, tokens)
        if session_id is None or self._held[session_id].memory.place is not Place.DEVICE:
            return None, 0
        return session_id, length

    def reported_prefixes(self) -> tuple[int, ...]:
        """Names for gateways of prefixes that are held."""
        return self._prefixes.report()

    def fork_prefix(self, session_id: SessionId) -> SequenceMemory:
        """A copy of a held sequence, in shared blocks. The caller truncates it, and closes it if it isn't `add`ed."""
        return self._held[session_id].memory.fork()

    # -- room --------------------------------------------------------------------------------------------------------

    def check_fits(self, recipe: RecipeSpec, wish: Wish) -> None:
        """Raises BudgetTooSmall unless a sequence, with its answers, fits when it is alone."""
        needed = self._demand.alone(recipe, wish)
        if (
            needed.device_bytes > self.ledger.device_capacity_bytes
            or needed.host_bytes > self.ledger.host_capacity_bytes
        ):
            raise BudgetTooSmall(
                f"{wish.num_tokens} tokens under recipe {recipe.name!r} need {needed.device_bytes} device and "
                f"{needed.host_bytes} host bytes; there are {self.ledger.device_capacity_bytes} and "
                f"{self.ledger.host_capacity_bytes}: raise kv_bytes or host_bytes, shorten the document, or choose a "
                f"recipe that keeps less there"
            )

    def check_room(
        self, session_id: SessionId, memory: SequenceMemory, wish: Wish, victims: Sequence[SessionId]
    ) -> None:
        """Raises Overloaded unless there is room for a sequence, or will be when others have given way.

        Args:
            session_id: what it is called, or will be.
            memory: the sequence, wherever it is. One of the same name that is held will be dropped for it.
            wish: what it is to grow to.
            victims: busy sequences that may be made to give way.
        """
        self._fit_sharers()
        wanted = self._demand.of(memory, wish)
        old = self.get(session_id)
        if old is not None and old is not memory:
            # What it shares stays when it goes.
            device, host = old.shared_bytes_lost(0)
            wanted = Reservation(wanted.device_bytes + device, wanted.host_bytes + host)
        missing = self.ledger.shortfall(session_id, wanted)
        freeable = self._reserved_by({*self._idle(session_id), *victims, *self._leaving(session_id)})
        if missing.device_bytes > freeable.device_bytes or missing.host_bytes > freeable.host_bytes:
            raise Overloaded(
                f"{missing.device_bytes} device and {missing.host_bytes} host bytes are short until running calls end",
                retry_after_s=1.0,
            )

    def make_room(self, session_id: SessionId, wish: Wish, victims: Sequence[SessionId]) -> bool:
        """Reserves what a sequence takes, making others give way if it must.

        Args:
            session_id: a held sequence, wherever it is.
            wish: what it is to grow to.
            victims: busy sequences that may be made to give way, the first first.

        Returns:
            Whether the bytes are reserved. If not, others are on their way to the host: ask again.

        Raises:
            Overloaded: it doesn't fit, even if all of those gave way. Then nothing has changed.
        """
        holding = self._held[session_id]
        self.check_room(session_id, holding.memory, wish, victims)
        wanted = self._demand.of(holding.memory, wish)
        coming = self._reserved_by(self._leaving(session_id)).device_bytes
        for other in (*self._idle(session_id), *victims):
            missing = self.ledger.shortfall(session_id, wanted)
            if missing.host_bytes == 0 and missing.device_bytes <= coming:
                break  # Nothing is missing, or it is on its way.
            if self._has_nothing_to_give(other, for_host=missing.host_bytes > 0):
                continue
            coming += self._evict(other, for_host=missing.host_bytes > 0)
        if self.ledger.shortfall(session_id, wanted) != NOTHING:
            return False
        self.ledger.reserve(session_id, wanted)
        holding.granted = wish
        return True

    def begin(self, session_id: SessionId) -> None:
        """A busy sequence was taken back to the tokens that it goes on from."""
        holding = self._held[session_id]
        assert holding.granted is not None
        holding.granted = replace(holding.granted, num_kept=None)
        holding.memory.begin_call()
        self._fit(session_id)
        self._observe(holding)

    def give_back(self, session_id: SessionId) -> None:
        """A busy sequence has dropped what it held while it was reading: it gives back the bytes that it reserved."""
        self._fit(session_id)

    def bring_back(self, session_id: SessionId) -> None:
        """Begins to bring a sequence in host memory back to the device, in the bytes that it has reserved."""
        holding = self._held[session_id]
        self._moving[session_id] = holding.memory
        holding.memory.swap_in()
        self._observe(holding)

    def fork_answer(self, session_id: SessionId, answer_id: SessionId, wish: Wish) -> SequenceMemory:
        """Forks a busy sequence for one more answer, in the bytes that `make_room` reserved for it.

        Args:
            session_id: the sequence.
            answer_id: name of the fork.
            wish: what is left to the sequence, without this answer.
        """
        twin, own = self._held[session_id].memory.fork(), Wish(wish.num_tokens)
        self.add(answer_id, twin, self._held[session_id].tenant)
        wanted = self._demand.of(twin, own)
        more = Reservation(wanted.device_bytes - twin.device_bytes, wanted.host_bytes - twin.host_bytes)
        self.ledger.hand_over(session_id, answer_id, more)
        self._held[session_id].granted, self._held[answer_id].granted = wish, own
        return twin

    def reserved_tokens(self, session_id: SessionId) -> int:
        """How many tokens a busy sequence has bytes for; 0 for one that made room, until it asks again."""
        wish = self._held[session_id].granted
        return wish.num_tokens if wish else 0

    def wait_for_moves(self, timeout_s: float) -> bool:
        """Waits until a move under way is done, at most `timeout_s`; False if there is none."""
        return self._store.swap.wait(timeout_s)

    def poll(self) -> list[SessionId]:
        """Ends moves that are done.

        Returns:
            Busy sequences whose move failed: their KV is lost. Idle ones of that kind are dropped.
        """
        lost = []
        for session_id, memory in list(self._moving.items()):
            try:
                place = memory.poll()
            except InternalError:
                logger.exception("sequence_lost", extra={"session_id": session_id})
                if self._lose(session_id):
                    lost.append(session_id)
                continue
            if place is Place.PARKED:
                self._held[session_id].granted = None
                self.ledger.reserve(session_id, Reservation(0, memory.host_bytes))
            elif place is Place.DEVICE:
                self._fit(session_id)
            if not memory.is_moving:
                del self._moving[session_id]
            self._observe(self._held[session_id])
        return lost

    def headroom(self, running_calls: int) -> Headroom:
        """What is left."""
        ledger = self.ledger
        idle = self._reserved_by(self._idle(None))
        return Headroom(
            device_capacity_bytes=ledger.device_capacity_bytes,
            device_free_bytes=max(0, ledger.device_free_bytes),
            device_freeable_bytes=min(ledger.device_capacity_bytes, ledger.device_free_bytes + idle.device_bytes),
            host_capacity_bytes=ledger.host_capacity_bytes,
            host_free_bytes=max(0, ledger.host_free_bytes),
            host_freeable_bytes=min(ledger.host_capacity_bytes, ledger.host_free_bytes + idle.host_bytes),
            running_calls=running_calls,
            resident_sessions=len(self._held),
        )

    # -- tenants -----------------------------------------------------------------------------------------------------

    def tenant_of(self, session_id: SessionId) -> bytes:
        """Whose a held sequence is."""
        return self._held[session_id].tenant

    def keep_to_terms(
        self, session_id: SessionId, memory: SequenceMemory, wish: Wish, tenant: bytes, terms: TenantTerms
    ) -> None:
        """Has a tenant's idle sequences make room for one more, until together they keep to its limits.

        Args:
            session_id: what the sequence is called, or will be.
            memory: the sequence; not yet held, perhaps.
            wish: what it is to grow to.
            tenant: whose it is.
            terms: its limits.

        Raises:
            QuotaExceeded: what runs leaves no room. Nothing has changed.
        """
        if terms.device_bytes is None and terms.host_bytes is None:
            return
        wanted = self._demand.of(memory, wish)
        others = [other for other, held in self._held.items() if held.tenant == tenant and other != session_id]
        running = self._reserved_by(other for other in others if self._held[other].is_busy)
        for quota, most, taken in (
            ("device_bytes", terms.device_bytes, running.device_bytes + wanted.device_bytes),
            ("host_bytes", terms.host_bytes, running.host_bytes + wanted.host_bytes),
        ):
            if most is not None and taken > most:
                raise QuotaExceeded(
                    f"with this call the tenant's running calls would hold {taken} {quota.replace('_', ' ')} on the "
                    f"worker, and may hold {most}: try again when one has ended, or send fewer tokens",
                    retry_after_s=QUOTA_RETRY_AFTER_S,
                    metadata={QUOTA_KEY: quota},
                )
        left = running.device_bytes + wanted.device_bytes, running.host_bytes + wanted.host_bytes
        idle = [other for other in others if not self._held[other].is_busy]
        for other in idle:
            rest = self._reserved_by(each for each in idle if each in self._held)
            over_device = terms.device_bytes is not None and left[0] + rest.device_bytes > terms.device_bytes
            over_host = terms.host_bytes is not None and left[1] + rest.host_bytes > terms.host_bytes
            if not over_device and not over_host:
                return
            self._drop_idle(other)

    def observe_running(self) -> None:
        """Adds up over time what running sequences hold. To be called after each step."""
        now = self._clock()
        if now - self._observed_at >= OBSERVE_INTERVAL_S:
            self._observed_at = now
            for holding in self._held.values():
                if holding.is_busy:
                    self._observe(holding)

    def observe(self, session_id: SessionId) -> None:
        """Adds up over time what a held sequence holds."""
        self._observe(self._held[session_id])

    def take_byte_seconds(self, session_id: SessionId) -> ByteSeconds:
        """What a session's KV has taken since this was last asked, whether it is still held or not."""
        taken = self._unclaimed.pop(session_id, ByteSeconds())
        holding = self._held.get(session_id)
        if holding is not None:
            self._observe(holding)
            taken += holding.occupancy.take()
        return taken

    def leave_over(self, session_id: SessionId, tenant: bytes) -> None:
        """A sequence is gone that belongs to no session: what it has taken is its tenant's next call's."""
        self._left_over[tenant] = self._left_over.get(tenant, ByteSeconds()) + self.take_byte_seconds(session_id)

    def take_left_over(self, tenant: bytes) -> ByteSeconds:
        """What was left over of a tenant's calls."""
        return self._left_over.pop(tenant, ByteSeconds())

    def _observe(self, holding: _Holding) -> None:
        memory = holding.memory
        holding.occupancy.observe(self._clock(), memory.device_bytes, memory.host_bytes)

    # -- checks ------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises InternalError unless arena, host tier and ledger agree with what the sequences hold."""
        held = [holding.memory for holding in self._held.values()]
        nothing = torch.empty(0, dtype=torch.int32, device=self.arena.device)
        self.arena.check(torch.cat([nothing, *(memory.blocks() for memory in held)]))
        sharing = [memory for memory in held if memory.shared]
        whole = [number for memory in held if not memory.shared for number in memory.distant.host_groups]
        self._host.check([*whole, *(number for memory in held for number in memory.parked_groups())])
        if self._shared is not None:
            self._shared.host.check([number for memory in sharing for number in memory.distant.host_groups])
        for owner, counted in (
            (Owner.WINDOW, sum(memory.window_bytes for memory in held)),
            (Owner.INDEX, sum(memory.index_bytes for memory in held)),
            (Owner.SLOTS, sum(memory.slot_bytes for memory in held)),
            (Owner.HOST, sum(memory.host_bytes for memory in held)),
        ):
            told = self.ledger.used_bytes(owner) + self.ledger.shared_bytes(owner)
            if told != counted:
                raise InternalError(f"{owner.value}: the ledger says {told} bytes, sequences hold {counted}")
        for session_id, holding in self._held.items():
            memory, reserved = holding.memory, self.ledger.reservation(session_id)
            if memory.is_moving != (session_id in self._moving):
                raise InternalError(f"a sequence is {memory.place.value} and is not known to be so")
            if memory.place is Place.DEVICE:
                memory.check()
            # Room for tokens on their way through the layers is the workspace's.
            if (
                memory.device_bytes - memory.prepared_bytes > reserved.device_bytes
                or memory.host_bytes > reserved.host_bytes
            ):
                raise InternalError(
                    f"a sequence of {len(memory.state.tokens)} tokens ({memory.num_computed} computed, "
                    f"{memory.recipe.name}, {memory.place.value}) holds {memory.device_bytes} bytes, "
                    f"{memory.prepared_bytes} of them for a step under way, and {memory.host_bytes} in the host tier; "
                    f"{reserved} reserved for {holding.granted}"
                )

    # ----------------------------------------------------------------------------------------------------------------

    def _fit(self, session_id: SessionId) -> None:
        """A sequence on the device gives back what it reserved beyond what was granted, or, idle, holds."""
        holding, reserved = self._held[session_id], self.ledger.reservation(session_id)
        memory = holding.memory
        if memory.place is Place.DEVICE:
            wanted = self._demand.of(memory, holding.granted or Wish(len(memory.state.tokens)))
            # Never more than before: what it shares with a newer fork, that one counts.
            device = min(wanted.device_bytes, reserved.device_bytes)
            self.ledger.reserve(session_id, Reservation(device, min(wanted.host_bytes, reserved.host_bytes)))

    def _fit_sharers(self) -> None:
        """What was reserved to be copied one day, and has been since, is given back."""
        for session_id, holding in self._held.items():
            if holding.memory.counts_shared:
                self._fit(session_id)

    def _idle(self, besides: SessionId | None) -> list[SessionId]:
        return [other for other, holding in self._held.items() if not holding.is_busy and other != besides]

    def _leaving(self, besides: SessionId) -> list[SessionId]:
        return [other for other, memory in self._moving.items() if memory.place is Place.LEAVING and other != besides]

    def _evict(self, session_id: SessionId, *, for_host: bool) -> int:
        """Makes a sequence give way. Returns the device bytes that will come free once it has left."""
        holding = self._held[session_id]
        memory, busy = holding.memory, holding.is_busy
        reserved = self.ledger.reservation(session_id)
        holding.granted = None
        counts = self.evictions
        if not for_host and self._can_swap_out(session_id, memory):
            memory.swap_out()
            self._moving[session_id] = memory
            self._observe(holding)
            counts.swapped += busy
            counts.idle_swapped += not busy
            logger.info("sequence_swapped_out", extra={"session_id": session_id, "running": busy})
            return reserved.device_bytes
        if not busy:
            self._drop_idle(session_id)
            return 0
        counts.forgotten += 1
        logger.info("sequence_forgotten", extra={"session_id": session_id})
        self._forget(session_id)
        return 0

    def _forget(self, session_id: SessionId) -> None:
        """A busy sequence loses its KV and its bytes."""
        holding = self._held[session_id]
        holding.granted = None
        self._prefixes.remove(session_id)
        holding.memory.forget()
        self.ledger.reserve(session_id, NOTHING)
        self._observe(holding)

    def _lose(self, session_id: SessionId) -> bool:
        """A sequence's move failed. Whether a call ran on it."""
        if not self._held[session_id].is_busy:
            self.drop(session_id)
            return False
        del self._moving[session_id]
        self._forget(session_id)
        return True

    def _has_nothing_to_give(self, session_id: SessionId, *, for_host: bool) -> bool:
        if self.ledger.reservation(session_id) == NOTHING:
            return True
        memory = self._held[session_id].memory
        return memory.is_moving or (memory.place is Place.PARKED and not for_host)

    def _can_swap_out(self, session_id: SessionId, memory: SequenceMemory) -> bool:
        """Reserves host bytes for a sequence's device part, if it has one and they are there or can be made free."""
        if memory.place is not Place.DEVICE or memory.num_computed == 0 or not self._store.swap.has_room:
            return False
        device_bytes = self.ledger.reservation(session_id).device_bytes
        wanted = Reservation(device_bytes, memory.host_bytes + memory.swap_bytes())
        # Idle ones in host memory go first: all of them for a running one, else those used less recently.
        parked = []
        for other, holding in self._held.items():
            if other == session_id and not holding.is_busy:
                break
            if not holding.is_busy and holding.memory.place is Place.PARKED:
                parked.append(other)
        if self.ledger.shortfall(session_id, wanted).host_bytes > self._reserved_by(parked).host_bytes:
            return False
        for other in parked:
            if self.ledger.shortfall(session_id, wanted).host_bytes == 0:
                break
            self._drop_idle(other)
        if self.ledger.shortfall(session_id, wanted).host_bytes:
            return False
        self.ledger.reserve(session_id, wanted)
        return True

    def _drop_idle(self, session_id: SessionId) -> None:
        self.evictions.idle_dropped += 1
        logger.info("sequence_evicted", extra={"session_id": session_id})
        self.drop(session_id)

    def _free(self, session_id: SessionId, holding: _Holding) -> tuple[int, int]:
        """Frees what a sequence that is no longer held has; device and host bytes of it."""
        memory = holding.memory
        holding.occupancy.observe(self._clock(), 0, 0)
        self._unclaimed[session_id] = self._unclaimed.get(session_id, ByteSeconds()) + holding.occupancy.take()
        self._moving.pop(session_id, None)
        self._prefixes.remove(session_id)
        freed = (memory.device_bytes, memory.host_bytes)
        memory.close()
        self.ledger.release(session_id)
        return freed

    def _reserved_by(self, session_ids: Iterable[SessionId]) -> Reservation:
        reservations = [self.ledger.reservation(session_id) for session_id in session_ids]
        return Reservation(sum(r.device_bytes for r in reservations), sum(r.host_bytes for r in reservations))
