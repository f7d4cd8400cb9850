"""A call under way: its sequences, and what each computes next. Knows nothing of arenas or schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvservice.engine.sampler import SamplerRow
from kvservice.engine.turns import Fare
from kvservice.recall.memory import RecallCounters, SequenceMemory
from kvservice.recall.reach import Reach
from kvservice.types import SINK_TOKENS, CallId, Distant, EngineCall, FinishReason, Reached, RestoredKv, SessionId


@dataclass(slots=True, eq=False)
class RunningSequence:
    """One answer of a call, or its reading of a document.

    Attributes:
        session_id: of answer 0 the call's; the other answers have names of their own.
        index: number of the answer.
        memory: its KV. Until `has_begun` its tokens are those of the last call.
        number: of the call, in the order in which they came.
        fare: of the call.
        tokens: all tokens given: base, document, prompt.
        kept: of those, the leading ones whose KV need not be computed.
        full_until: tokens before this position attend to everything.
        row: what sampling knows of the answer; None if the call generates nothing.
        has_begun: its memory stands for `tokens`, and the bytes it needs are reserved.
        recomputed_tokens: tokens computed again because their KV wasn't held, or had to make room.
        reached: how tokens were computed whose KV was lost, if that is known.
        restored: KV on its way from the tier below; until all has come, nothing is computed but missing sinks.
        has_ended: the answer is complete; others of the call may not be.
        most_tokens: the most that it can come to hold.
    """

    call: EngineCall
    session_id: SessionId
    index: int
    memory: SequenceMemory
    number: int
    fare: Fare
    tokens: Sequence[int]
    kept: int
    full_until: int
    row: SamplerRow | None
    recomputed_tokens: int = 0
    reached: Reached | None = None
    restored: RestoredKv | None = None
    counters_before: RecallCounters = field(default_factory=RecallCounters)
    has_begun: bool = False
    has_ended: bool = False
    prefill_from: int = 0
    generated: list[int] = field(default_factory=list)
    most_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.most_tokens = len(self.tokens) + (self.call.sampling.max_new_tokens if self.call.sampling else 0)

    @property
    def order(self) -> tuple[float, int, int]:
        """Who goes first, and who makes room for whom: lower goes first. It changes as calls come and end."""
        return self.fare.turn.order, self.number, self.index

    @property
    def tenant(self) -> bytes:
        """Whose it is."""
        return self.call.tenant_tag

    @property
    def num_pending(self) -> int:
        """Tokens that have no KV yet."""
        return len(self.memory.state.tokens) - self.memory.state.num_computed

    @property
    def num_unread(self) -> int:
        """Tokens of the call's prefill that have no KV yet; the one that a step decodes is none of them."""
        computed = self.memory.state.num_computed if self.has_begun else self.kept
        return max(0, self.num_known - 1 - computed)

    @property
    def num_known(self) -> int:
        """Tokens given and generated."""
        return len(self.tokens) + len(self.generated)

    def next_reach(self) -> tuple[Reach, int]:
        """What the next token attends to, and how many tokens may be computed with it in one step."""
        memory, position = self.memory, self.memory.state.num_computed
        if position < memory.reaches.end:
            # Computed before, and dropped to make room.
            reach, end = memory.reaches.at(position)
        elif position < self.full_until or self.call.recipe.distant is not Distant.RECALL:
            reach, end = Reach.FULL, self.full_until if position < self.full_until else len(memory.state.tokens)
        else:
            reach, end = Reach.SELECT, len(memory.state.tokens)
        count = min(end - position, self.num_pending)
        if reach is Reach.SELECT:
            # All queries of a SELECT step see one window.
            count = min(count, memory.recipe.tokens_until_slide(position))
        if memory.held is not None:
            count = min(count, memory.held.tokens_until_drop)
        if self.restored is not None and position < SINK_TOKENS:
            count = min(count, SINK_TOKENS - position)
        return reach, count


@dataclass(slots=True, eq=False)
class RunningCall:
    """A call that was admitted.

    Attributes:
        sequences: by the answer's index. Those beyond the first appear when the prompt has been read.
        further: what sampling knows of the answers beyond the first.
        finish_reasons: of the answers that have ended.
        admitted_at: seconds, of the engine's clock.
        first_token_at: when its first token was sampled, or the prefill ended.
        num_answers: answers asked for; reading alone counts as one.
        deadline: when it fails; infinity if it has none.
    """

    call: EngineCall
    sequences: dict[int, RunningSequence]
    further: Sequence[SamplerRow]
    admitted_at: float
    reused_tokens: int = 0
    first_token_at: float | None = None
    finish_reasons: dict[int, FinishReason] = field(default_factory=dict)
    num_answers: int = field(init=False)
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.num_answers = self.call.sampling.n if self.call.sampling else 1
        self.deadline = math.inf if self.call.deadline is None else self.call.deadline

    @property
    def main(self) -> RunningSequence:
        """The sequence of the session."""
        return self.sequences[0]


def answer_name(session_id: SessionId, call_id: CallId, index: int) -> SessionId:
    """What the sequence of an answer is called while the call runs."""
    return session_id if index == 0 else SessionId(f"{session_id}/{call_id}/{index}")
