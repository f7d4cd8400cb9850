"""Retrieval: does a recipe still find one sentence in a long text? Compared with `dense`, case by case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvservice.config.recipes import DENSE
from kvservice.engine import Engine
from kvservice.evaluation.calls import Report, complete, ignore_progress
from kvservice.evaluation.haystack import QUESTION, PasskeyCase, is_answered
from kvservice.models.tokenizer import Tokenizer
from kvservice.types import PromptFormat, RecipeSpec, TextRole

ANSWER_TOKENS = 10
"""Enough for a space, five digits and a full stop, whatever the tokenizer makes of digits."""


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What was answered."""

    case: PasskeyCase
    num_tokens: int
    answer: str
    dense_answer: str

    @property
    def is_correct(self) -> bool:
        """Whether the recipe found the pass key."""
        return is_answered(self.answer, self.case.pass_key)

    @property
    def is_dense_correct(self) -> bool:
        """Whether `dense` found it."""
        return is_answered(self.dense_answer, self.case.pass_key)


def run_case(
    engine: Engine, tokenizer: Tokenizer, recipe: RecipeSpec, case: PasskeyCase, report: Report = ignore_progress
) -> CaseResult:
    """Asks for one pass key, under the recipe and under `dense`. Blocks for seconds.

    Raises:
        KVServiceError: it doesn't fit in the engine's budget, or has more tokens than the model has positions.
    """
    document = tokenizer.encode(case.document, TextRole.DOCUMENT, PromptFormat.RAW, first=True)
    question = tokenizer.encode(QUESTION, TextRole.QUESTION, PromptFormat.RAW, first=False)
    answers = {
        spec.name: tokenizer.decode(complete(engine, spec, document, question, ANSWER_TOKENS, report))
        for spec in {DENSE.name: DENSE, recipe.name: recipe}.values()
    }
    return CaseResult(case, len(document) + len(question), answers[recipe.name], answers[DENSE.name])


@dataclass(frozen=True, slots=True)
class DepthFigures:
    """Cases of one depth."""

    correct: int
    dense_correct: int
    cases: int


@dataclass(frozen=True, slots=True)
class PasskeyFigures:
    """What `eval passkey --json` promises.

    Attributes:
        correct: answered under the recipe.
        cases: asked.
        by_depth: by the needle's depth in percent.
        dense_correct: answered under `dense`.
        lost: answered under `dense` and not under the recipe.
        gained: the other way round.
    """

    correct: int
    cases: int
    by_depth: dict[str, DepthFigures]
    dense_correct: int
    lost: int
    gained: int


def summarize(results: Sequence[CaseResult]) -> PasskeyFigures:
    """Counts, in all and by depth."""
    depths = sorted({result.case.depth_percent for result in results})
    return PasskeyFigures(
        correct=sum(result.is_correct for result in results),
        cases=len(results),
        by_depth={
            str(depth): DepthFigures(
                correct=sum(result.is_correct for result in results if result.case.depth_percent == depth),
                dense_correct=sum(result.is_dense_correct for result in results if result.case.depth_percent == depth),
                cases=sum(result.case.depth_percent == depth for result in results),
            )
            for depth in depths
        },
        dense_correct=sum(result.is_dense_correct for result in results),
        lost=sum(result.is_dense_correct and not result.is_correct for result in results),
        gained=sum(result.is_correct and not result.is_dense_correct for result in results),
    )
