"""Anything may happen to an engine in any order, and every answer is that of its session alone, bit for bit.

Sessions of two tenants read, ask, are forked, truncated, cancelled, stopped and released on an engine in which three
of them hardly fit. After every rule the engine's books must balance. Whatever an answer came through (preemption,
recompute, chunking, shared prefixes), its tokens and log-probabilities are those of a fresh engine with plenty of room,
which is given nothing but the tokens and how far each one saw. Without a distant tier to choose from, they are also
those of a plain forward over the whole text.

A few examples run in CI. The long form, some minutes:

    HYPOTHESIS_PROFILE=dev pytest tests/property/test_engine.py
"""

import os
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvservice.config.recipes import CLUSTERKV, DENSE, EXACT, RECALL
from kvservice.errors import BudgetTooSmall, Conflict, NotFound, Overloaded
from kvservice.models.tiny import tiny_model
from kvservice.recall.reach import Reach
from kvservice.types import Distant, FinishReason, SamplingParams, SessionId
from tests.unit.engine.driving import Drive, device_bytes, group_bytes, make_engine, tokens
from tests.unit.engine.reference_model import ReferenceSequence

IS_SHORT = os.environ.get("HYPOTHESIS_PROFILE", "ci") == "ci"
FP32_LOGITS = 1e-3
# With small windows, short documents have distant tokens too.
RECIPES = {
    "dense": DENSE,
    "exact": replace(EXACT, window_tokens=64),
    "recall": replace(RECALL, window_tokens=64, recalled_tokens=32),
    "clusterkv": replace(CLUSTERKV, window_tokens=64, recalled_tokens=32),
}
TENANTS = {"a": b"one", "b": b"one", "c": b"one", "d": b"one", "e": b"two"}
DOCUMENTS = [tokens(300, seed) for seed in range(2)]
LENGTHS = st.sampled_from([230, 150, 80, 208, 144, 143, 64, 17, 1])
MODEL = tiny_model(seed=0, num_layers=1, row_block=32)


@pytest.fixture(autouse=True, scope="module")
def small_steps():
    """Short answers outgrow their first bytes too."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kvservice.engine.room.GROWTH_TOKENS", 16)
        yield


class LateMove(Future):
    """Is done when the mover says so, or when somebody insists."""

    def __init__(self, move):
        super().__init__()
        self.move = move

    def exception(self, timeout=None):
        self.arrive()
        return super().exception()

    def arrive(self):
        if not self.done():
            self.set_result(self.move())


class LateMover:
    """Moves what is swapped one after the other, when it is told to: a thread would make no two runs alike."""

    def __init__(self, swap):
        self.moves = deque()
        swap.close()
        swap._mover, swap.wait = self, self.arrive

    def submit(self, move, *args, **more):
        self.moves.append(LateMove(lambda: move(*args, **more)))
        return self.moves[-1]

    def arrive(self, _timeout_s=0):
        while self.moves and self.moves[0].done():
            self.moves.popleft()
        if not self.moves:
            return False
        self.moves.popleft().arrive()
        return True

    def shutdown(self):
        while self.arrive():
            pass


class Expected:
    """What an answer must be, from the state that its sequence began with."""

    def __init__(self, sequence):
        memory = sequence.memory
        self.recipe, self.call = memory.recipe, sequence.call
        self.tokens, self.kept = list(sequence.tokens), sequence.kept
        self.full_until = max(sequence.full_until, self.kept)
        self.runs = []
        start = 0
        while start < self.kept:
            reach, stop = memory.reaches.at(start)
            stop = min(stop, self.kept)
            self.runs.append((reach, self.tokens[start:stop]))
            start = stop

    def answers(self):
        """Tokens and log-probabilities by index."""
        drive = Drive(make_engine(MODEL, step_tokens=256))
        base = ()
        for reach, run in self.runs:
            if reach is Reach.FULL:
                base += drive.ask("s", self.recipe, base=base, document=tuple(run)).appended_tokens
            else:
                drive.engine.score(SessionId("s"), run)
                base += tuple(run)
        document = tuple(self.tokens[self.kept : self.full_until])
        prompt = tuple(self.tokens[max(self.full_until, self.kept) :])
        recipe = self.call.recipe
        finished = drive.ask("s", recipe, base=base, document=document, prompt=prompt, sampling=self.call.sampling)
        assert finished.usage.recomputed_tokens == 0
        drive.engine.close()
        return {index: answer for (_, index), answer in drive.answers.items()}

    def check_greedy(self, answer):
        """Compares with a forward of all tokens at once."""
        reference = ReferenceSequence(MODEL, self.recipe)
        logits = reference.read([*self.tokens, *answer], selects=False)[len(self.tokens) - 1 : -1]
        for row, token in zip(logits, answer, strict=True):
            assert row[token] >= row.max() - FP32_LOGITS


class Serving(RuleBasedStateMachine):
    """One engine, its sessions as their service would know them, and the calls under way."""

    @initialize(
        room=st.sampled_from([24, 30, 38, 50]).map(lambda columns: columns * 16),
        host_groups=st.sampled_from([6, 12, 24, 400]),
        max_prefills=st.integers(1, 3),
        usual=st.sampled_from(sorted(RECIPES)),
        steps_a_move=st.sampled_from([1, 4]),
    )
    def start(self, room, host_groups, max_prefills, usual, steps_a_move):
        self.usual, self.steps_a_move = usual, steps_a_move
        ticks = count()
        self.engine = make_engine(
            MODEL,
            room=device_bytes(MODEL, room),
            host_bytes=group_bytes(MODEL, host_groups),
            step_tokens=64,
            max_prefills=max_prefills,
            max_batch=8,
            clock=lambda: next(ticks) / 1000,
        )
        self.drive = Drive(self.engine)
        self.mover = LateMover(self.engine._sequences._store.swap)
        self.records = {}  # tokens and recipe of each session
        self.expected = {}  # by call
        self.stopped = set()
        self.cancelled = set()
        self.numbers = count()

    # -- calls -------------------------------------------------------------------------------------------------------

    @rule(sessions=st.lists(st.sampled_from(sorted(TENANTS)), min_size=1, max_size=4, unique=True), data=st.data())
    def submit(self, sessions, data):
        for session in sessions:
            if self.has_heard(session):
                self.submit_one(session, data)

    def has_heard(self, session):
        """Whether the service of a session knows of the end of its last call."""
        return all(call in self.engine._calls.running for call in self.expected if call.startswith(session))

    def submit_one(self, session, data):
        record, recipe = self.records.get(session, ((), None))
        if recipe is None:
            recipe = RECIPES[data.draw(st.sampled_from([*3 * [self.usual], *sorted(RECIPES)]), "recipe")]
        document = DOCUMENTS[data.draw(st.sampled_from([0, 0, 0, 1]), "document")][: data.draw(LENGTHS, "length")]
        if record and data.draw(st.booleans(), "truncates"):
            record = record[: data.draw(st.integers(1, len(record)), "base")]
        if record and data.draw(st.booleans(), "asks only"):
            document = ()
        sampling, prompt = None, ()
        if not document or data.draw(st.integers(0, 3), "asks"):
            prompt = tokens(
                data.draw(st.sampled_from([1, 9, 30]), "prompt"), seed=data.draw(st.integers(0, 3), "which")
            )
            sampling = SamplingParams(
                max_new_tokens=data.draw(st.sampled_from([40, 1, 17, 70]), "new"),
                temperature=data.draw(st.sampled_from([0.0, 0.9]), "temperature"),
                seed=data.draw(st.integers(0, 3), "seed"),
                n=data.draw(st.sampled_from([1, 1, 2, 3]), "n"),
                logprobs=1,
                ignore_eos=True,
            )
        call_recipe = recipe
        if recipe.distant is Distant.RECALL and data.draw(st.integers(0, 3), "exactly") == 0:
            call_recipe = RECIPES["exact"]
        before = self.engine.headroom()
        try:
            call = self.drive.submit(
                session,
                call_recipe if session in self.records else recipe,
                base=record,
                document=document,
                prompt=prompt,
                call=f"{session}{next(self.numbers)}",
                sampling=sampling,
                tenant_tag=TENANTS[session],
                priority=data.draw(st.integers(0, 2), "priority"),
                keep_partial=data.draw(st.booleans(), "keeps part"),
            )
        except (Overloaded, BudgetTooSmall, Conflict) as error:
            note(f"refused: {error}")
            after = self.engine.headroom()
            assert after.resident_sessions == before.resident_sessions, "a refusal changes nothing"
            assert after.device_free_bytes >= before.device_free_bytes
            assert after.host_free_bytes >= before.host_free_bytes
            return
        self.records[session] = (record, recipe)
        self.expected[call] = Expected(self.engine._calls.running[call].main)

    def under_way(self):
        return sorted(self.engine._calls.running)

    @precondition(lambda self: self.engine.has_work)
    @rule(number=st.sampled_from([3, 1, 15, 50]))
    def steps(self, number):
        for _ in range(number):
            if self.engine.has_work:
                self.step()

    def step(self):
        if self.engine.stopwatch.steps % self.steps_a_move == 0:
            self.mover.arrive()
        self.drive.step()
        self.look_at_ended()

    @precondition(lambda self: self.engine._calls.running)
    @rule(data=st.data(), how=st.sampled_from(["cancel", "stop", "stop another", "release"]))
    def interrupt(self, data, how):
        call = data.draw(st.sampled_from(self.under_way()))
        running = self.engine._calls.running[call]
        index = int(how == "stop another")
        if how == "cancel":
            self.cancelled.add(call)
            self.engine.cancel(call)
        elif how == "release":
            self.cancelled.add(call)
            self.engine.release(running.call.session_id)
        elif index in running.sequences and running.sequences[index].generated:
            self.stopped.add((call, index))
            self.engine.stop(call, index)

    # -- sessions ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.records)
    @rule(data=st.data())
    def evict(self, data):
        session = data.draw(st.sampled_from(sorted(self.records)))
        if not self.engine._sequences.is_busy(SessionId(session)):
            self.engine.release(SessionId(session))

    @precondition(lambda self: self.records)
    @rule(data=st.data(), fork=st.sampled_from(sorted(TENANTS)), part=st.floats(0, 1))
    def fork(self, data, fork, part):
        session = data.draw(st.sampled_from(sorted(self.records)))
        memory = self.engine._sequences.get(SessionId(session))
        if memory is None or TENANTS[fork] != TENANTS[session] or not self.has_heard(fork):
            return
        length = max(1, int(part * memory.num_computed))
        held = tuple(memory.state.tokens[:length])
        before = self.engine.headroom()
        try:
            self.engine.fork(SessionId(session), SessionId(fork), length)
        except Overloaded:
            assert self.engine.headroom().device_capacity_bytes == before.device_capacity_bytes
        except (Conflict, NotFound):
            assert self.engine.headroom() == before, "a refusal changes nothing"
        else:
            self.records[fork] = (held, memory.recipe)

    # -- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def books_balance(self):
        self.engine.check()
        headroom = self.engine.headroom()
        assert headroom.running_calls == len(self.engine._calls.running)

    def look_at_ended(self):
        assert not self.drive.failed
        for call, finished in list(self.drive.finished.items()):
            del self.drive.finished[call]
            expected = self.expected.pop(call)
            session, sampling = str(call)[0], expected.call.sampling
            record, recipe = self.records[session]
            assert record == expected.call.base_tokens
            self.records[session] = (record + finished.appended_tokens, recipe)
            given = expected.call.document_tokens + expected.call.prompt_tokens
            answers = {i: self.drive.answers.pop((call, i), []) for i in range(sampling.n if sampling else 0)}
            first = tuple(token for token, _ in answers.get(0, []))
            keeps = finished.finish_reason is not FinishReason.CANCELLED or (expected.call.keep_partial and first)
            assert finished.appended_tokens == (given + first if keeps else ())
            assert (finished.finish_reason is FinishReason.CANCELLED) <= (call in self.cancelled)
            if not any(answers.values()):
                continue
            whole = expected.answers()
            for index, answer in answers.items():
                ended_early = call in self.cancelled or (call, index) in self.stopped
                assert answer == (whole[index][: len(answer)] if ended_early else whole[index])
            if recipe.distant is not Distant.RECALL and sampling.temperature == 0.0:
                expected.check_greedy(first)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for _ in range(3000):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work, "it is stuck"
        assert not self.expected
        for session in self.engine._sequences.ids():
            self.engine.release(session)
        self.engine.check()
        headroom = self.engine.headroom()
        assert headroom.device_free_bytes == headroom.device_capacity_bytes
        assert headroom.host_free_bytes == headroom.host_capacity_bytes
        self.engine.close()


TestServing = Serving.TestCase
TestServing.settings = settings(
    max_examples=12 if IS_SHORT else settings.default.max_examples, stateful_step_count=25 if IS_SHORT else 60
)
