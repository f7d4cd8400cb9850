"""How much slower sessions decode while another one prefills: alone, offloading, writing behind. Prints nothing.

The cases take turns, round by round, so that whatever else changes on the machine changes for all of them; ratios are
made within a round. `dense` is the control: its prefill computes the same, and offloads nothing.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from kvservice.bench.load import random_ids
from kvservice.config.recipes import DENSE
from kvservice.engine import Engine
from kvservice.errors import ConfigError, InternalError
from kvservice.types import (
    CallId,
    EngineCall,
    EngineEvent,
    FailedEvent,
    FinishedEvent,
    ProgressEvent,
    RecipeSpec,
    SamplingParams,
    SessionId,
    TokenEvent,
    footprint,
)

Clock = Callable[[], float]

PROMPT_TOKENS = 16
ALONE_STEPS = 128
WARM_UP_TOKENS = 512
BESIDE_STEPS = 512
"""A turn with prefill ends after so many steps, or when the document is read."""

WRITE_TIMEOUT_S = 60.0

_TAG = b"interference run"


class Case(Enum):
    """What else the engine does while sessions decode."""

    ALONE = "alone"
    OFFLOAD = "prefill, offloaded to host memory"
    WRITE_BEHIND = "prefill, offloaded and written to Redis"
    CONTROL = "prefill of a dense session"


@dataclass(frozen=True, slots=True)
class InterferenceLoad:
    """What is measured.

    Attributes:
        decoding: sessions that decode.
        document_tokens: of each of them.
        prefill_tokens: of the other session's document.
        recipe: of all sessions but the control's.
        rounds: how often each case has its turn.
        seed: of random token ids.
    """

    decoding: int
    document_tokens: int
    prefill_tokens: int
    recipe: RecipeSpec
    rounds: int
    seed: int


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of times between two tokens of a session, or of their ratios."""

    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class CaseFigures:
    """One case, all rounds together.

    Attributes:
        interval_ms: time between two tokens of a session.
        to_alone: median over the rounds of the ratio to the round's ALONE; None for that itself.
        to_control: as well, to the round's CONTROL; None for ALONE and CONTROL.
        prefill_tokens_per_s: what the other session got; None if there was none.
        written_frames: frames that reached Redis, or were on their way at the end of a turn.
        intervals_s: all of them.
    """

    case: Case
    num_intervals: int
    interval_ms: Percentiles
    to_alone: Percentiles | None
    to_control: Percentiles | None
    prefill_tokens_per_s: float | None
    written_frames: int
    intervals_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Turn:
    intervals_s: tuple[float, ...]
    prefill_tokens: int
    prefill_s: float
    written_frames: int


def measure_interference(
    engine: Engine,
    load: InterferenceLoad,
    cases: Sequence[Case],
    report: Callable[[], None],
    clock: Clock = time.perf_counter,
) -> tuple[CaseFigures, ...]:
    """Lets the cases take turns. Blocks. Leaves the engine empty.

    Args:
        engine: idle and without sessions; for `WRITE_BEHIND` with a writer to a tier.
        load: what is measured.
        cases: in the order of their turns; `ALONE` is one of them.
        report: called after each turn.
        clock: seconds.

    Raises:
        ConfigError: the load doesn't fit the budgets or the model.
        InternalError: the tier didn't take the frames in time.
    """
    _check_fits(engine, load)
    rng = random.Random(load.seed)
    bench = _Bench(engine, load, rng, clock)
    bench.read_documents()
    bench.warm_up()
    turns: dict[Case, list[_Turn]] = {case: [] for case in cases}
    for _ in range(load.rounds):
        for case in cases:
            turns[case].append(bench.take_turn(case))
            report()
    bench.release_documents()
    return tuple(_figures(case, turns) for case in cases)


class _Bench:
    def __init__(self, engine: Engine, load: InterferenceLoad, rng: random.Random, clock: Clock) -> None:
        self._engine = engine
        self._load = load
        self._rng = rng
        self._clock = clock
        self._documents = {
            SessionId(f"decoding-{number}"): self._random_ids(load.document_tokens) for number in range(load.decoding)
        }
        self._prompts = {name: self._random_ids(PROMPT_TOKENS) for name in self._documents}
        self._last: dict[CallId, float] = {}

    def read_documents(self) -> None:
        for name, document in self._documents.items():
            self._engine.submit(EngineCall(CallId(f"read {name}"), name, self._load.recipe, (), document))
        self._step_until_idle()

    def release_documents(self) -> None:
        for name in self._documents:
            self._engine.release(name)
        self._step_until_idle()

    def warm_up(self) -> None:
        """The engine learns what its steps cost, alone and with prefill."""
        self._decode(8, None)
        tokens = self._random_ids(min(WARM_UP_TOKENS, self._load.prefill_tokens))
        self._decode(BESIDE_STEPS, EngineCall(CallId("prefill"), SessionId("warm-up"), self._load.recipe, (), tokens))
        self._engine.release(SessionId("warm-up"))

    def take_turn(self, case: Case) -> _Turn:
        if case is Case.ALONE:
            return self._decode(ALONE_STEPS, None)
        name = SessionId("prefilling")
        call = EngineCall(
            call_id=CallId("prefill"),
            session_id=name,
            recipe=DENSE if case is Case.CONTROL else self._load.recipe,
            base_tokens=(),
            document_tokens=self._random_ids(self._load.prefill_tokens),
            # Nothing of a session without a tenant is written to the tier.
            tenant_tag=_TAG if case is Case.WRITE_BEHIND else b"",
        )
        turn = self._decode(BESIDE_STEPS, call)
        # The next turn must not find the writer still at work.
        self._await_writes()
        self._engine.release(name, call.tenant_tag, purge=case is Case.WRITE_BEHIND)
        return turn

    def _decode(self, num_steps: int, prefill: EngineCall | None) -> _Turn:
        """Intervals of so many steps, or of those until the other session's document is read, if that comes first."""
        calls = self._begin_answers()
        written = self._num_frames()
        intervals: list[float] = []
        done_tokens, started, steps = 0, self._clock(), 0
        if prefill is not None:
            self._engine.submit(prefill)
        while calls:
            events = self._step()
            now = self._clock()
            steps += 1
            for event in events:
                match event:
                    case TokenEvent(call_id):
                        intervals.append(now - self._last[call_id])
                        self._last[call_id] = now
                    case ProgressEvent(_, done, _):
                        done_tokens = done
                    case FinishedEvent(call_id):
                        calls.discard(call_id)
                    case _:
                        pass
            if steps == num_steps or (prefill is not None and _has_finished(prefill.call_id, events)):
                break
        seconds = self._clock() - started
        for call_id in [*calls, *([prefill.call_id] if prefill else ())]:
            self._engine.cancel(call_id)
        self._step_until_idle()
        return _Turn(tuple(intervals), done_tokens, seconds, self._num_frames() - written)

    def _num_frames(self) -> int:
        tier = self._engine.stats().tier
        return tier.written_frames + tier.pending_frames

    def _begin_answers(self) -> set[CallId]:
        """All sessions decode from where they are after their documents; what an earlier turn generated is dropped."""
        sampling = SamplingParams(max_new_tokens=_new_tokens(self._load), ignore_eos=True)
        calls = set()
        for name, document in self._documents.items():
            call_id = CallId(f"answer {name}")
            self._engine.submit(
                EngineCall(
                    call_id,
                    name,
                    self._load.recipe,
                    document,
                    prompt_tokens=self._prompts[name],
                    sampling=sampling,
                )
            )
            calls.add(call_id)
        self._last = {}
        while len(self._last) < len(calls):
            events = self._step()
            self._last |= {event.call_id: self._clock() for event in events if isinstance(event, TokenEvent)}
        return calls

    def _await_writes(self) -> None:
        give_up = time.monotonic() + WRITE_TIMEOUT_S
        while self._engine.stats().tier.pending_frames:
            if time.monotonic() > give_up:
                raise InternalError(f"the tier didn't take all frames within {WRITE_TIMEOUT_S:.0f} s")
            time.sleep(0.01)

    def _step_until_idle(self) -> None:
        while self._engine.has_work:
            self._step()

    def _step(self) -> list[EngineEvent]:
        events = self._engine.step()
        for event in events:
            if isinstance(event, FailedEvent):
                raise event.error
        return events

    def _random_ids(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(random_ids(self._rng, num_tokens, self._engine.info.shape.vocab_size))


def _has_finished(call_id: CallId, events: Sequence[EngineEvent]) -> bool:
    return any(isinstance(event, FinishedEvent) and event.call_id == call_id for event in events)


def _new_tokens(load: InterferenceLoad) -> int:
    """Enough for a whole turn; the answers begin one after the other."""
    return max(ALONE_STEPS, BESIDE_STEPS) + 8 * load.decoding + 64


def _check_fits(engine: Engine, load: InterferenceLoad) -> None:
    shape, headroom = engine.info.shape, engine.headroom()
    longest = load.document_tokens + PROMPT_TOKENS + _new_tokens(load)
    if max(longest, load.prefill_tokens) > shape.max_positions:
        raise ConfigError(
            f"sessions of {longest:,} tokens and one of {load.prefill_tokens:,}: the model has "
            f"{shape.max_positions:,} positions; lower --doc-tokens or --prefill-tokens"
        )
    decoding = footprint(shape, load.recipe, longest)
    others = [footprint(shape, recipe, load.prefill_tokens) for recipe in (load.recipe, DENSE)]
    for option, needed, capacity in (
        (
            "--kv-bytes",
            load.decoding * decoding.device_bytes + max(other.device_bytes for other in others),
            headroom.device_capacity_bytes,
        ),
        (
            "--host-bytes",
            load.decoding * decoding.host_bytes + max(other.host_bytes for other in others),
            headroom.host_capacity_bytes,
        ),
    ):
        if needed > capacity:
            raise ConfigError(f"the load takes {needed:,} bytes, the budget leaves {capacity:,}: raise {option}")


def _figures(case: Case, turns: dict[Case, list[_Turn]]) -> CaseFigures:
    mine = turns[case]
    intervals = tuple(interval for turn in mine for interval in turn.intervals_s)
    seconds = sum(turn.prefill_s for turn in mine)
    return CaseFigures(
        case=case,
        num_intervals=len(intervals),
        interval_ms=_percentiles([interval * 1e3 for interval in intervals]),
        to_alone=_ratio(mine, turns[Case.ALONE]) if case is not Case.ALONE else None,
        to_control=(
            _ratio(mine, turns[Case.CONTROL])
            if case not in (Case.ALONE, Case.CONTROL) and Case.CONTROL in turns
            else None
        ),
        prefill_tokens_per_s=(
            sum(turn.prefill_tokens for turn in mine) / seconds if case is not Case.ALONE and seconds else None
        ),
        written_frames=sum(turn.written_frames for turn in mine),
        intervals_s=intervals,
    )


def _ratio(turns: Sequence[_Turn], others: Sequence[_Turn]) -> Percentiles:
    pairs = [
        (_percentiles(turn.intervals_s), _percentiles(other.intervals_s))
        for turn, other in zip(turns, others, strict=True)
    ]
    return Percentiles(
        p50=statistics.median(mine.p50 / other.p50 for mine, other in pairs),
        p90=statistics.median(mine.p90 / other.p90 for mine, other in pairs),
        p99=statistics.median(mine.p99 / other.p99 for mine, other in pairs),
        max=statistics.median(mine.max / other.max for mine, other in pairs),
    )


def _percentiles(values: Sequence[float]) -> Percentiles:
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return Percentiles(float(p50), float(p90), float(p99), max(values))
