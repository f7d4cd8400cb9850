"""What the engine asks of grammars: which tokens may come next. Knows no language that grammars are written in."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kvservice.types import Grammar


class TokenMatcher(Protocol):
    """How far one answer has come in its grammar. Belongs to that answer; not for several threads."""

    def allowed(self) -> Tensor:
        """The tokens that may come next: int32 on the CPU, token `t` is bit `t % 32` of word `t // 32`.

        The tensor is the matcher's: read it before the next call. Tokens beyond its end are not allowed. The end token
        is allowed once the answer is complete, and it alone where nothing may follow: an answer under a grammar always
        ends at its end token, or is cut off at `max_new_tokens`. `ignore_eos` doesn't go with a grammar; the gateway
        refuses it.

        Raises:
            InvalidRequest: the grammar turns out to be too complex here.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Goes on by a token that `allowed` had.

        Raises:
            InternalError: it hadn't.
        """
        ...

    @property
    def is_complete(self) -> bool:
        """Whether the answer matches the grammar as it is, so that the end token is allowed."""
        ...


class GrammarCompiler(Protocol):
    """Makes matchers for the tokens of one model."""

    def compile(self, grammar: Grammar) -> TokenMatcher:
        """A matcher at the beginning of an answer. The same grammar again is cheap.

        Raises:
            InvalidRequest: the grammar is wrong or too big; the message says what of it. `field` is `sampling.grammar`.
        """
        ...
