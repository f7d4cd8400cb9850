import json
from dataclasses import asdict
from pathlib import Path

import pytest

from kvservice.config.recipes import DENSE, RECALL
from kvservice.evaluation.haystack import Needle, PasskeyCase, make_cases, noise_units
from kvservice.evaluation.methods_log import Log
from kvservice.evaluation.methods_table import Case, ask_all
from kvservice.evaluation.passkey import Answers, CaseResult, at_first, mcnemar_p, run_cases, summarize
from kvservice.models.tiny import write_tiny_checkpoint
from kvservice.models.tokenizer import Tokenizer
from kvservice.types import PromptFormat, TextRole


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tiny")
    return Tokenizer.load(write_tiny_checkpoint(folder))


def result(depth: int, answer: str, dense_answer: str) -> CaseResult:
    case = PasskeyCase("", (Needle("pass key", "12345", depth),))
    return CaseResult(case, 100, Answers((answer,)), Answers((dense_answer,)))


def test_of_two_needles_both_must_be_found() -> None:
    case = PasskeyCase("", (Needle("pass key", "12345", 5), Needle("door code", "67890", 50)))
    assert CaseResult(case, 1, Answers(("12345", "67890")), Answers(("12345", "12345"))).is_correct
    assert not CaseResult(case, 1, Answers(("12345", "67890")), Answers(("12345", "12345"))).is_dense_correct


@pytest.mark.parametrize(
    ("lost", "gained", "p"), [(0, 0, 1.0), (1, 1, 1.0), (5, 0, 0.0625), (0, 6, 0.03125), (8, 2, 0.109375)]
)
def test_mcnemars_test_counts_discordant_pairs(lost: int, gained: int, p: float) -> None:
    assert mcnemar_p(lost, gained) == pytest.approx(p)


def test_a_recipe_is_compared_with_dense_case_by_case() -> None:
    figures = summarize(
        [
            result(5, " 12345.", " 12345"),
            result(5, " a key", " 12345"),
            result(50, " 12345", " no"),
            result(95, " no", " no"),
        ]
    )
    assert (figures.correct, figures.dense_correct, figures.cases) == (2, 2, 4)
    assert (figures.lost, figures.gained) == (1, 1)
    assert json.loads(json.dumps(asdict(figures)))["by_depth"]["5"] == {"correct": 1, "dense_correct": 2, "cases": 2}


def count_with(tokenizer: Tokenizer):
    return lambda text: len(tokenizer.encode(text, TextRole.DOCUMENT, PromptFormat.RAW, first=True))


def some_cases(tokenizer: Tokenizer, num_cases: int = 1, **more) -> list[PasskeyCase]:
    count = count_with(tokenizer)
    return make_cases(noise_units(), is_prose=False, num_tokens=600, num_cases=num_cases, seed=1, count=count, **more)


def test_both_recipes_read_the_same_prompt_and_nothing_is_kept(engine, tokenizer) -> None:
    cases = some_cases(tokenizer)
    (answered,) = run_cases(engine, tokenizer, RECALL, cases)
    assert answered.num_tokens <= 600
    assert answered.answers.first
    assert answered.answers.later == ()
    assert answered.dense_answers == run_cases(engine, tokenizer, DENSE, cases)[0].answers
    assert engine.headroom().resident_sessions == 0


def test_a_second_question_and_the_talk_change_the_first_answers_to_neither(engine, tokenizer) -> None:
    (case,) = some_cases(tokenizer, num_needles=2)
    (both,) = run_cases(engine, tokenizer, RECALL, [case], talk_tokens=70)
    assert both.num_tokens <= 600 + 70
    (second,) = run_cases(engine, tokenizer, RECALL, [PasskeyCase(case.document, case.needles[1:])], talk_tokens=70)
    assert both.answers.first[1:] == second.answers.first
    assert both.answers.later[1:] == second.answers.later
    assert both.dense_answers.later[1:] == second.dense_answers.later
    (early,) = run_cases(engine, tokenizer, RECALL, [case])
    assert at_first([both])[0].answers == early.answers


def test_answers_dont_depend_on_how_many_sessions_there_are_at_a_time(engine, tokenizer) -> None:
    cases = some_cases(tokenizer, num_cases=3)
    seen = []
    together = run_cases(
        engine, tokenizer, RECALL, cases, talk_tokens=8, at_once=4, report=lambda: seen.append(len(seen))
    )
    assert together == run_cases(engine, tokenizer, RECALL, cases, talk_tokens=8)
    assert len(seen) == 6
    assert engine.headroom().resident_sessions == 0


def test_methods_are_asked_alone_and_what_is_in_the_log_is_not_asked_again(tokenizer: Tokenizer, engine) -> None:
    asked, log = some_cases(tokenizer, num_cases=2), Log(None)
    wanted = [Case("dense", 0), Case("h2o", 96)]
    told: list[int] = []
    answers = ask_all(engine, tokenizer, log, wanted, asked, num_tokens=600, report=lambda: told.append(1))
    assert {case: len(found) for case, found in answers.items()} == dict.fromkeys(wanted, 2)
    assert len(told) == 4
    assert ask_all(None, tokenizer, log, wanted, asked, num_tokens=600) == answers
