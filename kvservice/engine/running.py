"""An admitted call and how far it has come. Knows nothing of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvservice.attention.batch import Reach
from kvservice.recall.memory import RecallCounters, SequenceMemory
from kvservice.types import Distant, EngineCall


@dataclass(slots=True)
class RunningCall:
    """A call that holds a reservation.

    Attributes:
        call: what was asked.
        memory: the sequence; its `tokens` already include document and prompt.
        full_until: tokens before this position attend to everything.
        recomputed_tokens: base tokens whose KV wasn't held.
        counters_before: recall counters when the call began.
        admitted_at: seconds, of the engine's clock.
        prefill_from: tokens whose KV was there when the call began.
        first_token_at: when its first token was sampled, or the prefill ended.
        generated: tokens of the answer.
    """

    call: EngineCall
    memory: SequenceMemory
    full_until: int
    recomputed_tokens: int
    counters_before: RecallCounters
    admitted_at: float
    prefill_from: int
    first_token_at: float | None = None
    generated: list[int] = field(default_factory=list)

    @property
    def prompt_end(self) -> int:
        """Position after the last prompt token."""
        return len(self.call.base_tokens) + len(self.call.document_tokens) + len(self.call.prompt_tokens)

    @property
    def in_prefill(self) -> bool:
        """Whether more than the newest token has yet to be computed."""
        return self.memory.state.num_computed < self.prompt_end

    @property
    def reach(self) -> Reach:
        """What the next token attends to."""
        before_questions = self.memory.state.num_computed < self.full_until
        recalls = self.call.recipe.distant is Distant.RECALL
        return Reach.FULL if before_questions or not recalls else Reach.SELECT

    def next_tokens(self, chunk_tokens: int) -> int:
        """How many tokens the next step may take: of one reach, and for SELECT, of one window."""
        state = self.memory.state
        pending = len(state.tokens) - state.num_computed
        if self.reach is Reach.SELECT:
            return min(pending, chunk_tokens, self.memory.recipe.tokens_until_slide(state.num_computed))
        if state.num_computed < self.full_until:
            pending = min(pending, self.full_until - state.num_computed)
        return min(pending, chunk_tokens)
