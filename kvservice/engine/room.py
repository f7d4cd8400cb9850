"""Who has bytes to go on, and who must make room for whom. Knows no models, schedules or events.

A sequence computes while it has bytes for all its tokens. Whoever goes first takes them from idle sequences, and from
those of calls that go later; those wait, in host memory or forgotten, until there is room for them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvservice.engine.calls import Calls
from kvservice.engine.demand import Wish
from kvservice.engine.finding import Found
from kvservice.engine.running import RunningSequence
from kvservice.engine.sampler import SamplerRow
from kvservice.engine.sequences import HeldSequences
from kvservice.errors import InternalError, Overloaded, QuotaExceeded
from kvservice.recall.parking import Place
from kvservice.recall.reach import ReachLog
from kvservice.types import SessionId

GROWTH_TOKENS = 64
"""An answer's bytes are reserved this many tokens ahead: most answers end long before their limit."""

PATIENCE_S = 0.05
"""How long to wait at a time for bytes on their way to the host."""


class Room:
    """Shares out bytes among calls.

    Args:
        calls: those under way.
        sequences: theirs, and the idle ones.
    """

    def __init__(self, calls: Calls, sequences: HeldSequences) -> None:
        self._calls = calls
        self._sequences = sequences

    def admit(self, sequence: RunningSequence, found: Found, further: Sequence[SamplerRow]) -> None:
        """Takes a call on, if its bytes are there or will be once others have given way.

        Args:
            sequence: of the call; its memory is closed if it is refused and was forked for it.
            found: the KV that it goes on from.
            further: the sampler rows of the call's answers beyond the first.

        Raises:
            Overloaded: there is no room. Nothing has changed.
            QuotaExceeded: there is none within the tenant's limits.
        """
        session_id, memory, wish = sequence.session_id, sequence.memory, wish_of(sequence)
        try:
            if any(other.order < sequence.order and self._waits(other) for other in self._calls.active):
                raise Overloaded("calls that go first wait for room", retry_after_s=1.0)
            lower = [other.session_id for other in self._calls.victims_of(sequence) if _gives_way(other, sequence)]
            self._sequences.check_room(session_id, memory, wish, lower)
            most = replace(wish, num_tokens=sequence.most_tokens)
            self._sequences.keep_to_terms(session_id, memory, most, sequence.tenant, sequence.call.terms)
        except (Overloaded, QuotaExceeded):
            if found.donor is not None:
                memory.close()
            raise
        sequence.counters_before = memory.counters.copy()
        self._sequences.add(session_id, memory, sequence.tenant)
        self._calls.add(sequence, further, found.num_reused)
        if self._sequences.make_room(session_id, wish, lower):
            self._enter(sequence)

    def share_out(self) -> list[RunningSequence]:
        """Lets calls begin, grow and come back, those that go first before the others, as far as there is room.

        Returns:
            The sequences that a step can compute, in the same order.
        """
        self._end_moves()
        ready = []
        is_full = False
        for sequence in self._calls.active:
            if not self._has_all(sequence):
                # Whoever makes room for a later one goes later still: what was found ready stays so.
                if not is_full and not sequence.memory.is_moving:
                    is_full = not self._go_on(sequence)
                if not sequence.has_begun or sequence.memory.place is not Place.DEVICE or self._waits(sequence):
                    continue
            ready.append(sequence)
        return ready

    def await_room(self, session_id: SessionId, wish: Wish) -> None:
        """Makes idle sequences give way, and waits for those that go to the host. Blocks.

        Raises:
            Overloaded: there is no room, even if all of them gave way.
        """
        while not self._sequences.make_room(session_id, wish, ()):
            self._sequences.wait_for_moves(PATIENCE_S)
            self._end_moves()

    def _end_moves(self) -> None:
        """Ends moves between device and host; one that failed costs the calls of its sequence, and nobody else's."""
        for session_id in self._sequences.poll():
            self._calls.fail_sequence(session_id, InternalError("the KV of the call was lost on its way; call again"))

    def _go_on(self, sequence: RunningSequence) -> bool:
        """Gives a sequence the bytes for its next tokens; False if it must wait, and those behind it with it."""
        if self._sequences.reserved_tokens(sequence.session_id) < _wanted_tokens(sequence):
            victims = [other.session_id for other in self._calls.victims_of(sequence)]
            try:
                if not self._sequences.make_room(sequence.session_id, wish_of(sequence), victims):
                    return False
            except Overloaded:
                return False
        self._enter(sequence)
        return True

    def _enter(self, sequence: RunningSequence) -> None:
        """The bytes are there: brings the sequence to the device and to the tokens of its call."""
        memory = sequence.memory
        if memory.place is Place.PARKED:
            self._sequences.bring_back(sequence.session_id)
        elif not sequence.has_begun:
            if memory.num_computed > sequence.kept:
                self._sequences.unpublish(sequence.session_id)
            memory.truncate(sequence.kept)
            if sequence.reached is not None:
                memory.reaches = ReachLog.of(sequence.reached)
            memory.state.tokens = list(sequence.tokens)
            memory.begin_answer(len(sequence.tokens))
            self._sequences.begin(sequence.session_id)
            sequence.prefill_from = memory.state.num_computed
            sequence.has_begun = True

    def _has_all(self, sequence: RunningSequence) -> bool:
        """Whether it can be computed now, and after that: the usual case, told quickly."""
        if not sequence.has_begun or sequence.memory.place is not Place.DEVICE:
            return False
        return self._sequences.reserved_tokens(sequence.session_id) >= _wanted_tokens(sequence)

    def _waits(self, sequence: RunningSequence) -> bool:
        """Whether it has no bytes for all its tokens: it must go on waiting, or has made room."""
        return self._sequences.reserved_tokens(sequence.session_id) < sequence.num_known


def _gives_way(other: RunningSequence, to: RunningSequence) -> bool:
    """Whether a running sequence makes room for a call that comes and goes first.

    One of its tenant's of a lower priority does, whatever it has come to; any other only while it has answered nothing.
    """
    is_lower = other.tenant == to.tenant and other.call.priority < to.call.priority
    return other.has_ended or is_lower or not other.generated


def _wanted_tokens(sequence: RunningSequence) -> int:
    # One token ahead, so that between steps only those wait that there is no room for.
    return min(sequence.num_known + 1, sequence.most_tokens)


def wish_of(sequence: RunningSequence) -> Wish:
    """What a sequence needs to go on for a while."""
    num_tokens = min(sequence.most_tokens, sequence.num_known + GROWTH_TOKENS)
    sampling = sequence.call.sampling
    answers = sampling.n - 1 if sampling and sequence.index == 0 and not sequence.generated else 0
    return Wish(num_tokens, answers, len(sequence.tokens), None if sequence.has_begun else sequence.kept)
