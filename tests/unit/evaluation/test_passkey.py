import json
from dataclasses import asdict
from pathlib import Path

import pytest

from kvservice.config.recipes import DENSE, RECALL
from kvservice.evaluation.haystack import PasskeyCase, make_cases, noise_units
from kvservice.evaluation.passkey import CaseResult, run_case, summarize
from kvservice.models.tiny import write_tiny_checkpoint
from kvservice.models.tokenizer import Tokenizer
from kvservice.types import PromptFormat, TextRole


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tiny")
    return Tokenizer.load(write_tiny_checkpoint(folder))


def result(depth: int, answer: str, dense_answer: str) -> CaseResult:
    return CaseResult(PasskeyCase("", "12345", depth), 100, answer, dense_answer)


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


def test_both_recipes_read_the_same_prompt_and_nothing_is_kept(engine, tokenizer) -> None:
    def count(text: str) -> int:
        return len(tokenizer.encode(text, TextRole.DOCUMENT, PromptFormat.RAW, first=True))

    case = make_cases(noise_units(), is_prose=False, num_tokens=600, num_cases=1, seed=1, count=count)[0]
    answered = run_case(engine, tokenizer, RECALL, case)
    assert answered.num_tokens <= 600
    assert answered.answer
    assert answered.dense_answer == run_case(engine, tokenizer, DENSE, case).answer
