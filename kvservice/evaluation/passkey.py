"""Retrieval: does a recipe still find one sentence in a long text? Compared with `dense`, case by case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from kvservice.config.recipes import DENSE
from kvservice.engine import Engine
from kvservice.evaluation.calls import go_on, read_document
from kvservice.evaluation.haystack import PasskeyCase, is_answered
from kvservice.models.tokenizer import Tokenizer
from kvservice.types import PromptFormat, RecipeSpec, SessionId, TextRole

ANSWER_TOKENS = 10
"""Enough for a space, five digits and a full stop, whatever the tokenizer makes of digits."""


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What was answered, for each needle."""

    case: PasskeyCase
    num_tokens: int
    answers: tuple[str, ...]
    dense_answers: tuple[str, ...]

    @property
    def is_correct(self) -> bool:
        """Whether the recipe found all that is hidden."""
        return _all_found(self.answers, self.case)

    @property
    def is_dense_correct(self) -> bool:
        """Whether `dense` did."""
        return _all_found(self.dense_answers, self.case)


def _all_found(answers: Sequence[str], case: PasskeyCase) -> bool:
    return all(is_answered(answer, needle.number) for answer, needle in zip(answers, case.needles, strict=True))


def run_case(
    engine: Engine, tokenizer: Tokenizer, recipe: RecipeSpec, case: PasskeyCase, talk_tokens: int = 0
) -> CaseResult:
    """Asks for what is hidden, under the recipe and under `dense`. Blocks for seconds.

    Args:
        engine: without sessions.
        tokenizer: of its model.
        recipe: beside `dense`.
        case: the text, and what is hidden in it.
        talk_tokens: that the model goes on with before it is asked, whatever it then says.

    Raises:
        KVServiceError: it doesn't fit in the engine's budget, or has more tokens than the model has positions.
    """
    document = tokenizer.encode(case.document, TextRole.DOCUMENT, PromptFormat.RAW, first=True)
    questions = [
        tokenizer.encode(needle.question, TextRole.QUESTION, PromptFormat.RAW, first=False) for needle in case.needles
    ]
    answers: dict[str, tuple[str, ...]] = {}
    for spec in {DENSE.name: DENSE, recipe.name: recipe}.values():
        session = SessionId(spec.name)
        try:
            read_document(engine, session, spec, document)
            tokens = list(document)
            if talk_tokens:
                tokens += go_on(engine, session, spec, tokens, (), talk_tokens, ignore_eos=True)
            # Each question is put to the same text: what the session has beyond it is given up.
            answers[spec.name] = tuple(
                tokenizer.decode(go_on(engine, session, spec, tokens, question, ANSWER_TOKENS))
                for question in questions
            )
        finally:
            engine.release(session)
    num_tokens = len(document) + talk_tokens + max(len(question) for question in questions)
    return CaseResult(case, num_tokens, answers[recipe.name], answers[DENSE.name])


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
        by_depth: by the first needle's depth in percent.
        dense_correct: answered under `dense`.
        lost: answered under `dense` and not under the recipe.
        gained: the other way round.
        mcnemar_p: how probable it is, were both equally good, that `lost` and `gained` differ as much (exact, both
            sides).
    """

    correct: int
    cases: int
    by_depth: dict[str, DepthFigures]
    dense_correct: int
    lost: int
    gained: int
    mcnemar_p: float


def mcnemar_p(lost: int, gained: int) -> float:
    """McNemar's exact test: with n discordant pairs, each side has Binomial(n, 1/2) of them."""
    n = lost + gained
    tail: float = sum(comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n
    return min(1.0, 2 * tail)


def summarize(results: Sequence[CaseResult]) -> PasskeyFigures:
    """Counts, in all and by depth."""
    depths = sorted({result.case.needles[0].depth_percent for result in results})
    at = {depth: [one for one in results if one.case.needles[0].depth_percent == depth] for depth in depths}
    lost = sum(result.is_dense_correct and not result.is_correct for result in results)
    gained = sum(result.is_correct and not result.is_dense_correct for result in results)
    return PasskeyFigures(
        correct=sum(result.is_correct for result in results),
        cases=len(results),
        by_depth={
            str(depth): DepthFigures(
                correct=sum(result.is_correct for result in some),
                dense_correct=sum(result.is_dense_correct for result in some),
                cases=len(some),
            )
            for depth, some in at.items()
        },
        dense_correct=sum(result.is_dense_correct for result in results),
        lost=lost,
        gained=gained,
        mcnemar_p=mcnemar_p(lost, gained),
    )
