"""KV that comes from the tier below while its call waits, or doesn't come."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from kvservice.config.engine import EngineConfig
from kvservice.config.recipes import DENSE, EXACT, RECALL
from kvservice.engine import Engine, arrivals
from kvservice.engine.ports import NoWriter
from kvservice.models.tiny import tiny_model
from kvservice.types import (
    CallId,
    EngineCall,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    Reached,
    RestoredWindow,
    SamplingParams,
    SessionId,
)
from tests.unit.engine.test_engine import append, generate, run, tokens

RECIPES = [DENSE, EXACT, RECALL]
TAG = b"t" * 16
DOCUMENT, QUESTION, NEXT = tokens(705), tokens(12, seed=3), tokens(9, seed=4)


class Keeper(NoWriter):
    """A tier that keeps the last of each."""

    stores = True

    def __init__(self) -> None:
        self.groups: dict[int, torch.Tensor] = {}
        self.window: tuple[int, int, torch.Tensor] | None = None

    def write(self, tenant_tag, session_id, recipe, first_group, token_ids, groups):
        assert len(token_ids) == 16 + 64 * (first_group + len(groups))
        self.groups.update(enumerate(groups, first_group))

    def takes_window(self, num_tokens):
        return True

    def write_window(self, tenant_tag, session_id, recipe, start, token_ids, pairs):
        assert pairs.shape[2] == 16 + len(token_ids) - start
        self.window = (start, len(token_ids), pairs)


class Coming:
    """A `RestoredKv` by hand."""

    def __init__(self, keeper: Keeper, reached: Reached) -> None:
        self.reached = reached
        self.groups = torch.stack([keeper.groups[index] for index in range(len(keeper.groups))])
        self.memory = self.groups.view(torch.uint8).numpy().data.cast("B")
        start, stop, pairs = keeper.window
        self.whole = RestoredWindow(start, stop, pairs.contiguous().view(torch.uint8).numpy().data.cast("B"))
        self.window = None
        self.awaits_window = True
        self.num_arrived = 0
        self.is_done = False
        self.is_given_up = False
        self.waits = 0

    @property
    def num_groups(self) -> int:
        return self.num_arrived if self.is_done else len(self.groups)

    @property
    def num_tokens(self) -> int:
        groups = 16 + 64 * self.num_groups
        has_window = self.window is not None or self.awaits_window
        return self.whole.stop if has_window and self.whole.start == groups else groups

    def come(self, *, window: bool = True, groups: int | None = None, is_done: bool = True) -> Coming:
        self.window, self.awaits_window = (self.whole if window else None), False
        self.num_arrived = len(self.groups) if groups is None else groups
        self.is_done = is_done
        return self

    def wait(self, timeout_s: float) -> None:
        self.waits += 1

    def give_up(self) -> None:
        self.is_given_up = True


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=0)


def engine_of(model, writer):
    return Engine(model, EngineConfig(kv_bytes=64 << 20, host_bytes=64 << 20, step_tokens=128), writer)


class Story:
    """A session that was asked once, what a tier has of it then, and what it answers when it is asked again."""

    def __init__(self, model, recipe) -> None:
        self.recipe = recipe
        keeper = Keeper()
        engine = engine_of(model, keeper)
        append(engine, "s", recipe, DOCUMENT, tenant_tag=TAG)
        first = generate(engine, "s", recipe, DOCUMENT, QUESTION, tenant_tag=TAG)
        self.base = (*DOCUMENT, *first.appended_tokens)
        self._kept = Keeper()
        self._kept.groups, self._kept.window = dict(keeper.groups), keeper.window
        self._reached = first.reached
        self.answer = generate(engine, "s", recipe, self.base, NEXT, tenant_tag=TAG)

    def coming(self) -> Coming:
        """What the tier had before the second question; nothing of it has come yet."""
        return Coming(self._kept, self._reached)

    def ask(self, engine, coming, **more):
        return generate(engine, "s", self.recipe, self.base, NEXT, tenant_tag=TAG, restored=coming, **more)


@pytest.fixture(scope="module")
def story_of(model):
    return functools.cache(lambda recipe: Story(model, recipe))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_nothing_is_computed_again_of_what_came_whole(model, story_of, recipe):
    story = story_of(recipe)
    whole = story.coming().whole
    assert (whole.start, whole.stop) == (16 + 64 * len(story.coming().groups), len(story.base) - 1)
    engine = engine_of(model, NoWriter())
    answer = story.ask(engine, story.coming().come())
    assert answer.appended_tokens == story.answer.appended_tokens
    assert answer.reached == story.answer.reached
    assert answer.usage.recomputed_tokens == 0
    assert engine.telemetry(SessionId("s")).host_bytes == story.answer.telemetry.host_bytes
    engine.check()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize(("window", "groups"), [(False, None), (True, 3), (False, 3), (True, 0), (False, 0)])
def test_what_did_not_come_is_computed_behind_what_did(model, story_of, recipe, window, groups):
    story = story_of(recipe)
    engine = engine_of(model, NoWriter())
    answer = story.ask(engine, story.coming().come(window=window, groups=groups))
    assert answer.appended_tokens == story.answer.appended_tokens
    came = len(story.coming().groups) if groups is None else groups
    sinks = 16 if window and groups else 0
    sinks = 16 if window and came else 0
    assert answer.usage.recomputed_tokens == len(story.base) - 1 - 64 * came - sinks
    engine.check()


def test_a_call_waits_for_its_kv_and_others_go_on(model, story_of):
    story = story_of(RECALL)
    engine, coming = engine_of(model, NoWriter()), story.coming()
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    call = EngineCall(
        CallId("c"), SessionId("s"), RECALL, story.base, (), NEXT, sampling, tenant_tag=TAG, restored=coming
    )
    engine.submit(call)
    assert engine.step() == []
    assert coming.waits == 1
    append(engine, "other", RECALL, tokens(100))
    for groups in range(len(coming.groups)):
        coming.come(groups=groups, is_done=False)
        assert engine.step() == []
        engine.check()
        # What is distant however many come has its place already.
        assert engine._sequences.get(SessionId("s")).num_adopted == max(0, groups - 4)
    coming.come()
    assert run(engine, "c")[-1].appended_tokens == story.answer.appended_tokens


def test_a_call_that_is_cancelled_wants_no_more(model, story_of):
    story = story_of(RECALL)
    engine, coming = engine_of(model, NoWriter()), story.coming()
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    call = EngineCall(
        CallId("c"), SessionId("s"), RECALL, story.base, (), NEXT, sampling, tenant_tag=TAG, restored=coming
    )
    engine.submit(call)
    coming.come(groups=2, is_done=False)
    engine.step()
    engine.cancel(CallId("c"))
    (ended,) = [event for event in engine.step() if isinstance(event, FinishedEvent | FailedEvent)]
    assert ended.finish_reason is FinishReason.CANCELLED
    assert coming.is_given_up
    engine.check()
    # What had come stays, and is gone on from.
    again = generate(engine, "s", RECALL, story.base, NEXT, tenant_tag=TAG)
    assert again.appended_tokens == story.answer.appended_tokens


def test_what_comes_at_once_is_taken_little_by_little_where_others_compute(model, story_of, monkeypatch):
    monkeypatch.setattr(arrivals, "GROUPS_BESIDE_OTHERS", 5)
    story = story_of(RECALL)
    engine, coming = engine_of(model, NoWriter()), story.coming().come()
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    other = EngineCall(CallId("o"), SessionId("other"), RECALL, (), (), tokens(30), sampling)
    engine.submit(other)
    engine.step()
    engine.submit(replace(other, call_id=CallId("c"), session_id=SessionId("s"), base_tokens=story.base,
                          prompt_tokens=NEXT, tenant_tag=TAG, restored=coming))  # fmt: skip
    taken = []
    while (memory := engine._sequences.get(SessionId("s"))).num_computed < len(story.base) - 1:
        assert any(event.call_id == "o" for event in engine.step())
        engine.check()
        taken.append(memory.num_adopted)
    assert taken[:2] == [1, 2]
    ended = {event.call_id: event for event in run(engine, "o", "c") if isinstance(event, FinishedEvent)}
    assert ended["c"].appended_tokens[: len(story.answer.appended_tokens)] == story.answer.appended_tokens
