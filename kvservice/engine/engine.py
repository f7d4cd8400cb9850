"""The engine: calls, admission and steps. Single-threaded: one thread makes all calls.

A sequence outlives its calls, so that the next question finds the document's KV. It is only a cache of the session:
each call brings all tokens of the session, and what isn't held is computed again, and counted.

    submit → reserve bytes, or wait for those who give way
                                            │
    step:  expire → make room → schedule → forward → commit, slide windows → sample → events
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from kvservice.compression.protocols import RECALL_INDEXES
from kvservice.config.engine import EngineConfig
from kvservice.config.recipes import DEFAULT_RECIPE, SERVED_RECIPES
from kvservice.engine.finding import Found, check_tokens, find, num_given, usable
from kvservice.engine.forward import Forward, plan_rows
from kvservice.engine.grammar import GrammarCompiler
from kvservice.engine.meters import Meters, kv_telemetry
from kvservice.engine.pacing import Pace
from kvservice.engine.ports import GroupWriter
from kvservice.engine.running import RunningCall, RunningSequence, answer_name
from kvservice.engine.sampler import Sampled, SamplerRow, sample
from kvservice.engine.scheduler import Scheduled, schedule
from kvservice.engine.sequences import HeldSequences, Wish
from kvservice.engine.stopwatch import Stopwatch
from kvservice.errors import (
    ConfigError,
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    KVServiceError,
    NotFound,
    Overloaded,
)
from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Owner
from kvservice.models.base import Model
from kvservice.recall.memory import RecallCounters, SequenceMemory
from kvservice.recall.parking import Place
from kvservice.recall.reach import Reach
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
    SessionId,
    TokenEvent,
    Usage,
    WorkerStats,
)

logger = logging.getLogger(__name__)

WRITER_PATIENCE_S = 0.05
"""How long a step waits when all there is to do waits for the tier, or for bytes on their way to the host."""

GROWTH_TOKENS = 64
"""An answer's bytes are reserved this many tokens ahead: most answers end long before their limit."""


class Engine:
    """Computes calls on sequences of one model within byte budgets.

    Args:
        model: the model; its device is the engine's.
        config: budgets.
        writer: takes the groups that leave the device, for the tier below host memory.
        grammars: for answers that must match one; without it such calls are refused.
        clock: seconds, monotonic.

    Raises:
        ConfigError: `kv_bytes` doesn't hold the prefill workspace, or the model can't be deterministic and should.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        writer: GroupWriter,
        grammars: GrammarCompiler | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if config.deterministic and not model.is_deterministic:
            raise ConfigError("deterministic: this model was loaded without row blocks", field="deterministic")
        RECALL_INDEXES.discover("kvservice.methods")
        self._model = model
        self._config = config
        self._writer = writer
        self._grammars = grammars
        self._clock = clock
        self._shape = model.spec.shape
        # The most groups that one step can push out of windows; each sequence may round up.
        self._step_groups = config.step_tokens // GROUP_TOKENS + config.max_prefills
        self._layout = KVLayout.of(self._shape, model.dtype)
        self._sequences = HeldSequences(self._shape, self._layout, config, model.device)
        self._sequences.ledger.add(Owner.WEIGHTS, model.weight_bytes)
        self._forward = Forward(model, self._sequences, deterministic=config.deterministic)
        self._calls: dict[CallId, RunningCall] = {}
        self._numbers = count()
        self._events: list[EngineEvent] = []
        self._pace = Pace(config.max_decode_stretch)
        self._meters = Meters()
        self.stopwatch = Stopwatch()

    @property
    def info(self) -> ModelInfo:
        """What the engine serves."""
        spec = self._model.spec
        return ModelInfo(spec.name, self._shape, SERVED_RECIPES, DEFAULT_RECIPE, spec.origin)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something."""
        return bool(self._calls or self._events)

    # -- admission ---------------------------------------------------------------------------------------------------

    def submit(self, call: EngineCall) -> None:
        """Admits a call, or refuses and changes nothing.

        An admitted call has all the bytes that its tokens and the beginning of its answer take, or will have them as
        soon as idle sequences, or those of calls of a lower priority, have given way.

        Raises:
            InvalidRequest: nothing to compute, or a wrong grammar.
            PromptTooLong: more tokens than the model has positions.
            Conflict: the session has a call running.
            FailedPrecondition: the recipe needs what the session dropped, or KV is missing and `on_miss` is FAIL.
            BudgetTooSmall: it would not fit if it were alone.
            Overloaded: it doesn't fit now.
        """
        self._check(call)
        tokens = [*call.base_tokens, *call.document_tokens, *call.prompt_tokens]
        row = self._sampler_row(call, tokens, 0)
        found = find(call, tokens, self._sequences)
        if found.num_missing and call.on_miss is OnMiss.FAIL:
            raise FailedPrecondition(
                f"KV of {found.num_missing} tokens is held nowhere and on_miss is fail; allow recompute",
                reason="kv_missing",
            )
        documents_end = len(call.base_tokens) + len(call.document_tokens)
        # Going on from tokens that all have KV: the last is computed again, for its logits.
        start = min(found.num_kept, len(tokens) - 1)
        sequence = RunningSequence(
            call=call,
            session_id=call.session_id,
            index=0,
            memory=found.memory if found.donor is None else self._sequences.fork_prefix(found.donor),
            rank=(-call.priority, next(self._numbers)),
            tokens=tokens,
            kept=start,
            full_until=documents_end if found.num_missing or call.document_tokens else start,
            row=row,
            recomputed_tokens=found.num_missing,
        )
        self._admit(sequence, found)

    def _admit(self, sequence: RunningSequence, found: Found) -> None:
        call, memory = sequence.call, sequence.memory
        try:
            if any(self._waits(other) and other.rank[0] <= sequence.rank[0] for other in self._active()):
                raise Overloaded("calls that were admitted before wait for room", retry_after_s=1.0)
            victims = self._victims_of(sequence)
            lower = [other for other in victims if other.has_ended or other.rank[0] > sequence.rank[0]]
            names = [other.session_id for other in lower]
            self._sequences.check_room(call.session_id, memory, self._wish(sequence), names)
        except Overloaded:
            if found.donor is not None:
                memory.close()
            raise
        sequence.counters_before = memory.counters.copy()
        self._sequences.add(call.session_id, memory)
        self._calls[call.call_id] = RunningCall(call, {0: sequence}, self._clock(), found.num_reused)
        if self._sequences.make_room(call.session_id, self._wish(sequence), names):
            self._enter(sequence)

    def _check(self, call: EngineCall) -> None:
        """Refuses what can never run."""
        if self._sequences.is_busy(call.session_id):
            raise Conflict(f"session {call.session_id} has a call running; wait for it", reason="session_busy")
        num_answers = sum(running.num_answers for running in self._calls.values())
        if num_answers + (call.sampling.n if call.sampling else 1) > self._config.max_batch:
            raise Overloaded(f"{num_answers} answers are under way, {self._config.max_batch} may be", retry_after_s=1.0)
        check_tokens(call, self._shape)
        held = usable(self._sequences.get(call.session_id), call)
        given, new = num_given(call), call.sampling.max_new_tokens if call.sampling else 0
        wish = Wish(given + new, call.sampling.n - 1 if call.sampling else 0, given)
        self._sequences.check_fits(held.recipe if held else call.recipe, wish)

    def _sampler_row(self, call: EngineCall, tokens: Sequence[int], index: int) -> SamplerRow | None:
        if call.sampling is None:
            return None
        matcher = None
        if call.sampling.grammar is not None:
            if self._grammars is None:
                raise InvalidRequest("this engine was started without grammars", field="sampling.grammar")
            matcher = self._grammars.compile(call.sampling.grammar)
        return SamplerRow(call.sampling, index, tokens, matcher)

    # -- control -----------------------------------------------------------------------------------------------------

    def cancel(self, call_id: CallId) -> None:
        """Ends a call and frees what it took, at once. Unknown ids are ignored: the call may have just ended."""
        running = self._calls.get(call_id)
        if running is not None:
            self._finish(running, FinishReason.CANCELLED)

    def stop(self, call_id: CallId, index: int = 0) -> None:
        """Ends an answer whose text reached a stop string; what was generated stays."""
        running = self._calls.get(call_id)
        if running is not None and index in running.sequences and index not in running.finish_reasons:
            self._end_answer(running, running.sequences[index], FinishReason.STOP)

    def release(self, session_id: SessionId, tenant_tag: bytes = b"", *, purge: bool = False) -> tuple[int, int]:
        """Drops a session's KV, cancelling its call if one runs.

        Args:
            session_id: the session.
            tenant_tag: needed for `purge`.
            purge: also delete its blobs in the tier below.

        Returns:
            Device and host bytes freed.
        """
        for running in list(self._calls.values()):
            if running.call.session_id == session_id:
                self.cancel(running.call.call_id)
        if purge:
            self._writer.delete(tenant_tag, session_id)
        return self._sequences.drop(session_id)

    def fork(self, session_id: SessionId, fork_id: SessionId, num_tokens: int | None = None) -> None:
        """Makes a held session known under one more name, at its end or at an earlier token. Copies no KV.

        Args:
            session_id: a held session; it may be busy, and then the fork is at its last committed token.
            fork_id: not held.
            num_tokens: tokens of the fork; None: all.

        Raises:
            NotFound: the session isn't held, or `num_tokens` is beyond its tokens.
            Conflict: `fork_id` is held.
            Overloaded: there is no room for what the fork needs for itself.
        """
        memory = self._sequences.get(session_id)
        if memory is None or memory.place is not Place.DEVICE:
            raise NotFound(f"session {session_id} is not on this device", reason="not_held")
        if self._sequences.get(fork_id) is not None:
            raise Conflict(f"session {fork_id} is held already", reason="exists")
        have = memory.state.num_computed
        tokens = have if num_tokens is None else num_tokens
        if not 0 < tokens <= have:
            raise NotFound(f"num_tokens={tokens}: the session has KV of {have}", reason="beyond_end")
        twin = memory.fork()
        self._sequences.add(fork_id, twin)
        try:
            self._await_room(fork_id, Wish(tokens, num_kept=tokens))
        except Overloaded:
            self._sequences.drop(fork_id)
            raise
        twin.truncate(tokens)
        self._sequences.settle(fork_id)

    def close(self) -> None:
        """Drops everything."""
        for session_id in self._sequences.ids():
            self.release(session_id)
        self._sequences.close()

    # -- steps -------------------------------------------------------------------------------------------------------

    def step(self) -> list[EngineEvent]:
        """Computes one batch and returns what happened since the last step."""
        self.stopwatch.start()
        self._expire()
        self._bring_in()
        ready = [sequence for sequence in self._active() if self._is_ready(sequence)]
        plan = schedule(ready, self._config.max_prefills, self._prefill_budget(ready))
        self.stopwatch.lap("schedule")
        if plan:
            self._run(plan)
        elif self._calls:
            self._wait()
        events, self._events = self._events, []
        return events

    def _run(self, plan: list[Scheduled]) -> None:
        started = self._clock()
        try:
            rows = plan_rows([(item.sequence.memory, item.num_tokens, item.reach) for item in plan])
            self.stopwatch.lap("tables")
            hidden = self._forward.hidden(rows)
            self.stopwatch.lap("forward")
            for item in plan:
                self._commit(item)
            self.stopwatch.lap("commit")
            wanted = [row.rows.stop - 1 for item, row in zip(plan, rows, strict=True) if _samples(item.sequence)]
            logits = self._forward.logits(hidden[wanted]) if wanted else hidden
            self.stopwatch.lap("forward")
        except Exception as error:  # one bad step must not end the service: its calls fail, their sessions roll back
            logger.exception("step_failed")
            for item in plan:
                self._fail(item.sequence.call.call_id, InternalError(f"a step failed: {type(error).__name__}"))
            return
        seconds = max(self._clock() - started, 1e-9)
        decodes = sum(bool(item.sequence.generated) for item in plan)
        prefilled = sum(item.num_tokens for item in plan) - decodes
        self._pace.note(decodes, prefilled, seconds)
        self._meters.note_step(decodes, prefilled, seconds)
        self._advance(plan, logits)

    # -- a step's parts ----------------------------------------------------------------------------------------------

    def _expire(self) -> None:
        now = self._clock()
        for running in list(self._calls.values()):
            deadline = running.call.deadline
            if deadline is not None and deadline <= now:
                self._fail(running.call.call_id, DeadlineExceeded("the call's deadline passed while it ran"))

    def _bring_in(self) -> None:
        """Lets calls begin, grow and come back, those that go first before the others, as far as there is room."""
        self._sequences.poll()
        for sequence in self._active():
            if sequence.memory.is_moving:
                continue
            # One token ahead, so that between steps only those wait that there is no room for.
            wanted = min(sequence.num_known + 1, sequence.most_tokens)
            if self._sequences.reserved_tokens(sequence.session_id) < wanted:
                victims = [other.session_id for other in self._victims_of(sequence)]
                try:
                    if not self._sequences.make_room(sequence.session_id, self._wish(sequence), victims):
                        break
                except Overloaded:
                    break
            self._enter(sequence)

    def _wish(self, sequence: RunningSequence) -> Wish:
        """What it needs to go on for a while."""
        num_tokens = min(sequence.most_tokens, sequence.num_known + GROWTH_TOKENS)
        sampling = sequence.call.sampling
        answers = sampling.n - 1 if sampling and sequence.index == 0 and not sequence.generated else 0
        return Wish(num_tokens, answers, len(sequence.tokens), None if sequence.has_begun else sequence.kept)

    def _await_room(self, session_id: SessionId, wish: Wish) -> None:
        """Makes idle sequences give way, and waits for those that go to the host. Raises Overloaded. Blocks."""
        while not self._sequences.make_room(session_id, wish, ()):
            self._sequences.wait_for_moves(WRITER_PATIENCE_S)
            self._sequences.poll()

    def _enter(self, sequence: RunningSequence) -> None:
        """The bytes are there: brings the sequence to the device and to the tokens of its call."""
        memory = sequence.memory
        if memory.place is Place.PARKED:
            memory.swap_in()
        elif not sequence.has_begun:
            if memory.num_computed > sequence.kept:
                self._sequences.unpublish(sequence.session_id)
            memory.truncate(sequence.kept)
            memory.state.tokens = list(sequence.tokens)
            self._sequences.begin(sequence.session_id)
            sequence.prefill_from = memory.state.num_computed
            sequence.has_begun = True

    def _prefill_budget(self, ready: Sequence[RunningSequence]) -> int:
        if not self._writer.has_room(self._step_groups):
            return 0
        decodes = sum(sequence.is_decoding for sequence in ready)
        return self._pace.prefill_tokens(decodes, max(0, self._config.step_tokens - decodes))

    def _commit(self, item: Scheduled) -> None:
        """Counts computed tokens in, slides the window, and hands what left it to the tier below."""
        call, memory = item.sequence.call, item.sequence.memory
        item.sequence.recomputed_tokens += min(item.num_tokens, memory.num_dropped)
        first_group = memory.distant.num_groups
        groups = memory.commit(item.num_tokens, item.reach)
        # Answers beyond the first belong to nobody's session.
        if groups is not None and call.retain and call.tenant_tag and item.sequence.index == 0:
            tokens = memory.state.tokens[: memory.state.window_start]
            self._writer.write(call.tenant_tag, call.session_id, first_group, tokens, groups)

    def _advance(self, plan: Sequence[Scheduled], logits: Tensor) -> None:
        """What a computed step means for its calls: progress, tokens, ends."""
        asked: list[tuple[RunningCall, RunningSequence]] = []
        numbers: list[int] = []  # of the logits of each that is asked
        for item in plan:
            sequence = item.sequence
            running = self._calls[sequence.call.call_id]
            if running.first_token_at is None and sequence.memory.num_dropped == 0:
                self._report_progress(sequence)
            if sequence.num_pending:
                continue
            if running.first_token_at is None:
                running.first_token_at = self._clock()
                self._sequences.publish(sequence.session_id, sequence.call.tenant_tag)
            if sequence.row is None:
                self._end_answer(running, sequence, FinishReason.LENGTH)
                continue
            number = numbers[-1] + 1 if numbers else 0
            answers = [sequence, *self._fork_answers(running, sequence)]
            asked += [(running, answer) for answer in answers]
            numbers += [number] * len(answers)
        self.stopwatch.lap("output")
        if not asked:
            return
        rows = [answer.row for _, answer in asked if answer.row is not None]
        positions = [answer.num_known for _, answer in asked]
        chosen = logits if len(numbers) == len(logits) else logits[numbers]
        samples = sample(chosen, rows, positions)
        self.stopwatch.lap("sample")
        for (running, answer), sampled in zip(asked, samples, strict=True):
            if running.call.call_id not in self._calls:
                continue  # Another of its answers failed.
            if isinstance(sampled, Sampled):
                self._take(running, answer, sampled)
            else:
                self._fail(running.call.call_id, sampled)
        self.stopwatch.lap("output")

    def _fork_answers(self, running: RunningCall, main: RunningSequence) -> list[RunningSequence]:
        """The further answers of a call whose prompt has just been read."""
        if main.index or main.generated or running.num_answers == 1:
            return []
        reserved_tokens = self._sequences.reserved_tokens(main.session_id)
        for index in range(1, running.num_answers):
            name = answer_name(main.session_id, main.call.call_id, index)
            wish = Wish(reserved_tokens, running.num_answers - 1 - index, len(main.tokens))
            running.sequences[index] = RunningSequence(
                call=main.call,
                session_id=name,
                index=index,
                memory=self._sequences.fork_answer(main.session_id, name, wish),
                rank=main.rank,
                tokens=main.tokens,
                kept=len(main.tokens),
                full_until=main.full_until,
                row=self._sampler_row(main.call, main.tokens, index),
                has_begun=True,
            )
        return [running.sequences[index] for index in range(1, running.num_answers)]

    def _take(self, running: RunningCall, sequence: RunningSequence, sampled: Sampled) -> None:
        """Adds a token to an answer, and ends the answer if that was its last one."""
        sampling, row, token = running.call.sampling, sequence.row, sampled.token_id
        assert sampling is not None
        assert row is not None
        row.accept(token)
        # A grammar allows the end token only where an answer may end.
        if token in self._model.spec.eos_token_ids and (not sampling.ignore_eos or sampling.grammar is not None):
            self._end_answer(running, sequence, FinishReason.EOS)
            return
        sequence.memory.state.tokens.append(token)
        sequence.generated.append(token)
        self._events.append(TokenEvent(running.call.call_id, token, sequence.index, sampled.logprobs))
        if len(sequence.generated) == sampling.max_new_tokens:
            self._end_answer(running, sequence, FinishReason.LENGTH)

    def _report_progress(self, sequence: RunningSequence) -> None:
        done = sequence.memory.state.num_computed - sequence.prefill_from
        total = len(sequence.tokens) - sequence.prefill_from
        self._events.append(ProgressEvent(sequence.call.call_id, done, total))

    def _wait(self) -> None:
        """Nothing can be computed now: waits for bytes on their way, or for the tier."""
        if not self._sequences.wait_for_moves(WRITER_PATIENCE_S):
            self._writer.wait_for_room(self._step_groups, WRITER_PATIENCE_S)

    # -- who runs ----------------------------------------------------------------------------------------------------

    def _active(self) -> list[RunningSequence]:
        """Sequences that have something to compute, those that go first before the others."""
        sequences = (each for running in self._calls.values() for each in running.sequences.values())
        return sorted((each for each in sequences if not each.has_ended), key=lambda each: (each.rank, each.index))

    def _is_ready(self, sequence: RunningSequence) -> bool:
        """Whether a step can compute it."""
        return sequence.has_begun and sequence.memory.place is Place.DEVICE and not self._waits(sequence)

    def _waits(self, sequence: RunningSequence) -> bool:
        """Whether it has no bytes for all its tokens: it must go on waiting, or has made room."""
        return self._sequences.reserved_tokens(sequence.session_id) < sequence.num_known

    def _victims_of(self, sequence: RunningSequence) -> list[RunningSequence]:
        """Sequences that must make room for this one if they are in the way, the first first."""
        # A complete answer that others of its call keep waiting has nothing to lose but time.
        complete = [running.main for running in self._calls.values() if running.main.has_ended]
        rank = (sequence.rank, sequence.index)
        return [*complete, *(other for other in reversed(self._active()) if (other.rank, other.index) > rank)]

    # -- ends --------------------------------------------------------------------------------------------------------

    def _end_answer(self, running: RunningCall, sequence: RunningSequence, reason: FinishReason) -> None:
        """One answer is complete; the call is when all are."""
        sequence.has_ended = True
        running.finish_reasons[sequence.index] = reason
        if sequence.index:
            self._sequences.drop(sequence.session_id)
        if len(running.finish_reasons) == running.num_answers:
            self._finish(running, running.finish_reasons[0])

    def _finish(self, running: RunningCall, reason: FinishReason) -> None:
        """Ends a call; `reason` is that of the answer that joins the session."""
        call, main = running.call, running.main
        keeps = reason is not FinishReason.CANCELLED or (call.keep_partial and bool(main.generated))
        answers = running.sequences.values()
        recomputed = sum(each.recomputed_tokens for each in answers)
        usage = Usage(
            cached_tokens=max(0, len(call.base_tokens) - main.recomputed_tokens),
            prompt_tokens=len(call.document_tokens) + len(call.prompt_tokens),
            completion_tokens=sum(len(each.generated) for each in answers),
            recomputed_tokens=recomputed,
            reused_tokens=running.reused_tokens,
        )
        now = self._clock()
        first = running.first_token_at if running.first_token_at is not None else now
        reasons = running.finish_reasons
        self._events.append(
            FinishedEvent(
                call_id=call.call_id,
                finish_reasons=(reason, *(reasons.get(i, reason) for i in range(1, running.num_answers))),
                usage=usage,
                telemetry=self._telemetry(main),
                appended_tokens=tuple(main.memory.state.tokens[len(call.base_tokens) :]) if keeps else (),
                prefill_ms=(first - running.admitted_at) * 1e3,
                decode_ms=(now - first) * 1e3,
            )
        )
        self._meters.note_recompute(recomputed)
        self._end(running, keeps=keeps)

    def _fail(self, call_id: CallId, error: KVServiceError) -> None:
        running = self._calls.get(call_id)
        if running is not None:
            self._events.append(FailedEvent(call_id, error))
            self._end(running, keeps=False)

    def _end(self, running: RunningCall, *, keeps: bool) -> None:
        """Takes the call off; its session stays with what it keeps, and gives back what it reserved beyond that."""
        call, main = running.call, running.main
        del self._calls[call.call_id]
        self._meters.note_recall(main.counters_before, main.memory.counters)
        for sequence in running.sequences.values():
            if sequence.index and not sequence.has_ended:
                self._sequences.drop(sequence.session_id)
        memory = main.memory
        if not keeps:
            self._sequences.unpublish(call.session_id)
        # Of what was being recomputed, what is done stays; its next token counts as pending.
        memory.truncate(min(len(memory.state.tokens if keeps else call.base_tokens), memory.num_computed + 1))
        if not call.retain or memory.num_computed == 0:
            self._sequences.drop(call.session_id)
            return
        self._sequences.settle(call.session_id)
        self._sequences.publish(call.session_id, call.tenant_tag)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def score(self, session_id: SessionId, token_ids: Sequence[int]) -> Tensor:
        """Reads tokens as if they had been generated, and returns the logits after each: for evaluation.

        Args:
            session_id: a held session without a running call, all of whose tokens have KV.
            token_ids: what follows its tokens.

        Returns:
            fp32 `[len(token_ids), vocab]` on the CPU.
        """
        memory = self._idle(session_id)
        state = memory.state
        self._await_room(session_id, Wish(len(state.tokens) + len(token_ids)))
        state.tokens.extend(token_ids)
        reach = Reach.SELECT if memory.recipe.distant is Distant.RECALL else Reach.FULL
        logits = []
        while state.num_computed < len(state.tokens):
            # One at a time, as decoding would: recall slots and all.
            hidden = self._forward.hidden(plan_rows([(memory, 1, reach)]))
            logits.append(self._forward.logits(hidden).cpu())
            memory.commit(1, reach)
        self._sequences.settle(session_id)
        return torch.cat(logits)

    def telemetry(self, session_id: SessionId) -> KvTelemetry:
        """Where a held session's bytes are, and what its recall has done so far."""
        return kv_telemetry(self._idle(session_id), self._shape, RecallCounters())

    def _idle(self, session_id: SessionId) -> SequenceMemory:
        memory = self._sequences.get(session_id)
        if memory is None or self._sequences.is_busy(session_id) or memory.place is not Place.DEVICE:
            raise FailedPrecondition(f"session {session_id} is not on the device, or has a call running")
        return memory

    # -- sight -------------------------------------------------------------------------------------------------------

    def headroom(self) -> Headroom:
        """What is left."""
        return self._sequences.headroom(len(self._calls))

    def stats(self) -> WorkerStats:
        """Counters and bytes by owner."""
        used, evictions = self._sequences.ledger.used_bytes, self._sequences.evictions
        return replace(
            self._meters.stats,
            headroom=self.headroom(),
            weight_bytes=used(Owner.WEIGHTS),
            window_bytes=used(Owner.WINDOW),
            index_bytes=used(Owner.INDEX),
            slot_bytes=used(Owner.SLOTS),
            workspace_bytes=used(Owner.WORKSPACE),
            host_bytes=used(Owner.HOST),
            steps=self.stopwatch.steps,
            swapped_out=evictions.swapped,
            forgotten=evictions.forgotten,
            idle_swapped_out=evictions.idle_swapped,
            idle_dropped=evictions.idle_dropped,
            tier=self._writer.stats(),
        )

    def check(self) -> None:
        """Raises InternalError unless arena, host tier and ledger agree with what the sequences hold."""
        self._sequences.check()

    def _telemetry(self, main: RunningSequence) -> KvTelemetry:
        redis_bytes = 0
        if main.call.tenant_tag:
            redis_bytes = self._writer.bytes_of(main.call.tenant_tag, main.call.session_id)
        return kv_telemetry(main.memory, self._shape, main.counters_before, redis_bytes)


def _samples(sequence: RunningSequence) -> bool:
    return sequence.row is not None and sequence.num_pending == 0
