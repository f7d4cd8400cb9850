"""The engine: sequences, admission and steps. Single-threaded: one thread makes all calls.

A sequence outlives its calls, so that the next question finds the document's KV. It is only a cache of the session:
each call brings all tokens of the session, and what isn't held is computed again, and counted.

    submit → reserve bytes, line up tokens ─┐
                                            ▼
    step:  schedule → forward → commit, slide window → sample → events
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor

from kvservice.attention.batch import BatchAttention, Reach, SequenceRows, prepare
from kvservice.compression.protocols import RECALL_INDEXES
from kvservice.config.engine import EngineConfig
from kvservice.config.recipes import DEFAULT_RECIPE, SERVED_RECIPES
from kvservice.engine.ports import GroupWriter
from kvservice.engine.running import RunningCall
from kvservice.engine.sampler import sample
from kvservice.engine.scheduler import Scheduled, schedule
from kvservice.errors import (
    BudgetTooSmall,
    ConfigError,
    Conflict,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    KVServiceError,
    Overloaded,
    PromptTooLong,
)
from kvservice.kv.arena import Arena
from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Ledger, Owner, Reservation
from kvservice.models.llama import LlamaModel
from kvservice.recall.distant import StagingRing, staging_blocks
from kvservice.recall.memory import RecallCounters, SequenceMemory
from kvservice.tier.host import HostTier
from kvservice.types import (
    BLOCK_TOKENS,
    GROUP_TOKENS,
    CallId,
    Distant,
    EngineCall,
    EngineEvent,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    Headroom,
    KvTelemetry,
    ModelInfo,
    OnMiss,
    ProgressEvent,
    RecipeSpec,
    SessionId,
    TokenEvent,
    Usage,
    WorkerStats,
    footprint,
)

logger = logging.getLogger(__name__)

RATE_SMOOTHING = 0.1
"""Weight of the newest step in the reported speeds."""

WRITER_PATIENCE_S = 0.05
"""How long a step waits for the tier when prefill is all there is to do and the tier is behind."""


class Engine:
    """Computes calls on sequences of one model within byte budgets.

    Args:
        model: the model; its device is the engine's.
        config: budgets.
        writer: takes the groups that leave the device, for the tier below host memory.
        clock: seconds, monotonic.

    Raises:
        ConfigError: `kv_bytes` doesn't hold the prefill workspace.
    """

    def __init__(
        self,
        model: LlamaModel,
        config: EngineConfig,
        writer: GroupWriter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        RECALL_INDEXES.discover("kvservice.methods")
        self._model = model
        self._config = config
        self._writer = writer
        self._clock = clock
        self._shape = model.spec.shape
        self._layout = KVLayout.of(self._shape, model.dtype)
        staging = staging_blocks(self._shape.num_kv_heads)
        num_blocks = config.kv_bytes // self._layout.block_bytes
        # A step's prefill tokens stay beside the window until it has slid over them. Each sequence may round up.
        chunk_columns = config.prefill_chunk_tokens // BLOCK_TOKENS + config.max_prefills
        for_sequences = num_blocks - staging - chunk_columns * self._layout.num_cells
        if for_sequences < 0:
            needed = (num_blocks - for_sequences) * self._layout.block_bytes
            raise ConfigError(
                f"kv_bytes={config.kv_bytes}: the prefill workspace alone takes {needed} bytes; give more, or lower "
                f"prefill_chunk_tokens={config.prefill_chunk_tokens}",
                field="kv_bytes",
            )
        self._ledger = Ledger(for_sequences * self._layout.block_bytes, config.host_bytes)
        self._ledger.add(Owner.WEIGHTS, model.weight_bytes)
        self._arena = Arena(self._layout, num_blocks, staging, self._ledger, model.device)
        on_cuda = model.device.type == "cuda"
        self._host = HostTier(self._layout, config.host_bytes // self._layout.group_bytes, self._ledger, pin=on_cuda)
        self._ring = StagingRing(self._arena)
        self._held: dict[SessionId, SequenceMemory] = {}  # least recently used first
        self._running: dict[CallId, RunningCall] = {}
        self._busy: dict[SessionId, CallId] = {}
        self._events: list[EngineEvent] = []
        self._stats = WorkerStats()

    @property
    def info(self) -> ModelInfo:
        """What the engine serves."""
        spec = self._model.spec
        return ModelInfo(spec.name, self._shape, SERVED_RECIPES, DEFAULT_RECIPE, spec.origin)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something."""
        return bool(self._running or self._events)

    # -- admission ---------------------------------------------------------------------------------------------------

    def submit(self, call: EngineCall) -> None:
        """Admits a call: reserves all the bytes it can come to need, or refuses and changes nothing.

        Raises:
            InvalidRequest: nothing to compute.
            PromptTooLong: more tokens than the model has positions.
            Conflict: the session has a call running.
            FailedPrecondition: the recipe needs what the session dropped, or KV is missing and `on_miss` is FAIL.
            BudgetTooSmall: it would not fit if it were alone.
            Overloaded: it doesn't fit now.
        """
        num_tokens = self._check(call)
        held = self._held.get(call.session_id)
        if held is not None:
            _check_recipe(held.recipe, call.recipe)
        storage = call.recipe if held is None else held.recipe
        kept = 0 if held is None else _common_prefix(held.state.tokens, call.base_tokens)
        pending = 1 if held is not None and held.state.num_computed < kept else 0
        recomputed = len(call.base_tokens) - kept
        if recomputed and call.on_miss is OnMiss.FAIL:
            raise FailedPrecondition(
                f"KV of {recomputed} tokens is held nowhere and on_miss is fail; allow recompute", reason="kv_missing"
            )
        self._reserve(call.session_id, storage, num_tokens)
        memory = held or SequenceMemory(call.session_id, storage, self._arena, self._host)
        self._held.pop(call.session_id, None)
        self._held[call.session_id] = memory
        memory.truncate(kept)
        if recomputed + pending + len(call.document_tokens) + len(call.prompt_tokens) == 0:
            # Going on from a fully computed prefix: its last token is computed again for its logits.
            memory.truncate(kept - 1)
        start = memory.state.num_computed
        memory.state.tokens[:] = [*call.base_tokens, *call.document_tokens, *call.prompt_tokens]
        documents_end = len(call.base_tokens) + len(call.document_tokens)
        self._running[call.call_id] = RunningCall(
            call=call,
            memory=memory,
            full_until=documents_end if recomputed or call.document_tokens else start,
            recomputed_tokens=recomputed,
            counters_before=replace(memory.counters),
            admitted_at=self._clock(),
            prefill_from=start,
        )
        self._busy[call.session_id] = call.call_id

    def _check(self, call: EngineCall) -> int:
        """Refuses what can never run; returns the most tokens that the sequence may come to hold."""
        if call.session_id in self._busy:
            raise Conflict(f"session {call.session_id} has a call running; wait for it", reason="session_busy")
        if len(self._running) >= self._config.max_running:
            raise Overloaded(f"{len(self._running)} calls are running, the most there may be", retry_after_s=1.0)
        given = len(call.base_tokens) + len(call.document_tokens) + len(call.prompt_tokens)
        if given == 0 or (call.sampling is None and not call.document_tokens):
            raise InvalidRequest("there are no tokens to compute", reason="empty")
        new = call.sampling.max_new_tokens if call.sampling else 0
        if given + new > self._shape.max_positions:
            raise PromptTooLong(
                f"{given} tokens and up to {new} new ones: the model has {self._shape.max_positions} positions"
            )
        tokens = (*call.base_tokens, *call.document_tokens, *call.prompt_tokens)
        if max(tokens) >= self._shape.vocab_size or min(tokens) < 0:
            wrong = next(token for token in tokens if not 0 <= token < self._shape.vocab_size)
            raise InvalidRequest(f"token id {wrong}: must be in 0 to {self._shape.vocab_size - 1}")
        return given + new

    def _reserve(self, session_id: SessionId, recipe: RecipeSpec, num_tokens: int) -> None:
        needed = footprint(self._shape, recipe, num_tokens)
        wanted = Reservation(needed.device_bytes, needed.host_bytes)
        ledger = self._ledger
        if wanted.device_bytes > ledger.device_capacity_bytes or wanted.host_bytes > ledger.host_capacity_bytes:
            raise BudgetTooSmall(
                f"{num_tokens} tokens under recipe {recipe.name!r} need {wanted.device_bytes} device and "
                f"{wanted.host_bytes} host bytes; there are {ledger.device_capacity_bytes} and "
                f"{ledger.host_capacity_bytes}: raise kv_bytes or host_bytes, shorten the document, or choose a recipe "
                f"that keeps less on the device"
            )
        held = ledger.reservation(session_id)
        # A session never shrinks while it is read: keep at least what it holds.
        wanted = Reservation(max(wanted.device_bytes, held.device_bytes), max(wanted.host_bytes, held.host_bytes))
        missing = ledger.shortfall(session_id, wanted)
        idle = [other for other in self._held if other not in self._busy and other != session_id]
        freeable = [ledger.reservation(other) for other in idle]
        if missing.device_bytes > sum(r.device_bytes for r in freeable) or missing.host_bytes > sum(
            r.host_bytes for r in freeable
        ):
            raise Overloaded(
                f"{missing.device_bytes} device and {missing.host_bytes} host bytes are short until running calls end",
                retry_after_s=1.0,
            )
        for other in idle:
            if ledger.shortfall(session_id, wanted) == Reservation(0, 0):
                break
            logger.info("session_evicted", extra={"session_id": other})
            self._drop(other)
        ledger.reserve(session_id, wanted)

    # -- control -----------------------------------------------------------------------------------------------------

    def cancel(self, call_id: CallId) -> None:
        """Ends a call and frees what it took, at once. Unknown ids are ignored: the call may have just ended."""
        if call_id in self._running:
            self._finish(self._running[call_id], FinishReason.CANCELLED)

    def stop(self, call_id: CallId) -> None:
        """Ends a call whose text reached a stop string; what it generated stays."""
        if call_id in self._running:
            self._finish(self._running[call_id], FinishReason.STOP)

    def release(self, session_id: SessionId, tenant_tag: bytes = b"", *, purge: bool = False) -> tuple[int, int]:
        """Drops a session's KV, cancelling its call if one runs.

        Args:
            session_id: the session.
            tenant_tag: needed for `purge`.
            purge: also delete its blobs in the tier below.

        Returns:
            Device and host bytes freed.
        """
        if session_id in self._busy:
            self.cancel(self._busy[session_id])
        if purge:
            self._writer.delete(tenant_tag, session_id)
        return self._drop(session_id)

    def close(self) -> None:
        """Drops everything."""
        for session_id in list(self._held):
            self.release(session_id)

    def _drop(self, session_id: SessionId) -> tuple[int, int]:
        memory = self._held.pop(session_id, None)
        if memory is None:
            return (0, 0)
        freed = (_device_bytes(memory), memory.host_bytes)
        memory.close()
        self._ledger.release(session_id)
        return freed

    # -- steps -------------------------------------------------------------------------------------------------------

    def step(self) -> list[EngineEvent]:
        """Computes one batch and returns what happened since the last step."""
        groups = self._config.prefill_chunk_tokens // GROUP_TOKENS + self._config.max_prefills
        may_prefill = self._writer.has_room(groups)
        plan = schedule(
            self._running.values(),
            self._config.prefill_chunk_tokens,
            self._config.max_prefills,
            may_prefill=may_prefill,
        )
        if plan:
            self._run(plan)
        elif self._running:
            self._writer.wait_for_room(groups, WRITER_PATIENCE_S)
        events, self._events = self._events, []
        return events

    def _run(self, plan: list[Scheduled]) -> None:
        started = self._clock()
        try:
            logits = self._forward(plan)
        except Exception as error:  # one bad step must not end the service: its calls fail, their sessions roll back
            logger.exception("step_failed")
            for item in plan:
                self._fail(item.running, InternalError(f"a step failed: {type(error).__name__}"))
            return
        self._note_speed(plan, self._clock() - started)
        for item, row in zip(plan, logits, strict=True):
            self._advance(item.running, row)

    def _forward(self, plan: list[Scheduled]) -> Iterator[Tensor]:
        """One pass of the model; returns the logits of each sequence's last token."""
        rows, last = [], -1
        for item in plan:
            running = item.running
            rows.append(self._plan_rows(running.memory, last + 1, item.num_tokens, running.reach))
            last += item.num_tokens
        hidden = self._hidden(rows)
        logits = self._model.logits(hidden[[row.rows.stop - 1 for row in rows]])
        for item in plan:
            self._commit(item.running.memory, item.num_tokens, item.running.call)
        return iter(logits)

    def _plan_rows(self, memory: SequenceMemory, first: int, count: int, reach: Reach) -> SequenceRows:
        group_size = self._shape.num_heads // self._shape.num_kv_heads
        return prepare(memory, first, count, reach, group_size, self._layout.dtype)

    def _hidden(self, rows: Sequence[SequenceRows]) -> Tensor:
        tokens: list[int] = []
        positions: list[int] = []
        for row in rows:
            state = row.memory.state
            span = range(state.num_computed, state.num_computed + row.num_queries)
            tokens += [state.tokens[position] for position in span]
            positions += span
        device = self._model.device
        attention = BatchAttention(self._arena, self._ring, list(rows))
        return self._model.forward(
            torch.tensor(tokens, device=device), torch.tensor(positions, device=device), attention
        )

    def _commit(self, memory: SequenceMemory, num_tokens: int, call: EngineCall | None) -> None:
        """Counts computed tokens in, slides the window, and hands what left it to the tier below."""
        state = memory.state
        state.num_computed += num_tokens
        first_group = memory.distant.num_groups
        groups = memory.slide()
        memory.check()
        if groups is not None and call is not None and call.retain and call.tenant_tag:
            tokens = state.tokens[: state.window_start]
            self._writer.write(call.tenant_tag, call.session_id, first_group, tokens, groups.cpu())

    def _advance(self, running: RunningCall, logits: Tensor) -> None:
        """What a computed step means for one call: progress, a token, or the end."""
        call, state = running.call, running.memory.state
        if running.in_prefill:
            self._report_progress(running)
            return
        if running.first_token_at is None:
            self._report_progress(running)
            running.first_token_at = self._clock()
        if call.sampling is None:
            self._finish(running, FinishReason.LENGTH)
            return
        try:
            token = sample(logits, call.sampling, len(state.tokens))
        except KVServiceError as error:
            self._fail(running, error)
            return
        if token in self._model.spec.eos_token_ids and not call.sampling.ignore_eos:
            self._finish(running, FinishReason.EOS)
            return
        state.tokens.append(token)
        running.generated.append(token)
        self._events.append(TokenEvent(call.call_id, token))
        if len(running.generated) == call.sampling.max_new_tokens:
            self._finish(running, FinishReason.LENGTH)

    def _report_progress(self, running: RunningCall) -> None:
        done = running.memory.state.num_computed - running.prefill_from
        self._events.append(ProgressEvent(running.call.call_id, done, running.prompt_end - running.prefill_from))

    # -- ends --------------------------------------------------------------------------------------------------------

    def _finish(self, running: RunningCall, reason: FinishReason) -> None:
        call, memory = running.call, running.memory
        keeps = reason is not FinishReason.CANCELLED or (call.keep_partial and not running.in_prefill)
        usage = Usage(
            cached_tokens=len(call.base_tokens) - running.recomputed_tokens,
            prompt_tokens=len(call.document_tokens) + len(call.prompt_tokens),
            completion_tokens=len(running.generated),
            recomputed_tokens=running.recomputed_tokens,
        )
        now = self._clock()
        first = running.first_token_at if running.first_token_at is not None else now
        self._events.append(
            FinishedEvent(
                call_id=call.call_id,
                finish_reason=reason,
                usage=usage,
                telemetry=self._telemetry(running),
                appended_tokens=tuple(memory.state.tokens[len(call.base_tokens) :]) if keeps else (),
                prefill_ms=(first - running.admitted_at) * 1e3,
                decode_ms=(now - first) * 1e3,
            )
        )
        self._stats = replace(self._stats, recomputed_tokens=self._stats.recomputed_tokens + running.recomputed_tokens)
        self._end(running, keeps=keeps)

    def _fail(self, running: RunningCall, error: KVServiceError) -> None:
        self._events.append(FailedEvent(running.call.call_id, error))
        self._end(running, keeps=False)

    def _end(self, running: RunningCall, *, keeps: bool) -> None:
        """Takes the call off; the sequence stays with what it keeps, and gives back what it reserved beyond that."""
        call, memory = running.call, running.memory
        del self._running[call.call_id]
        del self._busy[call.session_id]
        before, counters = running.counters_before, memory.counters
        self._stats = replace(
            self._stats,
            recall_lookups=self._stats.recall_lookups + counters.lookups - before.lookups,
            recall_hits=self._stats.recall_hits + counters.hits - before.hits,
        )
        if not call.retain:
            self._drop(call.session_id)
            return
        if not keeps:
            # Of a base that was being recomputed, what is done stays; its next token counts as pending.
            memory.truncate(min(len(call.base_tokens), memory.state.num_computed + 1))
        needed = footprint(self._shape, memory.recipe, len(memory.state.tokens))
        self._ledger.reserve(call.session_id, Reservation(needed.device_bytes, needed.host_bytes))

    # -- evaluation --------------------------------------------------------------------------------------------------

    def score(self, session_id: SessionId, token_ids: Sequence[int]) -> Tensor:
        """Reads tokens as if they had been generated, and returns the logits after each: for evaluation.

        Args:
            session_id: a held session without a running call, all of whose tokens have KV.
            token_ids: what follows its tokens.

        Returns:
            fp32 `[len(token_ids), vocab]` on the CPU.
        """
        memory = self._held[session_id]
        state = memory.state
        self._reserve(session_id, memory.recipe, len(state.tokens) + len(token_ids))
        state.tokens.extend(token_ids)
        reach = Reach.SELECT if memory.recipe.distant is Distant.RECALL else Reach.FULL
        logits = []
        while state.num_computed < len(state.tokens):
            # One at a time, as decoding would: recall slots and all.
            rows = [self._plan_rows(memory, 0, 1, reach)]
            logits.append(self._model.logits(self._hidden(rows)).cpu())
            self._commit(memory, 1, None)
        return torch.cat(logits)

    def telemetry(self, session_id: SessionId) -> KvTelemetry:
        """Where a held session's bytes are, and what its recall has done so far."""
        memory = self._held[session_id]
        return self._kv_of(memory, RecallCounters(), 0)

    # -- sight -------------------------------------------------------------------------------------------------------

    def headroom(self) -> Headroom:
        """What is left."""
        ledger = self._ledger
        idle = [ledger.reservation(session_id) for session_id in self._held if session_id not in self._busy]
        return Headroom(
            device_capacity_bytes=ledger.device_capacity_bytes,
            device_free_bytes=ledger.device_free_bytes,
            device_freeable_bytes=ledger.device_free_bytes + sum(r.device_bytes for r in idle),
            host_capacity_bytes=ledger.host_capacity_bytes,
            host_free_bytes=ledger.host_free_bytes,
            host_freeable_bytes=ledger.host_free_bytes + sum(r.host_bytes for r in idle),
            running_calls=len(self._running),
            resident_sessions=len(self._held),
        )

    def stats(self) -> WorkerStats:
        """Counters and bytes by owner."""
        used = self._ledger.used_bytes
        return replace(
            self._stats,
            headroom=self.headroom(),
            weight_bytes=used(Owner.WEIGHTS),
            window_bytes=used(Owner.WINDOW),
            index_bytes=used(Owner.INDEX),
            slot_bytes=used(Owner.SLOTS),
            workspace_bytes=used(Owner.WORKSPACE),
            host_bytes=used(Owner.HOST),
            redis_bytes=self._writer.total_bytes(),
        )

    def check(self) -> None:
        """Raises InternalError unless arena, host tier and ledger agree with what the sequences hold."""
        self._arena.check()
        self._host.check()
        held = self._held.values()
        for owner, counted in (
            (Owner.WINDOW, sum(memory.state.window_bytes for memory in held)),
            (Owner.INDEX, sum(memory.index_bytes for memory in held)),
            (Owner.SLOTS, sum(memory.slot_bytes for memory in held)),
            (Owner.HOST, sum(memory.host_bytes for memory in held)),
        ):
            if self._ledger.used_bytes(owner) != counted:
                raise InternalError(
                    f"{owner.value}: the ledger says {self._ledger.used_bytes(owner)} bytes, sequences hold {counted}"
                )
        for session_id, memory in self._held.items():
            reserved = self._ledger.reservation(session_id)
            if session_id not in self._busy and _device_bytes(memory) > reserved.device_bytes:
                raise InternalError(f"a session holds {_device_bytes(memory)} bytes and reserved {reserved}")

    def _telemetry(self, running: RunningCall) -> KvTelemetry:
        redis_bytes = 0
        if running.call.tenant_tag:
            redis_bytes = self._writer.bytes_of(running.call.tenant_tag, running.call.session_id)
        return self._kv_of(running.memory, running.counters_before, redis_bytes)

    def _kv_of(self, memory: SequenceMemory, before: RecallCounters, redis_bytes: int) -> KvTelemetry:
        counters = memory.counters
        return KvTelemetry(
            window_bytes=memory.state.window_bytes,
            index_bytes=memory.index_bytes,
            slot_bytes=memory.slot_bytes,
            host_bytes=memory.host_bytes,
            redis_bytes=redis_bytes,
            dense_bytes=memory.state.num_computed * self._shape.kv_bytes_per_token,
            recall_lookups=counters.lookups - before.lookups,
            recall_hits=counters.hits - before.hits,
            recalled_bytes=counters.recalled_bytes - before.recalled_bytes,
            streamed_bytes=counters.streamed_bytes - before.streamed_bytes,
        )

    def _note_speed(self, plan: list[Scheduled], seconds: float) -> None:
        stats = self._stats
        prefilled = sum(item.num_tokens for item in plan if item.running.first_token_at is None)
        name = "prefill_tokens_per_s" if prefilled else "decode_tokens_per_s"
        rate = (prefilled or len(plan)) / max(seconds, 1e-9)
        old: float = getattr(stats, name)
        new = rate if old == 0.0 else (1 - RATE_SMOOTHING) * old + RATE_SMOOTHING * rate
        self._stats = replace(stats, steps=stats.steps + 1, **{name: new})


def _check_recipe(stored: RecipeSpec, asked: RecipeSpec) -> None:
    """A call may attend to more than its session's recipe keeps near, never to what was never kept."""
    if asked != stored and (stored.distant, asked.distant) != (Distant.RECALL, Distant.STREAM):
        raise FailedPrecondition(
            f"the session keeps its KV as {stored.name!r}; a call can't use {asked.name!r} on it", reason="recipe"
        )


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _device_bytes(memory: SequenceMemory) -> int:
    return memory.state.window_bytes + memory.index_bytes + memory.slot_bytes
