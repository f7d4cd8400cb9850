"""What each step computes, and how far it goes through the layers. Knows no models.

Who decodes goes through all layers in every step. What would keep those waiting goes through a few layers of each: the
prefill of others, and decoding that reads all of a long context from host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvservice.config.engine import EngineConfig
from kvservice.engine.chunk import Chunk
from kvservice.engine.pacing import Pace
from kvservice.engine.running import RunningSequence
from kvservice.engine.scheduler import Scheduled, hold_back, passing_cost, share_prefill, share_questions, sort_out
from kvservice.engine.turns import Turns


@dataclass(slots=True)
class Work:
    """One step.

    Attributes:
        batch: goes through all layers.
        num_decodes: of the batch, those that decode; they come first.
        spans: chunks, and how many layers further each goes; None: through all that are left, and on.
    """

    batch: list[Scheduled]
    num_decodes: int
    spans: list[tuple[Chunk, int | None]] = field(default_factory=list)

    @property
    def items(self) -> list[Scheduled]:
        """All that it computes something for."""
        return self.batch + [item for chunk, _ in self.spans for item in chunk.items]


class Passed(NamedTuple):
    """A chunk went so many layers further, in so many seconds."""

    chunk: Chunk
    layers: int
    seconds: float


class Planner:
    """Plans steps, and learns from how long they take.

    Args:
        config: of the engine.
        num_layers: of the model.
        turns: told whose tokens are read.
        may_offload: whether what prefill pushes out of windows can be taken.
    """

    def __init__(self, config: EngineConfig, num_layers: int, turns: Turns, may_offload: Callable[[], bool]) -> None:
        self._config = config
        self._num_layers = num_layers
        self._turns = turns
        self._may_offload = may_offload
        self._pace = Pace(config.max_decode_stretch, num_layers)
        self._prefill: Chunk | None = None
        self._streaming: Chunk | None = None

    def plan(self, ready: Sequence[RunningSequence]) -> Work:
        """The next step.

        Args:
            ready: sequences on the device, those that go first before the others.
        """
        # A chunk that is through isn't intact either: its sequences have gone on.
        if self._prefill is not None and not self._prefill.is_intact(ready):
            self._prefill = None
        if self._streaming is not None and not self._streaming.is_intact(ready):
            self._streaming = None
        decodes, reading = sort_out(ready)
        work = self._plan_decodes(decodes)
        if reading and self._may_offload():
            self._plan_prefill(work, reading)
        return work

    def note(self, passed: Iterable[Passed]) -> None:
        """What the passes of a step took."""
        decodes_known = False
        for chunk, layers, seconds in passed:
            reads = [item for item in chunk.items if not item.decodes]
            if len(reads) == len(chunk.items):
                self._pace.note_prefill(layers * sum(item.cost for item in reads), seconds)
            elif reads:
                self._pace.note_merged()
            elif not decodes_known:
                # Those that read all of their host KV come behind those that don't, and are paced themselves.
                self._pace.note_decodes(len(chunk.items), seconds)
                decodes_known = True

    def _plan_decodes(self, decodes: list[Scheduled]) -> Work:
        under_way = {id(item.sequence) for item in self._streaming.items} if self._streaming else set()
        batch, held_back = hold_back(
            [item for item in decodes if id(item.sequence) not in under_way], self._config.step_host_bytes
        )
        if self._streaming is None and held_back:
            self._streaming = Chunk(held_back)
        work = Work(batch, len(batch))
        if self._streaming is not None:
            span = self._num_layers
            if any(not item.streamed_bytes for item in batch):
                span = max(1, self._config.step_host_bytes * span // max(1, self._streaming.streamed_bytes))
            work.spans.append((self._streaming, span))
        return work

    def _plan_prefill(self, work: Work, reading: Sequence[RunningSequence]) -> None:
        """Adds what can be read along with those that decode, or takes what is being read further."""
        num_decodes = work.num_decodes or len(work.spans)
        if self._prefill is not None and all(item.sequence.tenant != reading[0].tenant for item in self._prefill.items):
            # Another tenant's turn has come: it waits for this chunk no longer than a step.
            work.spans.append((self._prefill, None))
            self._prefill = None
            return
        gives_way = _asks_too_much(work.items, reading)
        under_way = self._prefill.items if self._prefill else ()
        budget = self._config.step_tokens - num_decodes - sum(item.num_tokens for item in under_way)
        free = [each for each in reading if all(each is not item.sequence for item in under_way)]
        free = free[: max(0, self._config.max_prefills - len(under_way))]
        matched = 0
        if work.num_decodes:
            questions = share_questions(free, max(0, budget))
            # What goes before another tenant's turn because it is short, that turn gets as well.
            matched = self._num_layers * passing_cost(questions, reading)
            work.batch += questions
            budget -= sum(item.num_tokens for item in questions)
            free = [each for each in free if all(each is not item.sequence for item in questions)]
        if self._prefill is None:
            tokens = self._pace.chunk_tokens(
                num_decodes, len(reading), max(0, budget), gives_way=gives_way, matched=matched
            )
            items = share_prefill(free, tokens)
            if not items:
                return
            # It has most of the chunk; what it leaves to others doesn't bring their turn about.
            self._turns.serve(free[0].fare)
            self._prefill = Chunk(items)
        span = self._pace.layers(num_decodes, len(reading), self._prefill.cost, gives_way=gives_way, matched=matched)
        is_whole = self._prefill.passing is None and span == self._num_layers
        if is_whole and self._pace.may_merge(num_decodes):
            work.batch += self._prefill.items
            self._prefill = None
        else:
            work.spans.append((self._prefill, span))


def _asks_too_much(decoding: Sequence[Scheduled], reading: Sequence[RunningSequence]) -> bool:
    """Whether all who decode have more to read behind another tenant's: then their answers give way to that.

    They ask for more than their share. Where others answer too, these aren't slowed down.
    """
    waiting = {sequence.tenant for sequence in reading[1:]} - {reading[0].tenant}
    return bool(decoding) and all(item.sequence.tenant in waiting for item in decoding)
