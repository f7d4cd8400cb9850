"""The calls under way, who goes first, and how each ends. Knows no schedules and no models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter

from kvservice.engine.meters import Meters, kv_telemetry
from kvservice.engine.ports import GroupWriter
from kvservice.engine.running import RunningCall, RunningSequence
from kvservice.engine.sampler import SamplerRow
from kvservice.engine.sequences import HeldSequences
from kvservice.engine.turns import Turns
from kvservice.errors import DeadlineExceeded, KVServiceError, hopeless
from kvservice.internal.fair import cannot_meet
from kvservice.recall.memory import SequenceMemory
from kvservice.recall.parking import Place
from kvservice.types import (
    GROUP_TOKENS,
    SINK_TOKENS,
    CallId,
    EngineCall,
    EngineEvent,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    KvTelemetry,
    ModelShape,
    SessionId,
    Usage,
)


class Calls:
    """Calls that were admitted and haven't ended, and what happened to them since it was last taken.

    Args:
        shape: of the model.
        sequences: where their KV is held.
        writer: knows what of a session is in the tier below.
        meters: count what calls did.
        turns: places of the calls; who ends leaves.
        clock: seconds, monotonic.

    Attributes:
        running: by id, those that were admitted first before the others.
        active: sequences that have something to compute, those that go first before the others.
        events: what happened, to be given out by the next step.
    """

    def __init__(
        self,
        shape: ModelShape,
        sequences: HeldSequences,
        writer: GroupWriter,
        meters: Meters,
        turns: Turns,
        clock: Callable[[], float],
    ) -> None:
        self.running: dict[CallId, RunningCall] = {}
        self.active: list[RunningSequence] = []
        self.events: list[EngineEvent] = []
        self._shape = shape
        self._sequences = sequences
        self._writer = writer
        self._meters = meters
        self._turns = turns
        self._clock = clock

    @property
    def num_answers(self) -> int:
        """Answers that the calls under way were asked for."""
        return sum(running.num_answers for running in self.running.values())

    def num_answers_by_tenant(self) -> Counter[bytes]:
        """Of these, each tenant's."""
        answers: Counter[bytes] = Counter()
        for each in self.running.values():
            answers[each.call.tenant_tag] += each.num_answers
        return answers

    def of_session(self, session_id: SessionId) -> RunningCall | None:
        """The call that runs on a session."""
        return next((each for each in self.running.values() if each.call.session_id == session_id), None)

    def victims_of(self, sequence: RunningSequence) -> list[RunningSequence]:
        """Sequences that must make room for this one if they are in the way, the first first."""
        # A complete answer that others of its call keep waiting has nothing to lose but time.
        complete = [running.main for running in self.running.values() if running.main.has_ended]
        return [*complete, *(other for other in reversed(self.active) if other.order > sequence.order)]

    def take_events(self) -> list[EngineEvent]:
        """What happened since this was last asked."""
        events, self.events = self.events, []
        return events

    # -- beginnings --------------------------------------------------------------------------------------------------

    def add(self, sequence: RunningSequence, further: Sequence[SamplerRow], num_reused: int) -> None:
        """A call was admitted.

        Args:
            sequence: the one that it begins with.
            further: the sampler rows of its answers beyond the first.
            num_reused: of its tokens, those whose KV another session had already.
        """
        call = sequence.call
        self.running[call.call_id] = RunningCall(call, {0: sequence}, further, self._clock(), num_reused)
        self.active.append(sequence)
        self.put_in_order()

    def add_answer(self, running: RunningCall, sequence: RunningSequence) -> None:
        """A call got one more answer."""
        running.sequences[sequence.index] = sequence
        self.active.append(sequence)
        self.put_in_order()

    def put_in_order(self) -> None:
        """A call has come or gone: others of its tenant have moved."""
        self.active.sort(key=attrgetter("order"))

    # -- ends --------------------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """Fails calls whose deadline has passed, and those that wait to be read and can't be in time any more."""
        now = self._clock()
        for each in [each for each in self.running.values() if each.deadline < math.inf]:
            fare, left_s = each.main.fare, each.deadline - now
            if left_s <= 0:
                self.fail(each.call.call_id, DeadlineExceeded("the call's deadline passed while it ran"))
            elif each.main.num_unread == fare.num_read and cannot_meet(fare.read_s, left_s):
                self.fail(each.call.call_id, hopeless(fare.read_s, left_s))

    def end_answer(self, running: RunningCall, sequence: RunningSequence, reason: FinishReason) -> None:
        """One answer is complete; the call is when all are."""
        sequence.has_ended = True
        self.active.remove(sequence)
        running.finish_reasons[sequence.index] = reason
        if sequence.index:
            self._sequences.drop(sequence.session_id)
        if len(running.finish_reasons) == running.num_answers:
            self.finish(running, running.finish_reasons[0])

    def finish(self, running: RunningCall, reason: FinishReason) -> None:
        """Ends a call; `reason` is that of the answer that joins the session."""
        call, main = running.call, running.main
        keeps = reason is not FinishReason.CANCELLED or (call.keep_partial and bool(main.generated))
        now = self._clock()
        first = running.first_token_at if running.first_token_at is not None else now
        reasons, usage = running.finish_reasons, _usage(running)
        finished = FinishedEvent(
            call_id=call.call_id,
            finish_reasons=(reason, *(reasons.get(i, reason) for i in range(1, running.num_answers))),
            usage=usage,
            telemetry=self._telemetry(main),
            appended_tokens=tuple(main.memory.state.tokens[len(call.base_tokens) :]) if keeps else (),
            prefill_ms=(first - running.admitted_at) * 1e3,
            decode_ms=(now - first) * 1e3,
            reached=main.memory.reaches.reached(len(main.memory.state.tokens if keeps else call.base_tokens)),
        )
        self._meters.note_recompute(usage.recomputed_tokens)
        self._end(running, keeps=keeps)
        kept = self._sequences.take_byte_seconds(call.session_id) + self._sequences.take_left_over(call.tenant_tag)
        self.events.append(replace(finished, device_byte_s=kept.device, host_byte_s=kept.host))

    def fail(self, call_id: CallId, error: KVServiceError) -> None:
        """Ends a call with an error, if it hasn't ended; its session is as it was before the call."""
        running = self.running.get(call_id)
        if running is not None:
            self.events.append(FailedEvent(call_id, error))
            self._end(running, keeps=False)

    def fail_sequence(self, session_id: SessionId, error: KVServiceError) -> None:
        """Fails the call that an answer's sequence belongs to."""
        for running in list(self.running.values()):
            if any(each.session_id == session_id for each in running.sequences.values()):
                self.fail(running.call.call_id, error)

    def _end(self, running: RunningCall, *, keeps: bool) -> None:
        """Takes the call off; its session stays with what it keeps, and gives back what it reserved beyond that."""
        call, main = running.call, running.main
        del self.running[call.call_id]
        if main.restored is not None:
            main.restored.give_up()
            main.restored = None
        answered = sum(len(each.generated) for each in running.sequences.values())
        # Of an answer all is read but its last token, which is what it was charged with.
        self._turns.leave(main.fare, num_unread=0 if answered else main.num_unread, num_answered=answered)
        self._meters.note_recall(main.counters_before, main.memory.counters)
        for sequence in running.sequences.values():
            if not sequence.has_ended:
                self.active.remove(sequence)
            if sequence.index:
                self._sequences.drop(sequence.session_id)
                self._sequences.leave_over(sequence.session_id, call.tenant_tag)
        self.put_in_order()
        memory = main.memory
        if not keeps:
            self._sequences.unpublish(call.session_id)
        # Of what was being recomputed, what is done stays; its next token counts as pending.
        memory.truncate(min(len(memory.state.tokens if keeps else call.base_tokens), memory.num_computed + 1))
        if not call.retain or memory.num_computed == 0:
            self._sequences.drop(call.session_id)
            if not call.retain:
                self._sequences.leave_over(call.session_id, call.tenant_tag)
            return
        if call.tenant_tag:
            self._writer.checkpoint(call.tenant_tag, call.session_id)
        self._write_window(main)
        self._sequences.settle(call.session_id)
        self._sequences.publish(call.session_id, call.tenant_tag)

    def _write_window(self, main: RunningSequence) -> None:
        """Hands the tier below what a session has besides its groups, so that nothing is to be computed again."""
        call, memory = main.call, main.memory
        if not (memory.place is Place.DEVICE and memory.num_stored_groups and is_stored(call, memory, self._writer)):
            return
        start = SINK_TOKENS + memory.num_stored_groups * GROUP_TOKENS
        if self._writer.takes_window(memory.num_computed - start):
            tokens = memory.state.tokens[: memory.num_computed]
            window = memory.stored_window()
            self._writer.write_window(call.tenant_tag, call.session_id, memory.recipe, start, tokens, window)

    def _telemetry(self, main: RunningSequence) -> KvTelemetry:
        redis_bytes = 0
        if main.call.tenant_tag:
            redis_bytes = self._writer.bytes_of(main.call.tenant_tag, main.call.session_id)
        return kv_telemetry(main.memory, self._shape, main.counters_before, redis_bytes)


def is_stored(call: EngineCall, memory: SequenceMemory, writer: GroupWriter) -> bool:
    """Whether a call's session is kept in the tier below: what is there follows from tokens."""
    return bool(call.retain and call.tenant_tag) and writer.stores and memory.depends_on_tokens_alone


def _usage(running: RunningCall) -> Usage:
    call, answers = running.call, running.sequences.values()
    return Usage(
        cached_tokens=max(0, len(call.base_tokens) - running.main.recomputed_tokens),
        prompt_tokens=len(call.document_tokens) + len(call.prompt_tokens),
        completion_tokens=sum(len(each.generated) for each in answers),
        recomputed_tokens=sum(each.recomputed_tokens for each in answers),
        reused_tokens=running.reused_tokens,
    )
