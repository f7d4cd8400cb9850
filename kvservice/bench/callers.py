"""A load that is never at rest: callers whose sessions read, ask, fork, change their minds and go. Knows no clock.

caller:  session ─► read its document ─► questions ─► released, or left behind idle
            │            └──────────┬──────┘
            │                       └ any call may be cancelled, or its session released, at a random point
            └ new, forked from another, or with a document that begins as another's
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import count

from kvservice.bench.load import random_ids
from kvservice.bench.steps import Steps
from kvservice.engine import Engine
from kvservice.errors import BudgetTooSmall, DeadlineExceeded, NotFound, Overloaded
from kvservice.types import (
    CallId,
    EngineCall,
    EngineEvent,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    ProgressEvent,
    RecipeSpec,
    SamplingParams,
    SessionId,
    TokenEvent,
)

TENANT_TAGS = (b"soak tenant one!", b"soak tenant two!")
QUESTION_TOKENS = (1, 48)
NEW_TOKENS = (2, 96)
TURNS = (1, 5)
RETRY_STEPS = (4, 24)
"""A caller that found no room tries again after so many steps, or as soon as the engine has nothing to do."""

MIN_SHARED_TOKENS = 96
"""Sessions of fewer tokens have no prefix worth sharing."""

CANCELS = 0.2
RELEASES = 0.03
"""Of busy sessions, at a random point of the call."""

DEADLINES = 0.03
ONE_OFFS = 0.08
FORKS = 0.15
SHARED_DOCUMENTS = 0.25
SHORTENED = 0.1
"""Questions that go back to an earlier point of their session first."""

LEFT_BEHIND = 0.4
"""Sessions that stay idle at their end, until others need their room or there are too many of them."""


@dataclass(frozen=True, slots=True)
class SoakLoad:
    """What the callers do.

    Attributes:
        sessions: callers, each with one session at a time.
        document_tokens: the shortest and the longest document.
        recipes: of sessions, one at random.
        seed: of all that is random.
    """

    sessions: int
    document_tokens: tuple[int, int]
    recipes: tuple[RecipeSpec, ...]
    seed: int


@dataclass(slots=True)
class Counts:
    """What has happened.

    Attributes:
        tokens_read: computed of documents and prompts, again if they were dropped meanwhile.
        tokens_generated: of all answers.
        tokens_reused: not computed, because another session had their KV.
        finished: calls that ended by themselves.
        cancelled_waiting: before the first of their tokens was computed.
        cancelled_reading: while document or prompt was read.
        cancelled_answering: after their first token.
        cancelled_at_end: cancelled by the drain, because they hadn't begun to answer.
        released_busy: sessions released while a call ran on them; their calls count as cancelled, too.
        refused: for lack of room at the moment; the caller came again.
        too_large: never fit.
        expired: their deadline passed.
    """

    tokens_read: int = 0
    tokens_generated: int = 0
    tokens_reused: int = 0
    tokens_recomputed: int = 0
    sessions: int = 0
    forks: int = 0
    finished: int = 0
    cancelled_waiting: int = 0
    cancelled_reading: int = 0
    cancelled_answering: int = 0
    cancelled_at_end: int = 0
    released_busy: int = 0
    refused: int = 0
    too_large: int = 0
    expired: int = 0


class _End(Enum):
    """What a caller does to its own call."""

    CANCEL = "cancel"
    RELEASE = "release"


@dataclass(frozen=True, slots=True)
class _Whim:
    """A change of mind: after this part of the reading, or after so many tokens of the answer."""

    end: _End
    read_fraction: float | None = None
    num_tokens: int = 0


@dataclass(slots=True)
class _Session:
    session_id: SessionId
    recipe: RecipeSpec
    tag: bytes
    tokens: tuple[int, ...]
    document: tuple[int, ...]
    turns: int


@dataclass(slots=True)
class _Open:
    call: EngineCall
    whim: _Whim | None
    done_tokens: int = 0
    num_generated: int = 0
    is_released: bool = False
    is_drained: bool = False


@dataclass(slots=True)
class _Caller:
    session: _Session | None = None
    wish: EngineCall | None = None
    open: _Open | None = None
    retry_at: int = 0


class Callers:
    """The callers of a soak. `act` before each step, `see` after it.

    Args:
        load: what they do.
        engine: theirs alone.
        steps: of that engine.
        deadline: the engine's time in so many seconds.
    """

    def __init__(self, load: SoakLoad, engine: Engine, steps: Steps, deadline: Callable[[float], float]) -> None:
        self.counts = Counts()
        self._load = load
        self._engine = engine
        self._steps = steps
        self._deadline = deadline
        self._shape = engine.info.shape
        self._rng = random.Random(load.seed)
        self._callers = [_Caller() for _ in range(load.sessions)]
        self._left_behind: list[_Session] = []
        self._numbers = count()
        self._num_steps = 0

    @property
    def num_waiting(self) -> int:
        """Callers that have a call which found no room."""
        return sum(caller.wish is not None and caller.open is None for caller in self._callers)

    def act(self) -> None:
        """Every caller without a running call makes its next one; who found no room lately waits for a while."""
        self._num_steps += 1
        for caller in self._callers:
            if caller.open is None and (self._num_steps >= caller.retry_at or not self._engine.has_work):
                self._call(caller)

    def see(self, events: Iterable[EngineEvent]) -> None:
        """Takes in what a step gave, and carries out what callers meant to do at this point.

        Raises:
            Exception: a call failed for a reason of the engine's.
        """
        by_call = {caller.open.call.call_id: caller for caller in self._callers if caller.open is not None}
        for event in events:
            caller = by_call[event.call_id]
            assert caller.open is not None
            match event:
                case ProgressEvent(_, done, _):
                    self.counts.tokens_read += max(0, done - caller.open.done_tokens)
                    caller.open.done_tokens = done
                case TokenEvent():
                    self.counts.tokens_generated += 1
                    caller.open.num_generated += 1
                case FinishedEvent():
                    self._finished(caller, event)
                case FailedEvent(_, error):
                    if not isinstance(error, DeadlineExceeded):
                        raise error
                    self.counts.expired += 1
                    caller.open = None
        for caller in self._callers:
            if caller.open is not None and caller.open.whim is not None and _is_due(caller.open):
                self._change_mind(caller, caller.open.whim.end)

    def stop_reading(self) -> None:
        """Cancels what hasn't begun to answer, so that the rest ends soon."""
        for caller in self._callers:
            caller.wish = None
            if caller.open is not None and caller.open.num_generated == 0:
                caller.open.is_drained = True
                self._change_mind(caller, _End.CANCEL)

    def release_all(self) -> None:
        """Releases every session there is."""
        sessions = [caller.session for caller in self._callers if caller.session is not None]
        for session in [*sessions, *self._left_behind]:
            self._engine.release(session.session_id)
        self._left_behind.clear()

    # -- calls -------------------------------------------------------------------------------------------------------

    def _call(self, caller: _Caller) -> None:
        if caller.wish is None:
            caller.wish = self._next_call(caller)
        call = caller.wish
        try:
            self._steps.submit(call)
        except Overloaded:
            self.counts.refused += 1
            caller.retry_at = self._num_steps + self._rng.randint(*RETRY_STEPS)
            return
        except BudgetTooSmall:
            self.counts.too_large += 1
            caller.wish = None
            self._leave(caller, for_good=True)
            return
        caller.wish = None
        caller.open = _Open(call, self._whim(call))
        if caller.open.whim is not None and _is_due(caller.open):
            self._change_mind(caller, caller.open.whim.end)

    def _next_call(self, caller: _Caller) -> EngineCall:
        rng = self._rng
        if caller.session is not None and caller.session.turns == 0:
            self._leave(caller, for_good=rng.random() >= LEFT_BEHIND)
        if caller.session is None and rng.random() < ONE_OFFS:
            return self._one_off()
        session = caller.session = caller.session or self._new_session()
        session.turns -= 1
        if not session.document and len(session.tokens) > 1 and rng.random() < SHORTENED:
            session.tokens = session.tokens[: rng.randint(1, len(session.tokens) - 1)]
        asks = not session.document or rng.random() < 0.5
        sampling = self._sampling() if asks else None
        new_tokens = sampling.max_new_tokens if sampling else 0
        question = self._random_ids(rng.randint(*QUESTION_TOKENS)) if asks else ()
        room = self._shape.max_positions - len(session.tokens) - len(question) - new_tokens
        if room < len(session.document):
            # The session has grown as long as the model allows: it starts over.
            session.document, session.tokens = session.document[: max(1, room)], ()
        document, session.document = session.document, ()
        return EngineCall(
            call_id=CallId(f"call-{next(self._numbers)}"),
            session_id=session.session_id,
            recipe=session.recipe,
            base_tokens=session.tokens,
            document_tokens=document,
            prompt_tokens=question,
            sampling=sampling,
            keep_partial=rng.random() < 0.5,
            tenant_tag=session.tag,
            priority=rng.choices((0, 1, 5), weights=(7, 2, 1))[0],
            deadline=self._deadline(rng.uniform(0.01, 10.0)) if rng.random() < DEADLINES else None,
        )

    def _one_off(self) -> EngineCall:
        rng, number = self._rng, next(self._numbers)
        return EngineCall(
            call_id=CallId(f"call-{number}"),
            session_id=SessionId(f"one-off-{number}"),
            recipe=rng.choice(self._load.recipes),
            base_tokens=(),
            document_tokens=self._new_document(),
            prompt_tokens=self._random_ids(rng.randint(*QUESTION_TOKENS)),
            sampling=self._sampling(),
            retain=False,
            tenant_tag=rng.choice(TENANT_TAGS),
        )

    def _sampling(self) -> SamplingParams:
        rng = self._rng
        sampling = SamplingParams(
            max_new_tokens=rng.randint(*NEW_TOKENS),
            n=rng.choices((1, 2, 3), weights=(80, 15, 5))[0],
            seed=rng.getrandbits(32),
            stop=rng.choices(((), (" the", "e")), weights=(9, 1))[0],
            ignore_eos=rng.random() < 0.8,
            logprobs=rng.choices((None, 0, 5), weights=(8, 1, 1))[0],
        )
        if rng.random() < 0.4:
            return sampling
        return replace(
            sampling,
            temperature=rng.uniform(0.2, 1.2),
            top_k=rng.choice((0, 0, 20)),
            top_p=rng.choice((1.0, 0.9)),
            min_p=rng.choice((0.0, 0.0, 0.05)),
            typical_p=rng.choice((1.0, 1.0, 0.95)),
            repetition_penalty=rng.choice((1.0, 1.0, 1.1)),
            frequency_penalty=rng.choice((0.0, 0.0, 0.3)),
            presence_penalty=rng.choice((0.0, 0.0, 0.3)),
            logit_bias=rng.choices(((), ((5, -4.0), (7, 1.5))), weights=(9, 1))[0],
        )

    # -- sessions ----------------------------------------------------------------------------------------------------

    def _new_session(self) -> _Session:
        rng = self._rng
        self.counts.sessions += 1
        name = SessionId(f"session-{next(self._numbers)}")
        turns = rng.randint(*TURNS)
        longest = max(MIN_SHARED_TOKENS, self._load.document_tokens[1])
        others = [other for other in self._known() if len(other.tokens) >= MIN_SHARED_TOKENS]
        draw = rng.random()
        if others and draw < FORKS:
            other = rng.choice(others)
            # The last token of an answer has no KV yet.
            length = rng.randint(1, len(other.tokens) - 1)
            if self._forked(other, name, length):
                return _Session(name, other.recipe, other.tag, other.tokens[:length], (), turns)
        if others and draw < FORKS + SHARED_DOCUMENTS:
            other = rng.choice(others)
            shared = other.tokens[: rng.randint(MIN_SHARED_TOKENS, min(len(other.tokens), longest))]
            own = self._random_ids(rng.randint(1, self._load.document_tokens[0]))
            return _Session(name, other.recipe, other.tag, (), (*shared, *own), turns)
        recipe, tag = rng.choice(self._load.recipes), rng.choice(TENANT_TAGS)
        return _Session(name, recipe, tag, (), self._new_document(), turns)

    def _forked(self, other: _Session, name: SessionId, num_tokens: int) -> bool:
        try:
            self._engine.fork(other.session_id, name, num_tokens)
        except (NotFound, Overloaded):
            # It is away at the moment, holds less than its caller knows, or there is no room.
            return False
        self.counts.forks += 1
        return True

    def _known(self) -> Sequence[_Session]:
        return [*(caller.session for caller in self._callers if caller.session is not None), *self._left_behind]

    def _leave(self, caller: _Caller, *, for_good: bool) -> None:
        session, caller.session = caller.session, None
        if session is None:
            return
        if for_good:
            self._engine.release(session.session_id)
            return
        self._left_behind.append(session)
        if len(self._left_behind) > self._load.sessions // 2:
            gone = self._left_behind.pop(self._rng.randrange(len(self._left_behind)))
            self._engine.release(gone.session_id)

    def _new_document(self) -> tuple[int, ...]:
        return self._random_ids(self._rng.randint(*self._load.document_tokens))

    def _random_ids(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(random_ids(self._rng, num_tokens, self._shape.vocab_size))

    # -- ends --------------------------------------------------------------------------------------------------------

    def _whim(self, call: EngineCall) -> _Whim | None:
        rng, draw = self._rng, self._rng.random()
        if draw >= CANCELS + RELEASES:
            return None
        end = _End.CANCEL if draw < CANCELS else _End.RELEASE
        if call.sampling is None or rng.random() < 0.5:
            # At once, before anything was computed, now and then.
            return _Whim(end, read_fraction=rng.choice((0.0, rng.random(), rng.random())))
        return _Whim(end, num_tokens=rng.randint(1, call.sampling.max_new_tokens))

    def _change_mind(self, caller: _Caller, end: _End) -> None:
        opened = caller.open
        assert opened is not None
        opened.whim = None
        if end is _End.RELEASE:
            opened.is_released = True
            self._engine.release(opened.call.session_id)
        else:
            self._engine.cancel(opened.call.call_id)

    def _finished(self, caller: _Caller, event: FinishedEvent) -> None:
        opened, session = caller.open, caller.session
        assert opened is not None
        caller.open = None
        self.counts.tokens_reused += event.usage.reused_tokens
        self.counts.tokens_recomputed += event.usage.recomputed_tokens
        if event.finish_reason is not FinishReason.CANCELLED:
            self.counts.finished += 1
        elif opened.is_drained:
            self.counts.cancelled_at_end += 1
        elif opened.num_generated:
            self.counts.cancelled_answering += 1
        elif opened.done_tokens:
            self.counts.cancelled_reading += 1
        else:
            self.counts.cancelled_waiting += 1
        if session is None:
            return
        session.tokens = (*opened.call.base_tokens, *event.appended_tokens)
        if opened.is_released:
            self.counts.released_busy += 1
            caller.session = None
        elif not session.tokens:
            # Nothing came of its first call: there is no session to go on with.
            session.turns = 0


def _is_due(opened: _Open) -> bool:
    whim = opened.whim
    assert whim is not None
    if whim.read_fraction is None:
        return opened.num_generated >= whim.num_tokens
    total = len(opened.call.document_tokens) + len(opened.call.prompt_tokens)
    return opened.done_tokens >= whim.read_fraction * total
