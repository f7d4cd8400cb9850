"""What the next step computes. Pure functions of the sequences that are ready."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvservice.engine.running import RunningSequence
from kvservice.recall.reach import Reach


class Scheduled(NamedTuple):
    """One sequence's share of a step.

    Attributes:
        num_tokens: how many of its tokens are computed.
        reach: what they attend to.
        completes: then all its tokens are.
    """

    sequence: RunningSequence
    num_tokens: int
    reach: Reach
    completes: bool

    @property
    def samples(self) -> bool:
        """Whether the step gives its next token."""
        return self.completes and self.sequence.row is not None

    @property
    def decodes(self) -> bool:
        """Whether it goes on from a token of its own."""
        return self.num_tokens == 1 and bool(self.sequence.generated)

    @property
    def streamed_bytes(self) -> int:
        """Host KV that is read for it, all layers together, whatever its tokens choose."""
        return self.sequence.memory.distant.num_bytes if self.reach is Reach.FULL else 0


def sort_out(ready: Iterable[RunningSequence]) -> tuple[list[Scheduled], list[RunningSequence]]:
    """Those that decode, a token each, and those that have tokens to read first."""
    decodes, reading = [], []
    for sequence in ready:
        num_pending = sequence.num_pending
        if num_pending == 1 and sequence.generated:
            decodes.append(Scheduled(sequence, 1, sequence.next_reach()[0], completes=True))
        elif num_pending:
            reading.append(sequence)
    return decodes, reading


def hold_back(decodes: list[Scheduled], most_bytes: int) -> tuple[list[Scheduled], list[Scheduled]]:
    """Those that decode in one step, and those that would keep them waiting: they read too much host KV.

    Args:
        decodes: all that decode.
        most_bytes: host KV that may be read in a step for the sake of some of them. Where all read such, all wait for
            each other.
    """
    streaming = [item for item in decodes if item.streamed_bytes]
    if len(streaming) == len(decodes) or sum(item.streamed_bytes for item in streaming) <= most_bytes:
        return decodes, []
    return [item for item in decodes if not item.streamed_bytes], streaming


def share_prefill(reading: Sequence[RunningSequence], num_tokens: int) -> list[Scheduled]:
    """Shares prefill tokens among sequences.

    A question need not wait for the document before it: sequences that have less to read than the first may take half
    of the tokens, the shortest first. The first has the rest, and what it leaves is for those behind it, in order.

    Args:
        reading: those that may take part, those that go first before the others.
        num_tokens: to be shared, all of them if the sequences have so many.
    """
    if not reading or num_tokens <= 0:
        return []
    first = reading[0]
    short = sorted(
        (each for each in reading if each.num_pending < first.num_pending), key=lambda each: each.num_pending
    )
    plan: list[Scheduled] = []
    left = num_tokens // 2
    for sequence in short:
        left -= _take(sequence, left, plan)
    left += num_tokens - num_tokens // 2
    taken = {id(item.sequence) for item in plan}
    for sequence in reading:
        if id(sequence) not in taken:
            left -= _take(sequence, left, plan)
    return plan


def _take(sequence: RunningSequence, num_tokens: int, plan: list[Scheduled]) -> int:
    """Puts a sequence's share on the plan, and returns how much it is."""
    reach, most = sequence.next_reach()
    count = min(most, num_tokens)
    if count:
        plan.append(Scheduled(sequence, count, reach, completes=count == sequence.num_pending))
    return count
