"""The engine: calls, admission and steps. Single-threaded: one thread makes all calls.

A sequence outlives its calls, so that the next question finds the document's KV. It is only a cache of the session:
each call brings all tokens of the session, and what isn't held is computed again, and counted.

    admission:  submit → reserve bytes, or wait for those who give way
                                                 │
    step:       expire → share out room → plan → forward → commit, slide windows → sample → events
    module:     calls    room             planning  forward   (here)                  output
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvservice.compression.methods import reuse_of, stages_of
from kvservice.compression.protocols import RECALL_INDEXES
from kvservice.compression.sharing import SharingPlan, shape_under
from kvservice.config.engine import EngineConfig
from kvservice.config.recipes import DEFAULT_RECIPE, POD, RECIPES, served_recipes
from kvservice.engine.admission import Admission
from kvservice.engine.arrivals import Arrivals
from kvservice.engine.calls import Calls, is_stored
from kvservice.engine.chunk import Chunk
from kvservice.engine.demand import Wish
from kvservice.engine.faults import step_failure
from kvservice.engine.forward import Forward, plan_rows
from kvservice.engine.grammar import GrammarCompiler
from kvservice.engine.meters import Meters, kv_telemetry
from kvservice.engine.output import Output
from kvservice.engine.planning import Passed, Planner, Work
from kvservice.engine.ports import GroupWriter
from kvservice.engine.room import PATIENCE_S, Room
from kvservice.engine.running import RunningSequence
from kvservice.engine.scheduler import Scheduled
from kvservice.engine.sequences import HeldSequences
from kvservice.engine.stopwatch import Stopwatch
from kvservice.engine.turns import Turns
from kvservice.errors import (
    ConfigError,
    Conflict,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Overloaded,
)
from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Owner
from kvservice.kv.occupancy import ByteSeconds
from kvservice.models.base import Model
from kvservice.recall.memory import RecallCounters, SequenceMemory
from kvservice.recall.parking import Place
from kvservice.recall.reach import Reach
from kvservice.tier.link import HostLink
from kvservice.types import (
    GROUP_TOKENS,
    SINK_TOKENS,
    CallId,
    Distant,
    EngineCall,
    EngineEvent,
    FinishReason,
    Headroom,
    KvTelemetry,
    Load,
    ModelInfo,
    SessionId,
    WorkerStats,
)

logger = logging.getLogger(__name__)


class Engine:
    """Computes calls on sequences of one model within byte budgets.

    Args:
        model: the model; its device is the engine's.
        config: budgets.
        writer: takes the groups that leave the device, for the tier below host memory.
        grammars: for answers that must match one; without it such calls are refused.
        clock: seconds, monotonic.
        sharing: how distant keys are shared between the model's layers; without it recipes that share are refused.

    Raises:
        ConfigError: `kv_bytes` doesn't hold the prefill workspace, the model can't be deterministic and should,
            `sharing` is for another one, or the model was adapted and there is no `sharing`.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        writer: GroupWriter,
        grammars: GrammarCompiler | None = None,
        clock: Callable[[], float] = time.monotonic,
        sharing: SharingPlan | None = None,
    ) -> None:
        if config.deterministic and not model.is_deterministic:
            raise ConfigError("deterministic: this model was loaded without row blocks", field="deterministic")
        if model.spec.adapter is not None and sharing is None:
            raise ConfigError("adapter without a map: its weights are for layers that share distant keys; name both")
        RECALL_INDEXES.discover("kvservice.methods")
        for recipe in RECIPES.values():
            stages_of(recipe)
            reuse_of(recipe)
        self._model = model
        self._config = config
        self._writer = writer
        self._clock = clock
        self._shape = model.spec.shape if sharing is None else shape_under(sharing, model.spec.shape)
        # The most groups that one step can push out of windows; each sequence may round up.
        self._step_groups = config.step_tokens // GROUP_TOKENS + config.max_prefills
        layout = KVLayout.of(self._shape, model.dtype)
        self._recipes = served_recipes(shares_keys=sharing is not None, is_adapted=model.spec.adapter is not None)
        self._sequences = HeldSequences(
            self._shape, layout, config, model.device, sharing, clock, separators=model.spec.separator_ids
        )
        self._sequences.ledger.add(Owner.WEIGHTS, model.weight_bytes)
        rate = config.host_link_bytes_per_s
        link = HostLink(rate) if rate is not None else None
        self._forward = Forward(model, self._sequences, deterministic=config.deterministic, link=link)
        self._arrivals = Arrivals(self._sequences, deterministic=config.deterministic)
        self._meters = Meters()
        self._turns = turns = Turns(self._meters)
        self._calls = Calls(self._shape, self._sequences, writer, self._meters, turns, clock)
        self._room = Room(self._calls, self._sequences)
        self._admission = Admission(
            self._calls,
            self._sequences,
            self._room,
            turns,
            shape=self._shape,
            max_batch=config.max_batch,
            grammars=grammars,
            shares_keys=sharing is not None,
        )
        self._output = Output(self._calls, self._sequences, model.spec.eos_token_ids, clock)
        self._planner = Planner(config, self._shape.num_layers, turns, lambda: writer.has_room(self._step_groups))
        self.stopwatch = Stopwatch()

    @property
    def info(self) -> ModelInfo:
        """What the engine serves."""
        spec = self._model.spec
        default = DEFAULT_RECIPE if spec.adapter is None else POD.name
        return ModelInfo(spec.name, self._shape, self._recipes, default, spec.origin)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something."""
        return bool(self._calls.running or self._calls.events)

    # -- calls -------------------------------------------------------------------------------------------------------

    def submit(self, call: EngineCall) -> None:
        """Admits a call, or refuses and changes nothing.

        An admitted call has all the bytes that its tokens and the beginning of its answer take, or will have them as
        soon as idle sequences, or those of its tenant's calls of a lower priority, have given way.

        Raises:
            InvalidRequest: nothing to compute, a wrong grammar, a recipe that needs a map and there is none, or one
                that promises the model as it is and it was adapted.
            PromptTooLong: more tokens than the model has positions.
            Conflict: the session has a call running.
            FailedPrecondition: the recipe needs what the session dropped, or KV is missing and `on_miss` is FAIL.
            BudgetTooSmall: it would not fit if it were alone.
            Overloaded: it doesn't fit now.
        """
        if self._model.spec.adapter is not None and not call.recipe.shares_keys:
            raise InvalidRequest(
                f"recipe {call.recipe.name!r} promises the model as it is, and this worker's was trained to share "
                "distant keys between layers: use pod or pod-exact, or a worker without --adapter",
                field="recipe",
                reason="model_adapted",
            )
        self._admission.submit(call)

    def cancel(self, call_id: CallId) -> None:
        """Ends a call and frees what it took, at once. Unknown ids are ignored: the call may have just ended."""
        running = self._calls.running.get(call_id)
        if running is not None:
            self._calls.finish(running, FinishReason.CANCELLED)

    def stop(self, call_id: CallId, index: int = 0) -> None:
        """Ends an answer whose text reached a stop string; what was generated stays."""
        running = self._calls.running.get(call_id)
        if running is not None and index in running.sequences and index not in running.finish_reasons:
            self._calls.end_answer(running, running.sequences[index], FinishReason.STOP)

    # -- sessions ----------------------------------------------------------------------------------------------------

    def release(self, session_id: SessionId, tenant_tag: bytes = b"", *, purge: bool = False) -> tuple[int, int]:
        """Drops a session's KV, cancelling its call if one runs.

        Args:
            session_id: the session.
            tenant_tag: needed for `purge`.
            purge: also delete its blobs in the tier below.

        Returns:
            Device and host bytes freed.
        """
        if (running := self._calls.of_session(session_id)) is not None:
            self.cancel(running.call.call_id)
        if purge:
            self._writer.delete(tenant_tag, session_id)
        self._writer.forget(session_id)
        return self._sequences.drop(session_id)

    def take_byte_seconds(self, session_id: SessionId) -> ByteSeconds:
        """What a session's KV has taken since its last call's end; for one that is released."""
        return self._sequences.take_byte_seconds(session_id)

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
        if num_tokens is None and not self._sequences.is_busy(session_id):
            # The last token of an answer has no KV, and is the fork's all the same.
            have = tokens = len(memory.state.tokens)
        if not 0 < tokens <= have:
            raise NotFound(f"num_tokens={tokens}: the session has KV of {have}", reason="beyond_end")
        twin = memory.fork()
        self._sequences.add(fork_id, twin, self._sequences.tenant_of(session_id))
        try:
            self._room.await_room(fork_id, Wish(tokens, num_kept=tokens))
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
        self._calls.expire()
        work = self._planner.plan(self._arrivals.adopt(self._room.share_out()))
        self.stopwatch.lap("schedule")
        if work.batch or work.spans:
            self._run(work)
        elif self._calls.running:
            self._wait()
        self._sequences.observe_running()
        return self._calls.take_events()

    def _run(self, work: Work) -> None:
        started = self._clock()
        done: list[Scheduled] = []
        logits: list[Tensor] = []
        passed: list[Passed] = []
        try:
            for chunk, span in [(Chunk(work.batch), None), *work.spans] if work.batch else work.spans:
                if not (was_through := chunk.is_through):
                    passed.append(self._advance(chunk, span))
                # What leaves the window takes as long as some layers: beside others, that is a step's share for itself.
                if was_through or (chunk.is_through and (span is None or not work.num_decodes)):
                    done += chunk.items
                    logits.append(self._commit(chunk))
        except Exception as error:  # one bad step must not end the service: its calls fail, their sessions roll back
            logger.exception("step_failed")
            for item in work.items:
                self._calls.fail(item.sequence.call.call_id, step_failure(error))
            return
        self._planner.note(passed)
        self._meters.note_step(work.num_decodes, self._tokens_read(passed), max(self._clock() - started, 1e-9))
        asked = self._output.advance(done)
        self.stopwatch.lap("output")
        if asked:
            chosen = self._output.choose(asked, torch.cat(logits))
            self.stopwatch.lap("sample")
            self._output.take(asked, chosen)
            self.stopwatch.lap("output")

    def _advance(self, chunk: Chunk, span: int | None) -> Passed:
        """Takes a chunk through its next layers."""
        started = self._clock()
        if chunk.passing is None:
            shares = [(item.sequence.memory, item.num_tokens, item.reach) for item in chunk.items]
            chunk.passing = self._forward.begin(plan_rows(shares))
            for item in chunk.items:
                if not item.decodes:
                    # Now it has the bytes that it will have when the step is over, and its call may be.
                    self._sequences.observe(item.sequence.session_id)
            self.stopwatch.lap("tables")
        before = chunk.passing.next_layer
        self._forward.advance(chunk.passing, span)
        self._forward.wait()
        self.stopwatch.lap("forward")
        return Passed(chunk, chunk.passing.next_layer - before, max(self._clock() - started, 1e-9))

    def _tokens_read(self, passed: Iterable[Passed]) -> int:
        """As many tokens as would have passed all layers."""
        token_layers = sum(
            layers * item.num_tokens for chunk, layers, _ in passed for item in chunk.items if not item.decodes
        )
        return token_layers // self._shape.num_layers

    def _commit(self, chunk: Chunk) -> Tensor:
        """Counts in what has passed all layers, and returns the logits of those that sample."""
        for item in chunk.items:
            self._count_in(item)
        self.stopwatch.lap("commit")
        assert chunk.passing is not None
        logits = self._forward.logits(chunk.passing, [i for i, item in enumerate(chunk.items) if item.samples])
        self.stopwatch.lap("forward")
        return logits

    def _count_in(self, item: Scheduled) -> None:
        """Counts computed tokens in, slides the window, and hands what left it to the tier below."""
        sequence, memory = item.sequence, item.sequence.memory
        sequence.recomputed_tokens += min(item.num_tokens, memory.num_dropped)
        if item.decodes:
            self._turns.count(sequence.fare, num_answered=1)
        else:
            selecting = item.num_tokens if item.reach is Reach.SELECT else 0
            self._turns.count(sequence.fare, num_read=item.num_tokens, num_selecting=selecting)
        first_group = memory.num_stored_groups
        left = memory.commit(item.num_tokens, item.reach)
        if memory.held is not None and item.completes and not item.decodes:
            self._sequences.give_back(sequence.session_id)
        self._write(sequence, first_group, left)

    def _write(self, sequence: RunningSequence, first_group: int, left: Tensor | None) -> None:
        """Hands the tier below the groups from `first_group` on, which have come to belong there.

        Args:
            sequence: whose they are.
            first_group: the first of them.
            left: these groups, if they have left the device.
        """
        call, memory = sequence.call, sequence.memory
        stop = memory.num_stored_groups
        # Answers beyond the first belong to nobody's session.
        if stop <= first_group or sequence.index or not is_stored(call, memory, self._writer):
            return
        begin = self._writer.begins_at(call.tenant_tag, call.session_id, memory.recipe, first_group)
        tokens = memory.state.tokens[: SINK_TOKENS + stop * GROUP_TOKENS]
        groups = memory.stored_groups(first_group, stop) if left is None else left
        if begin < first_group:
            groups = torch.cat([memory.stored_groups(begin, first_group), groups])
        self._writer.write(call.tenant_tag, call.session_id, memory.recipe, begin, tokens, groups)

    def _wait(self) -> None:
        """Nothing can be computed now: waits for bytes on their way, or for the tier."""
        if not self._sequences.wait_for_moves(PATIENCE_S) and not self._arrivals.wait(PATIENCE_S):
            self._writer.wait_for_room(self._step_groups, PATIENCE_S)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def score(self, session_id: SessionId, token_ids: Sequence[int]) -> Tensor:
        """Reads tokens as if they had been generated, and returns the logits after each: for evaluation.

        Args:
            session_id: a held session without a running call, all of whose tokens have KV.
            token_ids: what follows its tokens.

        Returns:
            fp32 `[len(token_ids), vocab]` on the CPU.
        """
        memory = self.memory_of(session_id)
        state = memory.state
        self._room.await_room(session_id, Wish(len(state.tokens) + len(token_ids)))
        reach = Reach.SELECT if memory.recipe.distant is Distant.RECALL else Reach.FULL
        logits = []
        for token_id in token_ids:
            # One at a time, as decoding would: recall slots, dropped tokens and all.
            state.tokens.append(token_id)
            passing = self._forward.begin(plan_rows([(memory, 1, reach)]))
            self._forward.advance(passing)
            logits.append(self._forward.logits(passing, [0]).cpu())
            memory.commit(1, reach)
        self._sequences.settle(session_id)
        return torch.cat(logits)

    def telemetry(self, session_id: SessionId) -> KvTelemetry:
        """Where a held session's bytes are, and what its recall has done so far."""
        return kv_telemetry(self.memory_of(session_id), self._shape, RecallCounters())

    def memory_of(self, session_id: SessionId) -> SequenceMemory:
        """What an idle session holds on the device: for evaluation."""
        memory = self._sequences.get(session_id)
        if memory is None or self._sequences.is_busy(session_id) or memory.place is not Place.DEVICE:
            raise FailedPrecondition(f"session {session_id} is not on the device, or has a call running")
        return memory

    # -- sight -------------------------------------------------------------------------------------------------------

    def headroom(self) -> Headroom:
        """What is left."""
        headroom = self._sequences.headroom(len(self._calls.running))
        load = Load(
            waiting_tokens=sum(sequence.num_unread for sequence in self._calls.active),
            prefill_tokens_per_s=self._meters.prefill_tokens_per_s,
            prefixes=self._sequences.reported_prefixes(),
            decode_tokens_per_s=self._meters.decode_tokens_per_s,
        )
        return replace(headroom, load=load)

    def stats(self) -> WorkerStats:
        """Counters and bytes by owner."""
        used, evictions = self._sequences.ledger.used_bytes, self._sequences.evictions
        return replace(
            self._meters.stats(),
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
            parked_sessions=self._sequences.num_parked(),
            tier=self._writer.stats(),
        )

    def check(self) -> None:
        """Raises InternalError unless arena, host tier and ledger agree with what the sequences hold."""
        self._sequences.check()
