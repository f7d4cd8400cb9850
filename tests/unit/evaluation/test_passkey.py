import json
from dataclasses import asdict
from pathlib import Path

import pytest

from kvservice.config.recipes import DENSE, RECALL
from kvservice.evaluation.haystack import Needle, PasskeyCase, make_cases, noise_units
from kvservice.evaluation.passkey import CaseResult, mcnemar_p, run_case, summarize
from kvservice.models.tiny import write_tiny_checkpoint
from kvservice.models.tokenizer import Tokenizer
from kvservice.types import PromptFormat, TextRole


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tiny")
    return Tokenizer.load(write_tiny_checkpoint(folder))


def result(depth: int, answer: str, dense_answer: str) -> CaseResult:
    return CaseResult(PasskeyCase("", (Needle("pass key", "12345", depth),)), 100, (answer,), (dense_answer,))


def test_of_two_needles_both_must_be_found() -> None:
    case = PasskeyCase("", (Needle("pass key", "12345", 5), Needle("door code", "67890", 50)))
    assert CaseResult(case, 1, ("12345", "67890"), ("12345", "12345")).is_correct
    assert not CaseResult(case, 1, ("12345", "67890"), ("12345", "12345")).is_dense_correct


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


def test_both_recipes_read_the_same_prompt_and_nothing_is_kept(engine, tokenizer) -> None:
    count = count_with(tokenizer)
    case = make_cases(noise_units(), is_prose=False, num_tokens=600, num_cases=1, seed=1, count=count)[0]
    answered = run_case(engine, tokenizer, RECALL, case)
    assert answered.num_tokens <= 600
    assert answered.answers
    assert answered.dense_answers == run_case(engine, tokenizer, DENSE, case).answers
    assert engine.headroom().resident_sessions == 0


def test_what_is_said_before_the_question_and_a_second_question_change_the_answer_to_neither(engine, tokenizer) -> None:
    count = count_with(tokenizer)
    case = make_cases(noise_units(), is_prose=False, num_tokens=600, num_cases=1, seed=1, count=count, num_needles=2)[0]
    both = run_case(engine, tokenizer, RECALL, case, talk_tokens=70)
    assert both.num_tokens <= 600 + 70
    second = run_case(engine, tokenizer, RECALL, PasskeyCase(case.document, case.needles[1:]), talk_tokens=70)
    assert both.answers[1:] == second.answers
    assert both.dense_answers[1:] == second.dense_answers
