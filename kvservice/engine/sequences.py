"""The sequences an engine holds, and the bytes promised to them. Knows nothing of calls' progress, steps or models."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from kvservice.config.engine import EngineConfig
from kvservice.errors import BudgetTooSmall, ConfigError, InternalError, Overloaded
from kvservice.kv.arena import Arena
from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Ledger, Owner, Reservation
from kvservice.recall.distant import StagingRing, staging_blocks
from kvservice.recall.memory import SequenceMemory
from kvservice.tier.host import HostTier
from kvservice.types import BLOCK_TOKENS, Headroom, ModelShape, RecipeSpec, SessionId, footprint

logger = logging.getLogger(__name__)


class HeldSequences:
    """Arena, host tier and ledger, and the sequences in them.

    A sequence is *busy* while a call runs on it. Idle ones stay, so that the next call finds its KV, until another
    sequence needs their bytes: then the least recently used goes first.

    Raises:
        ConfigError: `kv_bytes` doesn't hold the prefill workspace.
    """

    def __init__(self, shape: ModelShape, layout: KVLayout, config: EngineConfig, device: torch.device) -> None:
        staging = staging_blocks(shape.num_kv_heads)
        num_blocks = config.kv_bytes // layout.block_bytes
        # A step's prefill tokens stay beside the window until it has slid over them. Each sequence may round up.
        chunk_columns = config.prefill_chunk_tokens // BLOCK_TOKENS + config.max_prefills
        for_sequences = num_blocks - staging - chunk_columns * layout.num_cells
        if for_sequences < 0:
            needed = (num_blocks - for_sequences) * layout.block_bytes
            raise ConfigError(
                f"kv_bytes={config.kv_bytes}: the prefill workspace alone takes {needed} bytes; give more, or lower "
                f"prefill_chunk_tokens={config.prefill_chunk_tokens}",
                field="kv_bytes",
            )
        self.ledger = Ledger(for_sequences * layout.block_bytes, config.host_bytes)
        self.arena = Arena(layout, num_blocks, staging, self.ledger, device)
        self.ring = StagingRing(self.arena)
        self._shape = shape
        self._host = HostTier(layout, config.host_bytes // layout.group_bytes, self.ledger, pin=device.type == "cuda")
        self._held: dict[SessionId, SequenceMemory] = {}  # least recently used first
        self._busy: set[SessionId] = set()

    def get(self, session_id: SessionId) -> SequenceMemory | None:
        """The sequence, if it is held."""
        return self._held.get(session_id)

    def is_busy(self, session_id: SessionId) -> bool:
        """Whether a call runs on it."""
        return session_id in self._busy

    def ids(self) -> list[SessionId]:
        """All held sequences, the least recently used first."""
        return list(self._held)

    def acquire(self, session_id: SessionId, recipe: RecipeSpec, num_tokens: int) -> SequenceMemory:
        """Reserves all that the sequence takes on its way to `num_tokens` tokens, and marks it busy.

        Args:
            session_id: held or new.
            recipe: how a new one keeps its KV; a held one keeps its own.
            num_tokens: the most it may grow to.

        Raises:
            BudgetTooSmall: it would not fit if it were alone.
            Overloaded: it doesn't fit beside the busy ones.
        """
        memory = self._held.get(session_id) or SequenceMemory(recipe, self.arena, self._host)
        self.reserve(session_id, memory.recipe, num_tokens)
        self._held.pop(session_id, None)
        self._held[session_id] = memory
        self._busy.add(session_id)
        return memory

    def reserve(self, session_id: SessionId, recipe: RecipeSpec, num_tokens: int) -> None:
        """Grows a sequence's reservation to what `num_tokens` tokens take, dropping idle sequences if it must.

        Raises:
            BudgetTooSmall, Overloaded: as in `acquire`; then nothing has changed.
        """
        ledger = self.ledger
        needed = footprint(self._shape, recipe, num_tokens)
        wanted = Reservation(needed.device_bytes, needed.host_bytes)
        if wanted.device_bytes > ledger.device_capacity_bytes or wanted.host_bytes > ledger.host_capacity_bytes:
            raise BudgetTooSmall(
                f"{num_tokens} tokens under recipe {recipe.name!r} need {wanted.device_bytes} device and "
                f"{wanted.host_bytes} host bytes; there are {ledger.device_capacity_bytes} and "
                f"{ledger.host_capacity_bytes}: raise kv_bytes or host_bytes, shorten the document, or choose a recipe "
                f"that keeps less there"
            )
        reserved = ledger.reservation(session_id)
        # It never shrinks under what it holds now.
        wanted = Reservation(
            max(wanted.device_bytes, reserved.device_bytes), max(wanted.host_bytes, reserved.host_bytes)
        )
        idle = [other for other in self._idle() if other != session_id]
        missing = ledger.shortfall(session_id, wanted)
        freeable = self._reserved_by(idle)
        if missing.device_bytes > freeable.device_bytes or missing.host_bytes > freeable.host_bytes:
            raise Overloaded(
                f"{missing.device_bytes} device and {missing.host_bytes} host bytes are short until running calls end",
                retry_after_s=1.0,
            )
        for other in idle:
            if ledger.shortfall(session_id, wanted) == Reservation(0, 0):
                break
            logger.info("sequence_evicted", extra={"session_id": other})
            self.drop(other)
        ledger.reserve(session_id, wanted)

    def settle(self, session_id: SessionId) -> None:
        """The call has ended: the sequence is idle and gives back what it reserved beyond what it holds."""
        memory = self._held[session_id]
        self._busy.discard(session_id)
        needed = footprint(self._shape, memory.recipe, len(memory.state.tokens))
        self.ledger.reserve(session_id, Reservation(needed.device_bytes, needed.host_bytes))

    def drop(self, session_id: SessionId) -> tuple[int, int]:
        """Frees a sequence. Returns its device and host bytes; (0, 0) if it isn't held."""
        memory = self._held.pop(session_id, None)
        self._busy.discard(session_id)
        self.ledger.release(session_id)
        if memory is None:
            return (0, 0)
        freed = (memory.device_bytes, memory.host_bytes)
        memory.close()
        return freed

    def headroom(self, running_calls: int) -> Headroom:
        """What is left."""
        ledger = self.ledger
        idle = self._reserved_by(self._idle())
        return Headroom(
            device_capacity_bytes=ledger.device_capacity_bytes,
            device_free_bytes=ledger.device_free_bytes,
            device_freeable_bytes=ledger.device_free_bytes + idle.device_bytes,
            host_capacity_bytes=ledger.host_capacity_bytes,
            host_free_bytes=ledger.host_free_bytes,
            host_freeable_bytes=ledger.host_free_bytes + idle.host_bytes,
            running_calls=running_calls,
            resident_sessions=len(self._held),
        )

    def check(self) -> None:
        """Raises InternalError unless arena, host tier and ledger agree with what the sequences hold."""
        self.arena.check()
        self._host.check()
        held = self._held.values()
        for owner, counted in (
            (Owner.WINDOW, sum(memory.state.window_bytes for memory in held)),
            (Owner.INDEX, sum(memory.index_bytes for memory in held)),
            (Owner.SLOTS, sum(memory.slot_bytes for memory in held)),
            (Owner.HOST, sum(memory.host_bytes for memory in held)),
        ):
            if self.ledger.used_bytes(owner) != counted:
                raise InternalError(
                    f"{owner.value}: the ledger says {self.ledger.used_bytes(owner)} bytes, sequences hold {counted}"
                )
        for session_id in self._idle():
            memory, reserved = self._held[session_id], self.ledger.reservation(session_id)
            memory.check()
            if memory.device_bytes > reserved.device_bytes or memory.host_bytes > reserved.host_bytes:
                raise InternalError(
                    f"a sequence holds {memory.device_bytes} and {memory.host_bytes} bytes and reserved {reserved}"
                )

    def _idle(self) -> list[SessionId]:
        return [session_id for session_id in self._held if session_id not in self._busy]

    def _reserved_by(self, session_ids: Iterable[SessionId]) -> Reservation:
        reservations = [self.ledger.reservation(session_id) for session_id in session_ids]
        return Reservation(sum(r.device_bytes for r in reservations), sum(r.host_bytes for r in reservations))
