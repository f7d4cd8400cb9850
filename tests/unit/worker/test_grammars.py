"""Grammars are compiled beside the engine."""

from __future__ import annotations

import threading

import pytest

from kvservice.errors import InvalidRequest
from kvservice.types import Grammar, GrammarKind
from kvservice.v1 import common_pb2
from tests.unit.worker.conftest import StartWorker

DIGITS = Grammar(GrammarKind.REGEX, "[0-9]+")


async def test_a_grammar_is_compiled_in_a_thread_of_its_own_before_the_engine_sees_the_call(start_worker: StartWorker):
    compiled = []
    worker = await start_worker(
        compile_grammar=lambda grammar: compiled.append((grammar, threading.current_thread().name))
    )
    gateway = await worker.connect()
    await gateway.generate("c", "12", grammar=DIGITS)
    assert (await gateway.admission()).admitted
    assert (await gateway.answer("c"))[0] == "12"
    ((grammar, thread),) = compiled
    assert grammar == DIGITS
    assert thread.startswith("grammar")


async def test_a_wrong_grammar_never_reaches_the_engine(start_worker: StartWorker):
    def refuse(_: Grammar) -> None:
        raise InvalidRequest("the regex can't be used: it is wrong", field="sampling.grammar")

    worker = await start_worker(compile_grammar=refuse)
    gateway = await worker.connect()
    await gateway.generate("c", "12", grammar=DIGITS)
    admission = await gateway.admission()
    assert not admission.admitted
    assert admission.refusal.code == "INVALID_ARGUMENT"
    assert not worker.engine.submitted


async def test_a_grammar_that_takes_too_long_is_refused_and_answers_of_others_go_on(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("kvservice.worker.grammars.PATIENCE_S", 0.05)
    is_over = threading.Event()
    worker = await start_worker(compile_grammar=lambda _: is_over.wait())
    slow, other = await worker.connect(), await worker.connect()
    try:
        await slow.generate("c", "12", grammar=DIGITS)
        await other.generate("d", "an answer")
        assert (await other.admission()).admitted
        assert (await other.answer("d"))[0] == "an answer"
        admission = await slow.admission()
        assert "simplify" in admission.refusal.message
        assert admission.refusal.code == "INVALID_ARGUMENT"
    finally:
        is_over.set()


async def test_a_cancel_waits_for_the_grammar_of_its_call(start_worker: StartWorker):
    may_go_on = threading.Event()
    worker = await start_worker(step_by_step=True, compile_grammar=lambda _: may_go_on.wait())
    gateway = await worker.connect()
    await gateway.generate("c", "12", grammar=DIGITS)
    await gateway.send(cancel={"call_id": "c"})
    may_go_on.set()
    assert (await gateway.admission()).admitted
    worker.engine.permits.release(5)
    assert (await gateway.answer("c"))[1].done.finish_reasons == [common_pb2.FINISH_REASON_CANCELLED]
