"""Retrieval: does a recipe still find one sentence in a long text? Compared with `dense`, case by case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import comb

from kvservice.config.recipes import DENSE
from kvservice.engine import Engine
from kvservice.evaluation.calls import Conversation, converse
from kvservice.evaluation.haystack import PasskeyCase, is_answered
from kvservice.models.tokenizer import Tokenizer
from kvservice.types import CallId, EngineCall, PromptFormat, RecipeSpec, SamplingParams, SessionId, TextRole

ANSWER_TOKENS = 10
"""Enough for a space, five digits and a full stop, whatever the tokenizer makes of digits."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What was answered, for each needle.

    Attributes:
        first: asked for at once.
        later: asked for after the model has gone on for a while; empty if it wasn't to.
    """

    first: tuple[str, ...]
    later: tuple[str, ...] = ()

    @property
    def last(self) -> tuple[str, ...]:
        """Those that count."""
        return self.later or self.first


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case."""

    case: PasskeyCase
    num_tokens: int
    answers: Answers
    dense_answers: Answers

    @property
    def is_correct(self) -> bool:
        """Whether the recipe found all that is hidden."""
        return is_all_found(self.answers.last, self.case)

    @property
    def is_dense_correct(self) -> bool:
        """Whether `dense` did."""
        return is_all_found(self.dense_answers.last, self.case)


def is_all_found(answers: Sequence[str], case: PasskeyCase) -> bool:
    """Whether each answer is what is hidden."""
    return all(is_answered(answer, needle.number) for answer, needle in zip(answers, case.needles, strict=True))


def run_cases(
    engine: Engine,
    tokenizer: Tokenizer,
    recipe: RecipeSpec,
    cases: Sequence[PasskeyCase],
    *,
    talk_tokens: int = 0,
    at_once: int = 1,
    report: Callable[[], None] = lambda: None,
    reference: Engine | None = None,
) -> list[CaseResult]:
    """Asks for what is hidden, under the recipe and under `dense`. Blocks for seconds a case.

    Args:
        engine: without sessions.
        tokenizer: of its model.
        recipe: beside `dense`.
        cases: the texts, and what is hidden in them.
        talk_tokens: that the model goes on with, whatever it then says, before it is asked once more.
        at_once: sessions at a time.
        report: told of each session that has ended.
        reference: answers under `dense`, where `engine` has adapted weights; None: the same engine.

    Raises:
        KVServiceError: it doesn't fit in the engine's budget, or has more tokens than the model has positions.
    """
    prompts = [_Prompt.of(case, tokenizer) for case in cases]
    told: list[list[Answers]] = []
    for spec in compared(recipe):
        asked = engine if reference is None or spec.name != DENSE.name else reference
        conversations = [
            _ask(asked, SessionId(f"{spec.name}-{number}"), spec, prompt, talk_tokens)
            for number, prompt in enumerate(prompts)
        ]
        told.append([])
        for first, later in converse(asked, conversations, at_once):
            told[-1].append(Answers(*(tuple(tokenizer.decode(one) for one in some) for some in (first, later))))
            report()
    return [
        CaseResult(case, prompt.num_tokens + talk_tokens, own, dense)
        for case, prompt, own, dense in zip(cases, prompts, told[0], told[-1], strict=True)
    ]


def answer_case(
    engine: Engine, tokenizer: Tokenizer, spec: RecipeSpec, case: PasskeyCase
) -> Conversation[tuple[str, ...]]:
    """Asks for what is hidden in one text, under one recipe."""
    first, _ = yield from _ask(engine, SessionId(f"key-{spec.name}"), spec, _Prompt.of(case, tokenizer), 0)
    return tuple(tokenizer.decode(one) for one in first)


def compared(recipe: RecipeSpec) -> list[RecipeSpec]:
    """The recipes that each case is asked under: `dense` once, even beside itself."""
    return [recipe] if recipe.name == DENSE.name else [recipe, DENSE]


@dataclass(frozen=True, slots=True)
class _Prompt:
    document: tuple[int, ...]
    questions: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, case: PasskeyCase, tokenizer: Tokenizer) -> _Prompt:
        raw = PromptFormat.RAW
        return cls(
            tuple(tokenizer.encode(case.document, TextRole.DOCUMENT, raw, first=True)),
            tuple(
                tuple(tokenizer.encode(needle.question, TextRole.QUESTION, raw, first=False)) for needle in case.needles
            ),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.document) + max(len(question) for question in self.questions)


_Told = list[tuple[int, ...]]


def _ask(
    engine: Engine, session: SessionId, spec: RecipeSpec, prompt: _Prompt, talk_tokens: int
) -> Conversation[tuple[_Told, _Told]]:
    call_id, sampling = CallId(session), SamplingParams(max_new_tokens=ANSWER_TOKENS)

    def ask(base: tuple[int, ...]) -> Conversation[_Told]:
        told = []
        # Each question is put to the same text: what the session has beyond it is given up.
        for question in prompt.questions:
            end = yield EngineCall(call_id, session, spec, base, prompt_tokens=question, sampling=sampling)
            told.append(end.appended_tokens[len(question) :])
        return told

    try:
        yield EngineCall(call_id, session, spec, base_tokens=(), document_tokens=prompt.document)
        first, later = (yield from ask(prompt.document)), []
        if talk_tokens:
            talking = SamplingParams(max_new_tokens=talk_tokens, ignore_eos=True)
            end = yield EngineCall(call_id, session, spec, prompt.document, sampling=talking)
            later = yield from ask((*prompt.document, *end.appended_tokens))
        return first, later
    finally:
        engine.release(session)


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
        correct: answered under the recipe; with `--talk-tokens`, after that many.
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


def at_first(results: Sequence[CaseResult]) -> list[CaseResult]:
    """The same cases, asked for at once only."""
    return [
        replace(one, answers=Answers(one.answers.first), dense_answers=Answers(one.dense_answers.first))
        for one in results
    ]


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
