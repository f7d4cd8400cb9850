"""How far arithmetic alone moves a model's answers: those of runners and dtypes, from transformers' in fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvservice.config.recipes import DENSE
from kvservice.engine import Engine
from kvservice.evaluation.calls import Report, ignore_progress, read_document
from kvservice.evaluation.quality import Distances, distances
from kvservice.types import SessionId


@dataclass(frozen=True, slots=True)
class PrecisionRow:
    """One runner, over all texts; means weigh every text the same.

    Attributes:
        runner: whose arithmetic, and in which dtype.
        kl_mean: KL(reference ‖ runner) of the next token, in nats.
        top1_agreement: share of tokens for which both rank the same one first.
        max_difference: of any two logits.
    """

    runner: str
    kl_mean: float
    top1_agreement: float
    max_difference: float


def score_dense(
    engine: Engine, token_ids: Sequence[int], context_tokens: int, report: Report = ignore_progress
) -> Tensor:
    """Logits after each forced token behind the context, fp32 `[n, vocab]`, one at a time as decoding computes them."""
    session_id = SessionId("precision")
    try:
        read_document(engine, session_id, DENSE, token_ids[:context_tokens], report)
        logits = engine.score(session_id, token_ids[context_tokens:])
        report(len(token_ids) - context_tokens)
        return logits
    finally:
        engine.release(session_id)


def compare(reference: Sequence[Tensor], runners: Mapping[str, Sequence[Tensor]]) -> list[PrecisionRow]:
    """Every runner's logits beside the reference's, text by text, each fp32 `[n, vocab]`."""
    rows = []
    for name, texts in runners.items():
        pairs = list(zip(reference, texts, strict=True))
        found = [_distances(true, other) for true, other in pairs]
        rows.append(
            PrecisionRow(
                runner=name,
                kl_mean=sum(float(one.kl.mean()) for one in found) / len(found),
                top1_agreement=sum(float(one.agrees.float().mean()) for one in found) / len(found),
                max_difference=max(float((true - other).abs().max()) for true, other in pairs),
            )
        )
    return rows


def _distances(reference: Tensor, logits: Tensor) -> Distances:
    return distances(reference, logits, reference.argmax(-1))
