"""The text of an answer as its tokens come. Knows no models and no prompts.

Where a token stands for the same bytes wherever it is, as in byte-level BPE, text is those bytes, decoded as they come.
Else the last few tokens are decoded again together with each new one.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_PENDING_TOKENS = 8
"""Tokens that a WindowStream holds back at most. A character has at most four bytes, so at most four tokens."""


class TextOfTokens(Protocol):
    """What a WindowStream needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens; bytes that are no UTF-8 become U+FFFD."""

    def has_text(self, token_id: int) -> bool:
        """Whether the token is one of text."""


class ByteStream:
    """Turns the tokens of one answer into text, where each stands for bytes. Not for several threads.

    Args:
        bytes_of: a token's bytes; none for one without text.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; "" within a character of several bytes."""
        return self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        """The rest at the end of the answer: "" unless it broke off within a character."""
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """Turns the tokens of one answer into text as they come, whatever the tokenizer. Not for several threads.

    A character may be spread over several tokens, and a token's text may depend on the one before it (a leading space
    is dropped at the start of a text). So the last few tokens are decoded again together with each new one, and what
    is new is given out as soon as it ends in a whole character.
    """

    def __init__(self, tokenizer: TextOfTokens) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._context_tokens = 0
        """Leading tokens of the window whose text has been given out whole."""
        self._given_chars = 0
        """Characters of the window's text that have been given out."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often "" within a character of several bytes."""
        if not self._tokenizer.has_text(token_id):
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        is_cut = text.endswith(_REPLACEMENT)
        if is_cut and len(self._window) - self._context_tokens < _MAX_PENDING_TOKENS:
            return ""
        # Bytes that never become a character: all but the last are certain to be none.
        certain = text[:-1] if is_cut else text
        new = certain[self._given_chars :]
        self._slide(is_cut=is_cut)
        return new

    def flush(self) -> str:
        """The rest at the end of the answer: "" unless it broke off within a character."""
        rest = self._tokenizer.decode(self._window)[self._given_chars :]
        self._window, self._context_tokens, self._given_chars = [], 0, 0
        return rest

    def _slide(self, *, is_cut: bool) -> None:
        keep = _MAX_PENDING_TOKENS // 2 if is_cut else len(self._window) - self._context_tokens
        self._window = self._window[-keep:]
        self._context_tokens = 0 if is_cut else len(self._window)
        self._given_chars = len(self._tokenizer.decode(self._window)) - is_cut


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a token that byte-level BPE writes as printable characters; an added token's are its own text."""
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token.encode()


def _printable_bytes() -> dict[str, int]:
    """The character that stands for each byte: itself where it is printable in Latin-1, else one from U+0100 on."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _printable_bytes()
