"""What a computed step means for its calls: progress, tokens, further answers, ends. Knows no memory budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from kvservice.engine.calls import Calls
from kvservice.engine.demand import Wish
from kvservice.engine.running import RunningCall, RunningSequence, answer_name
from kvservice.engine.sampler import Sampled, SamplerRow, sample
from kvservice.engine.scheduler import Scheduled
from kvservice.engine.sequences import HeldSequences
from kvservice.errors import KVServiceError
from kvservice.types import FinishReason, ProgressEvent, SamplingParams, TokenEvent


class Asked(NamedTuple):
    """An answer whose next token is to be chosen.

    Attributes:
        row: what that needs to know.
        logits_row: the number of its logits among those of the step.
    """

    running: RunningCall
    sequence: RunningSequence
    sampling: SamplingParams
    row: SamplerRow
    logits_row: int


class Output:
    """Turns computed steps into events.

    Args:
        calls: those under way; they get the events.
        sequences: where further answers are forked.
        eos_token_ids: of the model.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        calls: Calls,
        sequences: HeldSequences,
        eos_token_ids: frozenset[int],
        clock: Callable[[], float],
    ) -> None:
        self._calls = calls
        self._sequences = sequences
        self._eos_token_ids = eos_token_ids
        self._clock = clock

    def advance(self, plan: Sequence[Scheduled]) -> list[Asked]:
        """Reports progress and ends what is complete without a token; the answers that now get one.

        Args:
            plan: what was computed. Those that sample have a row of logits each, in order.
        """
        asked: list[Asked] = []
        num_logits = 0
        for item in plan:
            sequence = item.sequence
            running = self._calls.running[sequence.call.call_id]
            if running.first_token_at is None and sequence.memory.num_dropped == 0:
                self._report_progress(sequence)
            if not item.completes:
                continue
            if running.first_token_at is None:
                running.first_token_at = self._clock()
                self._sequences.publish(sequence.session_id, sequence.call.tenant_tag)
            row, sampling = sequence.row, sequence.call.sampling
            if row is None or sampling is None:
                self._calls.end_answer(running, sequence, FinishReason.LENGTH)
                continue
            asked.append(Asked(running, sequence, sampling, row, num_logits))
            if running.num_answers > 1 and not sequence.index and not sequence.generated:
                asked += self._fork_answers(asked[-1])
            num_logits += 1
        return asked

    def choose(self, asked: Sequence[Asked], logits: Tensor) -> list[Sampled | KVServiceError]:
        """The next token of each answer, or what went wrong with this one.

        Args:
            asked: what `advance` gave; not empty.
            logits: fp32 `[r, vocab]`, those of the step.
        """
        if len(asked) != len(logits):
            logits = logits[[each.logits_row for each in asked]]
        return sample(logits, [each.row for each in asked], [each.sequence.num_known for each in asked])

    def take(self, asked: Sequence[Asked], chosen: Sequence[Sampled | KVServiceError]) -> None:
        """Adds its token to each answer, and ends those whose last one it was."""
        for each, sampled in zip(asked, chosen, strict=True):
            call_id = each.running.call.call_id
            if call_id not in self._calls.running:
                continue  # Another of its answers failed.
            if isinstance(sampled, Sampled):
                self._take(each, sampled)
            else:
                self._calls.fail(call_id, sampled)

    def _take(self, asked: Asked, sampled: Sampled) -> None:
        sequence, sampling, token = asked.sequence, asked.sampling, sampled.token_id
        try:
            asked.row.accept(token)
        except KVServiceError as error:  # its grammar and its mask differ: that is this call's misfortune alone
            self._calls.fail(sequence.call.call_id, error)
            return
        # A grammar allows the end token only where an answer may end.
        if token in self._eos_token_ids and (not sampling.ignore_eos or sampling.grammar is not None):
            self._calls.end_answer(asked.running, sequence, FinishReason.EOS)
            return
        sequence.memory.state.tokens.append(token)
        sequence.generated.append(token)
        self._calls.events.append(TokenEvent(sequence.call.call_id, token, sequence.index, sampled.logprobs))
        if len(sequence.generated) == sampling.max_new_tokens:
            self._calls.end_answer(asked.running, sequence, FinishReason.LENGTH)

    def _fork_answers(self, first: Asked) -> list[Asked]:
        """The further answers of a call whose prompt has just been read; they get their first token from its logits."""
        running, main = first.running, first.sequence
        reserved_tokens = self._sequences.reserved_tokens(main.session_id)
        asked = []
        for index, row in enumerate(running.further, 1):
            name = answer_name(main.session_id, main.call.call_id, index)
            wish = Wish(reserved_tokens, running.num_answers - 1 - index, len(main.tokens))
            answer = RunningSequence(
                call=main.call,
                session_id=name,
                index=index,
                memory=self._sequences.fork_answer(main.session_id, name, wish),
                number=main.number,
                fare=main.fare,
                tokens=main.tokens,
                kept=len(main.tokens),
                full_until=main.full_until,
                row=row,
                has_begun=True,
            )
            self._calls.add_answer(running, answer)
            asked.append(Asked(running, answer, first.sampling, row, first.logits_row))
        return asked

    def _report_progress(self, sequence: RunningSequence) -> None:
        done = sequence.memory.state.num_computed - sequence.prefill_from
        total = len(sequence.tokens) - sequence.prefill_from
        self._calls.events.append(ProgressEvent(sequence.call.call_id, done, total))
