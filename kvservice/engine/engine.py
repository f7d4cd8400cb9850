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
from kvservice.engine.sequences import HeldSequences
from kvservice.errors import (
    Conflict,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    KVServiceError,
    Overloaded,
    PromptTooLong,
)
from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Owner
from kvservice.models.llama import LlamaModel
from kvservice.recall.memory import RecallCounters, SequenceMemory
from kvservice.types import (
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
        self._sequences = HeldSequences(self._shape, self._layout, config, model.device)
        self._sequences.ledger.add(Owner.WEIGHTS, model.weight_bytes)
        self._running: dict[CallId, RunningCall] = {}
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
        held = self._sequences.get(call.session_id)
        if held is not None:
            _check_recipe(held.recipe, call.recipe)
        kept = 0 if held is None else _common_prefix(held.state.tokens, call.base_tokens)
        recomputed = len(call.base_tokens) - kept
        if recomputed and call.on_miss is OnMiss.FAIL:
            raise FailedPrecondition(
                f"KV of {recomputed} tokens is held nowhere and on_miss is fail; allow recompute", reason="kv_missing"
            )
        memory = self._sequences.acquire(call.session_id, call.recipe, num_tokens)
        memory.truncate(kept)
        if memory.state.num_computed == _num_given(call):
            # Going on from tokens that all have KV: the last is computed again, for its logits.
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

    def _check(self, call: EngineCall) -> int:
        """Refuses what can never run; returns the most tokens that the sequence may come to hold."""
        if self._sequences.is_busy(call.session_id):
            raise Conflict(f"session {call.session_id} has a call running; wait for it", reason="session_busy")
        if len(self._running) >= self._config.max_batch:
            raise Overloaded(f"{len(self._running)} calls are running, the most there may be", retry_after_s=1.0)
        given = _num_given(call)
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
        for running in list(self._running.values()):
            if running.call.session_id == session_id:
                self.cancel(running.call.call_id)
        if purge:
            self._writer.delete(tenant_tag, session_id)
        return self._sequences.drop(session_id)

    def close(self) -> None:
        """Drops everything."""
        for session_id in self._sequences.ids():
            self.release(session_id)

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
        self._note_speed(plan, max(self._clock() - started, 1e-9))
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
        attention = BatchAttention(self._sequences.arena, self._sequences.ring, list(rows))
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
            self._writer.write(call.tenant_tag, call.session_id, first_group, tokens, groups)

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
                finish_reasons=(reason,),
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
        before, counters = running.counters_before, memory.counters
        self._stats = replace(
            self._stats,
            recall_lookups=self._stats.recall_lookups + counters.lookups - before.lookups,
            recall_hits=self._stats.recall_hits + counters.hits - before.hits,
        )
        if not call.retain:
            self._sequences.drop(call.session_id)
            return
        if not keeps:
            # Of a base that was being recomputed, what is done stays; its next token counts as pending.
            memory.truncate(min(len(call.base_tokens), memory.state.num_computed + 1))
        self._sequences.settle(call.session_id)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def score(self, session_id: SessionId, token_ids: Sequence[int]) -> Tensor:
        """Reads tokens as if they had been generated, and returns the logits after each: for evaluation.

        Args:
            session_id: a held session without a running call, all of whose tokens have KV.
            token_ids: what follows its tokens.

        Returns:
            fp32 `[len(token_ids), vocab]` on the CPU.
        """
        memory = self._held(session_id)
        state = memory.state
        self._sequences.reserve(session_id, memory.recipe, len(state.tokens) + len(token_ids))
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
        return self._kv_of(self._held(session_id), RecallCounters(), 0)

    def _held(self, session_id: SessionId) -> SequenceMemory:
        memory = self._sequences.get(session_id)
        if memory is None or self._sequences.is_busy(session_id):
            raise FailedPrecondition(f"session {session_id} is not held, or has a call running")
        return memory

    # -- sight -------------------------------------------------------------------------------------------------------

    def headroom(self) -> Headroom:
        """What is left."""
        return self._sequences.headroom(len(self._running))

    def stats(self) -> WorkerStats:
        """Counters and bytes by owner."""
        used = self._sequences.ledger.used_bytes
        return replace(
            self._stats,
            headroom=self.headroom(),
            weight_bytes=used(Owner.WEIGHTS),
            window_bytes=used(Owner.WINDOW),
            index_bytes=used(Owner.INDEX),
            slot_bytes=used(Owner.SLOTS),
            workspace_bytes=used(Owner.WORKSPACE),
            host_bytes=used(Owner.HOST),
            tier=self._writer.stats(),
        )

    def check(self) -> None:
        """Raises InternalError unless arena, host tier and ledger agree with what the sequences hold."""
        self._sequences.check()

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
        stats = replace(self._stats, steps=self._stats.steps + 1)
        prefilled = sum(item.num_tokens for item in plan if item.running.first_token_at is None)
        if prefilled:
            rate = _smoothed(stats.prefill_tokens_per_s, prefilled / seconds)
            self._stats = replace(stats, prefill_tokens_per_s=rate)
        else:
            self._stats = replace(stats, decode_tokens_per_s=_smoothed(stats.decode_tokens_per_s, len(plan) / seconds))


def _smoothed(old: float, new: float) -> float:
    return new if old == 0.0 else (1 - RATE_SMOOTHING) * old + RATE_SMOOTHING * new


def _check_recipe(stored: RecipeSpec, asked: RecipeSpec) -> None:
    """A call may attend to more than its session's recipe keeps near, never to what was never kept."""
    if asked != stored and (stored.distant, asked.distant) != (Distant.RECALL, Distant.STREAM):
        raise FailedPrecondition(
            f"the session keeps its KV as {stored.name!r}; a call can't use {asked.name!r} on it", reason="recipe"
        )


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _num_given(call: EngineCall) -> int:
    return len(call.base_tokens) + len(call.document_tokens) + len(call.prompt_tokens)
