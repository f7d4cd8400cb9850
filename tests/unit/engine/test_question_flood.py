"""A tenant that floods with short questions, which aren't paced, beside another that reads: planned, and not computed.

What a step takes is counted, so that nothing depends on a clock.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, field

import pytest

from kvservice.config.engine import EngineConfig
from kvservice.engine.meters import Meters
from kvservice.engine.planning import Passed, Planner
from kvservice.engine.scheduler import QUESTION_TOKENS, QUESTIONS_COST, share_questions
from kvservice.engine.turns import SELECT_READS, Turns
from kvservice.recall.parking import Place
from kvservice.recall.reach import Reach
from kvservice.types import TenantTerms

LAYERS = 30
DECODE_S = 0.025
TOKEN_LAYER_S = 3e-5
ANN, BOB = b"ann", b"bob"


@dataclass(eq=False)
class Reading:
    """As much of a sequence as the planner looks at."""

    tenant: bytes
    num_pending: int
    fare: object
    reach: Reach = Reach.FULL
    generated: tuple[int, ...] = ()
    memory: object = field(default_factory=lambda: types.SimpleNamespace(distant=types.SimpleNamespace(num_bytes=0)))

    def next_reach(self):
        return self.reach, self.num_pending


class Pass:
    """A chunk's way through the layers."""

    def __init__(self) -> None:
        self.next_layer = 0
        self.rows = [types.SimpleNamespace(memory=types.SimpleNamespace(place=Place.DEVICE), is_prepared=True)]

    @property
    def is_through(self) -> bool:
        return self.next_layer == LAYERS


def cost_of(item) -> int:
    """What a share takes, in tokens of a document; planning counts those that choose higher."""
    return item.num_tokens * (SELECT_READS if item.reach is Reach.SELECT else 1)


class Simulation:
    """Steps of a planner: one answer of somebody else goes on for ever, others read."""

    def __init__(self) -> None:
        meters = Meters()
        self.turns = Turns(meters)
        self.planner = Planner(EngineConfig(kv_bytes=1 << 30), LAYERS, self.turns, lambda: True)
        self.answering = Reading(b"eve", 1, None, Reach.SELECT, generated=(1,))
        self.reading: list[Reading] = []
        self.seconds = 0.0
        self.read_s = {ANN: 0.0, BOB: 0.0}

    def add(self, tenant: bytes, num_tokens: int, reach: Reach) -> Reading:
        call = types.SimpleNamespace(tenant_tag=tenant, terms=TenantTerms(), priority=0, sampling=None)
        fare = self.turns.join(call, num_tokens, num_tokens if reach is Reach.SELECT else 0)
        self.reading.append(Reading(tenant, num_tokens, fare, reach))
        return self.reading[-1]

    def step(self) -> None:
        self.reading.sort(key=lambda each: each.fare.turn.order)
        work = self.planner.plan([self.answering, *self.reading])
        done = [item for item in work.batch if not item.decodes]
        questions_s = LAYERS * TOKEN_LAYER_S * sum(cost_of(item) for item in done)
        passed = []
        if done:
            self._count(done, LAYERS)
        else:
            passed.append(Passed(types.SimpleNamespace(items=work.batch), LAYERS, DECODE_S))
        seconds = DECODE_S + questions_s
        for chunk, span in work.spans:
            chunk.passing = chunk.passing or Pass()
            layers = min(span or LAYERS, LAYERS - chunk.passing.next_layer)
            chunk.passing.next_layer += layers
            self._count(chunk.items, layers)
            took_s = TOKEN_LAYER_S * layers * sum(cost_of(item) for item in chunk.items)
            passed.append(Passed(chunk, layers, max(took_s, 1e-9)))
            seconds += took_s
            if chunk.is_through:
                chunk.passing.rows[0].is_prepared = False
                done += chunk.items
        self.planner.note(passed)
        self.seconds += seconds
        for item in done:
            self._finish(item)

    def _count(self, items, layers) -> None:
        for item in items:
            self.read_s[item.sequence.tenant] += TOKEN_LAYER_S * layers * cost_of(item)

    def _finish(self, item) -> None:
        sequence = item.sequence
        sequence.num_pending -= item.num_tokens
        if not sequence.num_pending:
            self.reading.remove(sequence)
            self.turns.leave(sequence.fare, num_unread=0, num_answered=0)

    def keep_asking(self, lengths: list[int], at_a_time: int, made: int = 0) -> int:
        """So many of Ann's questions always wait."""
        while sum(each.tenant == ANN for each in self.reading) < at_a_time:
            self.add(ANN, lengths[made % len(lengths)], Reach.SELECT)
            made += 1
        return made


FLOODS = pytest.mark.parametrize(
    ("lengths", "at_a_time"), [([7], 8), ([64], 12), ([60], 2), ([44, 24], 4), ([30, 5], 12), ([1, 64, 3], 5)], ids=str
)


@FLOODS
def test_a_document_gets_as_much_as_the_questions_that_pass_it_by(lengths, at_a_time) -> None:
    simulation = Simulation()
    made = simulation.keep_asking(lengths, at_a_time)
    for _ in range(20):
        simulation.step()
        made = simulation.keep_asking(lengths, at_a_time, made)
    document = simulation.add(BOB, 2000, Reach.FULL)
    before = simulation.read_s[ANN]
    for _ in range(2000):
        simulation.step()
        made = simulation.keep_asking(lengths, at_a_time, made)
        if document not in simulation.reading:
            break
    assert document not in simulation.reading
    # As much until it is Bob's turn, half as much beside it, and what goes on when it comes and when it ends.
    step_s = LAYERS * TOKEN_LAYER_S * QUESTIONS_COST
    assert simulation.read_s[ANN] - before <= 1.5 * simulation.read_s[BOB] + 3 * step_s


@FLOODS
def test_a_question_waits_for_a_few_steps_however_many_shorter_ones_another_tenant_asks(lengths, at_a_time) -> None:
    simulation = Simulation()
    made = simulation.keep_asking(lengths, at_a_time)
    for _ in range(20):
        simulation.step()
        made = simulation.keep_asking(lengths, at_a_time, made)
    question = simulation.add(BOB, QUESTION_TOKENS, Reach.SELECT)
    for _ in range(12):
        if question not in simulation.reading:
            break
        simulation.step()
        made = simulation.keep_asking(lengths, at_a_time, made)
    assert question not in simulation.reading


@pytest.mark.parametrize("first", [ANN, BOB])
def test_each_tenants_shortest_is_read_then_its_next(first: bytes) -> None:
    other = BOB if first == ANN else ANN
    reading = [Reading(first, 40, None), Reading(other, 10, None), Reading(first, 30, None), Reading(other, 20, None)]
    plan = share_questions(reading, 1000)
    assert [(item.sequence.tenant, item.num_tokens) for item in plan] == [
        (first, 30),
        (other, 10),
        (first, 40),
        (other, 20),
    ]
