"""What a call brings, and what KV there is for it to go on from. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from kvservice.engine.sequences import HeldSequences
from kvservice.errors import FailedPrecondition, InvalidRequest, PromptTooLong
from kvservice.recall.memory import SequenceMemory
from kvservice.types import GROUP_TOKENS, Distant, EngineCall, ModelShape, SessionId


@dataclass(frozen=True, slots=True)
class Found:
    """KV that a call can go on from.

    Attributes:
        memory: the session's own, or a new one.
        donor: another session of the tenant that holds more of what the call begins with.
        num_kept: leading tokens of the call whose KV is there.
        num_missing: tokens of the session before the call whose KV isn't, and was.
        num_reused: new tokens of the call whose KV the donor has.
    """

    memory: SequenceMemory
    donor: SessionId | None
    num_kept: int
    num_missing: int
    num_reused: int


def num_given(call: EngineCall) -> int:
    """Tokens that a call brings."""
    return len(call.base_tokens) + len(call.document_tokens) + len(call.prompt_tokens)


def check_tokens(call: EngineCall, shape: ModelShape) -> None:
    """Refuses tokens that the model can't take.

    Raises:
        InvalidRequest: there are none to compute, or one isn't in the vocabulary.
        PromptTooLong: there are more than the model has positions.
    """
    given = num_given(call)
    if given == 0 or (call.sampling is None and not call.document_tokens):
        raise InvalidRequest("there are no tokens to compute", reason="empty")
    new = call.sampling.max_new_tokens if call.sampling else 0
    if given + new > shape.max_positions:
        raise PromptTooLong(f"{given} tokens and up to {new} new ones: the model has {shape.max_positions} positions")
    tokens = (*call.base_tokens, *call.document_tokens, *call.prompt_tokens)
    if max(tokens) >= shape.vocab_size or min(tokens) < 0:
        wrong = next(token for token in tokens if not 0 <= token < shape.vocab_size)
        raise InvalidRequest(f"token id {wrong}: must be in 0 to {shape.vocab_size - 1}")


def find(call: EngineCall, tokens: Sequence[int], sequences: HeldSequences) -> Found:
    """The KV to go on from: the session's own, or what another session of the tenant shares with it.

    Args:
        call: the call.
        tokens: all that it brings.
        sequences: where KV is held.
    """
    held = usable(sequences.get(call.session_id), call)
    same = _common_prefix(held.state.tokens, call.base_tokens) if held else 0
    kept = min(same, held.num_computed) if held else 0
    recipe = held.recipe if held else call.recipe
    if call.recipe.distant is Distant.RECALL:
        # What others share saw everything; a question doesn't.
        tokens = tokens[: len(call.base_tokens) + len(call.document_tokens)]
    if held is not None and held.held is not None:
        # What it dropped can't come back: it goes on from all that it has, or from nothing.
        kept = held.kept_of(min(kept, len(tokens) - 1))
        return Found(held, None, kept, len(call.base_tokens) - same + min(same, held.reaches.end) - kept, 0)
    donor, length = sequences.longest_prefix(call.tenant_tag, recipe, tokens)
    memory = held or sequences.new(recipe)
    if donor is not None and length >= kept + GROUP_TOKENS:
        missing = max(0, len(call.base_tokens) - length)
        reused = max(0, length - len(call.base_tokens))
        return Found(memory, None if donor == call.session_id else donor, length, missing, reused)
    # A token that never had KV isn't missing: the last one of an answer.
    return Found(memory, None, kept, len(call.base_tokens) - same, 0)


def usable(held: SequenceMemory | None, call: EngineCall) -> SequenceMemory | None:
    """The session's KV, if it is held and of use to the call.

    A call may attend to more than its session's recipe keeps near, never to what was never kept.

    Raises:
        FailedPrecondition: the call asks for what was never kept.
    """
    if held is None or held.recipe == call.recipe:
        return held
    kept_and_asked = (held.recipe.distant, call.recipe.distant)
    keeps_alike = held.recipe.shares_keys == call.recipe.shares_keys
    if keeps_alike and kept_and_asked == (Distant.STREAM, Distant.RECALL):
        return None  # Made for a call that answered exactly when nothing of the session was held: without an index.
    if not keeps_alike or kept_and_asked != (Distant.RECALL, Distant.STREAM):
        raise FailedPrecondition(
            f"the session keeps its KV as {held.recipe.name!r}; a call can't use {call.recipe.name!r} on it",
            reason="recipe",
        )
    return held


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
