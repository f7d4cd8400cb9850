"""Which calls are taken on. Knows no steps and no models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from kvservice.engine.calls import Calls
from kvservice.engine.demand import Wish
from kvservice.engine.finding import Found, check_tokens, find, num_given, usable
from kvservice.engine.grammar import GrammarCompiler
from kvservice.engine.room import Room
from kvservice.engine.running import RunningSequence
from kvservice.engine.sampler import SamplerRow
from kvservice.engine.sequences import HeldSequences
from kvservice.engine.turns import Turns
from kvservice.errors import (
    TENANT_ANSWERS,
    Conflict,
    FailedPrecondition,
    InvalidRequest,
    KVServiceError,
    Overloaded,
)
from kvservice.types import Distant, EngineCall, ModelShape, OnMiss, Reached, RestoredKv

LATECOMERS = 8
"""One more answer for each so many may be under way, of tenants that have less than an equal part: who comes late
doesn't wait until one of those that came before has ended."""


class Admission:
    """Admits calls or refuses them.

    Args:
        calls: those under way.
        sequences: the KV there is.
        room: shares out bytes.
        turns: gives calls their places.
        shape: of the model.
        max_batch: answers that may be under way at a time.
        grammars: for answers that must match one; without it such calls are refused.
        shares_keys: whether recipes that share distant keys between layers can be carried out.
    """

    def __init__(
        self,
        calls: Calls,
        sequences: HeldSequences,
        room: Room,
        turns: Turns,
        *,
        shape: ModelShape,
        max_batch: int,
        grammars: GrammarCompiler | None,
        shares_keys: bool = False,
    ) -> None:
        self._calls = calls
        self._sequences = sequences
        self._room = room
        self._turns = turns
        self._shape = shape
        self._max_batch = max_batch
        self._grammars = grammars
        self._shares_keys = shares_keys
        self._numbers = count()

    def submit(self, call: EngineCall) -> None:
        """Admits a call, or refuses and changes nothing. Raises what `Engine.submit` does."""
        self._check(call)
        tokens = [*call.base_tokens, *call.document_tokens, *call.prompt_tokens]
        rows = self._sampler_rows(call, tokens)
        found = find(call, tokens, self._sequences)
        brought = call.restored if found.num_missing else None
        takes_kv = brought is not None and _is_more(brought, found, call)
        if found.num_missing and call.on_miss is OnMiss.FAIL and not takes_kv:
            raise FailedPrecondition(
                f"KV of {found.num_missing} tokens is held nowhere and on_miss is fail; allow recompute",
                reason="kv_missing",
                metadata={"num_missing": str(found.num_missing)},
            )
        if takes_kv:
            found = Found(self._sequences.new(call.recipe), None, 0, len(call.base_tokens), 0)
        reached = _reached(brought, call) if brought is not None else None
        # What is known to have had KV is counted when it is computed again.
        num_known = max(found.num_kept, reached.num_computed if reached is not None else 0)
        num_missing = found.num_missing if reached is None else _num_beyond(call, num_known)
        documents_end = len(call.base_tokens) + len(call.document_tokens)
        # Going on from tokens that all have KV: the last is computed again, for its logits.
        kept = min(found.num_kept, len(tokens) - 1)
        full_until = documents_end if num_missing or call.document_tokens else min(num_known, len(tokens) - 1)
        fare = self._turns.join(call, max(0, len(tokens) - 1 - kept), _num_selecting(call, len(tokens), full_until))
        self._calls.put_in_order()
        sequence = RunningSequence(
            call=call,
            session_id=call.session_id,
            index=0,
            memory=found.memory if found.donor is None else self._sequences.fork_prefix(found.donor),
            number=next(self._numbers),
            fare=fare,
            tokens=tokens,
            kept=kept,
            full_until=full_until,
            row=rows[0] if rows else None,
            recomputed_tokens=num_missing,
            reached=reached,
            restored=brought if takes_kv else None,
        )
        try:
            self._room.admit(sequence, found, rows[1:])
        except KVServiceError:
            self._turns.leave(fare, num_unread=fare.num_read, num_answered=0)
            self._calls.put_in_order()
            raise

    def _check(self, call: EngineCall) -> None:
        """Refuses what can never run, or not now whatever gives way."""
        if call.recipe.shares_keys and not self._shares_keys:
            raise InvalidRequest(
                f"recipe {call.recipe.name!r} shares distant keys between layers, and this worker has no map of which: "
                "start it with --map, or use another recipe",
                field="recipe",
                reason="map_missing",
            )
        if self._sequences.is_busy(call.session_id):
            raise Conflict(f"session {call.session_id} has a call running; wait for it", reason="session_busy")
        self._check_places(call)
        check_tokens(call, self._shape)
        held = usable(self._sequences.get(call.session_id), call)
        given, new = num_given(call), call.sampling.max_new_tokens if call.sampling else 0
        wish = Wish(given + new, call.sampling.n - 1 if call.sampling else 0, given)
        self._sequences.check_fits(held.recipe if held else call.recipe, wish)

    def _check_places(self, call: EngineCall) -> None:
        """Refuses a call when as many answers are under way as may be, a few more for tenants that have few of them."""
        under_way, wanted = self._calls.num_answers, call.sampling.n if call.sampling else 1
        if under_way + wanted <= self._max_batch:
            return
        by_tenant = self._calls.num_answers_by_tenant()
        own = by_tenant.pop(call.tenant_tag, 0)
        most = self._max_batch + max(1, self._max_batch // LATECOMERS)
        if by_tenant and own + wanted <= self._max_batch // (len(by_tenant) + 1) and under_way + wanted <= most:
            return
        raise Overloaded(
            f"{under_way} answers are under way, {own} of them this tenant's; {self._max_batch} may be",
            reason=TENANT_ANSWERS if under_way < most else None,
            retry_after_s=1.0,
        )

    def _sampler_rows(self, call: EngineCall, tokens: Sequence[int]) -> list[SamplerRow]:
        """What choosing tokens needs to know of each answer; none for a call that generates nothing."""
        sampling = call.sampling
        if sampling is None:
            return []
        if sampling.grammar is None:
            return [SamplerRow(sampling, index, tokens) for index in range(sampling.n)]
        if self._grammars is None:
            raise InvalidRequest("this engine was started without grammars", field="sampling.grammar")
        compiled = [self._grammars.compile(sampling.grammar) for _ in range(sampling.n)]
        return [SamplerRow(sampling, index, tokens, matcher) for index, matcher in enumerate(compiled)]


def _is_more(brought: RestoredKv, found: Found, call: EngineCall) -> bool:
    """Whether KV that was brought for a call is more than what is held."""
    num_tokens = brought.num_tokens
    # Frames have every token, and no method had a say in them.
    is_kept = call.recipe.eviction is None and call.recipe.reuse is None
    return is_kept and brought.num_groups > 0 and found.num_kept < num_tokens <= len(call.base_tokens)


def _reached(brought: RestoredKv, call: EngineCall) -> Reached:
    """How the session's tokens were computed, and will be again. Without an index nothing can select."""
    reached = brought.reached.until(len(call.base_tokens))
    return reached if call.recipe.distant is Distant.RECALL else Reached(reached.num_computed)


def _num_selecting(call: EngineCall, num_tokens: int, full_until: int) -> int:
    """Of the tokens that a call reads, those that choose what they recall, where there is something to choose from."""
    if call.recipe.distant is not Distant.RECALL or not call.recipe.distant_groups(num_tokens):
        return 0
    return max(0, num_tokens - 1 - full_until)


def _num_beyond(call: EngineCall, num_known: int) -> int:
    """Tokens of a session behind those known to have had KV, less one that never had: the last one of an answer."""
    beyond = len(call.base_tokens) - num_known
    return 0 if beyond <= 1 else beyond
