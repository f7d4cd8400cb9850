"""Holds answers to a JSON schema or a regex, over the tokens of one model. Knows nothing of logits, calls or engines.

The work is done by llguidance: a lexer of regex derivatives under an Earley parser, which walks the tree of all tokens
and gives those that can follow. Its limits on states and steps bound what a hostile grammar can take.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from kvservice.errors import InternalError, InvalidRequest
from kvservice.models.tokenizer import Tokenizer
from kvservice.types import Grammar, GrammarKind

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_FIELD = "sampling.grammar"
_KEPT_GRAMMARS = 32
"""Compiled grammars that are kept for the next answer."""
_MAX_LEXER_STATES = 20_000
"""Of one grammar, at one or two kB each: the library's default would let a grammar take half a GB."""

_JSON_LAYOUT: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to lay JSON out, as `json.dumps` does: free white space lets a small model go on with it for ever."""


class Grammars:
    """Compiles grammars. Implements the engine's GrammarCompiler. For several threads; each matcher is for one.

    A big grammar takes some tenths of a second, in which other threads go on: who can't wait has another thread compile
    it before.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Returns at once: the tree of all tokens, most of a second's work, is made beside what the caller does next.

        Args:
            tokenizer: the model's.
            vocab_size: tokens that the model has logits for.
        """
        self._vocab_size = vocab_size
        builder = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._tree = builder.submit(
            LLTokenizer, tokenizer.definition(), n_vocab=vocab_size, eos_token=sorted(tokenizer.eos_token_ids)
        )
        builder.shutdown(wait=False)
        self._limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of an answer.

        JSON is laid out with one space after each comma and colon. A regex is one of Rust's: no look-around, no
        back-references; it matches the whole answer.

        Raises:
            InvalidRequest: the grammar is wrong, too big, or can't be had with this model's tokenizer.
        """
        with self._lock:
            matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = self._build(grammar)
        with self._lock:
            self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > _KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
            return Matcher(matcher.deep_copy(), self._vocab_size)

    def _build(self, grammar: Grammar) -> LLMatcher:
        matcher = LLMatcher(self._tokens(), _source(grammar), log_level=0, limits=self._limits)
        if not matcher.is_error():
            # Much is only built, and found to be too big, with the first mask.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _wrong(grammar, matcher.get_error())
        return matcher

    def _tokens(self) -> LLTokenizer:
        try:
            return self._tree.result()
        except ValueError as error:
            raise InvalidRequest(
                f"this model's tokenizer can't be held to a grammar ({_first_line(str(error))}): ask without one",
                field=_FIELD,
            ) from None


class Matcher:
    """How far one answer has come in its grammar. Implements the engine's TokenMatcher."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._words = torch.zeros(-(-vocab_size // 32), dtype=torch.int32)

    def allowed(self) -> Tensor:
        """The tokens that may come next, a bit each; the tensor is overwritten by the next call.

        Raises:
            InvalidRequest: the grammar takes more work at this point than a step may do.
        """
        words = self._words
        self._matcher.unsafe_compute_mask_ptr(words.data_ptr(), words.numel() * words.element_size())
        if self._matcher.is_error():
            why = _first_line(self._matcher.get_error())
            raise InvalidRequest(f"the grammar is too complex here ({why}): simplify it", field=_FIELD)
        return words

    def accept(self, token_id: int) -> None:
        """Goes on by a token that `allowed` had.

        Raises:
            InternalError: it hadn't.
        """
        if not self._matcher.consume_token(token_id):
            why = _first_line(self._matcher.get_error())
            raise InternalError(f"token {token_id} doesn't match the answer's grammar: {why}")

    @property
    def is_complete(self) -> bool:
        """Whether the answer matches as it is."""
        return self._matcher.is_accepting()


def _source(grammar: Grammar) -> str:
    """The grammar in the library's own language."""
    if grammar.kind is GrammarKind.REGEX:
        return LLMatcher.grammar_from_regex(grammar.text)
    try:
        return LLMatcher.grammar_from_json_schema(grammar.text, defaults=_JSON_LAYOUT)
    except ValueError as error:
        raise _wrong(grammar, str(error)) from None


def _wrong(grammar: Grammar, why: str) -> InvalidRequest:
    return InvalidRequest(f"the {grammar.kind.value} can't be used: {why.strip()}", field=_FIELD)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no reason given"
