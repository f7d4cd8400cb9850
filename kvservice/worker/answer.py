"""Token ids of one answer to the text that may be shown. Knows nothing of engines or gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvservice.errors import InvalidRequest


class TokenStream(Protocol):
    """Turns token ids to text one at a time; holds back incomplete characters."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""

    def flush(self) -> str:
        """What is still held back, at the end of the answer."""


class AnswerText:
    """The text of one answer, cut before its first stop string.

    The first stop string is the one that is complete first; of two that end together, the longer. So the text is the
    same however the tokens split it.
    """

    def __init__(self, stream: TokenStream, stop: Sequence[str]) -> None:
        if "" in stop:
            raise InvalidRequest("stop holds an empty string: give at least one character", field="sampling.stop")
        self._stream = stream
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """A stop string was found; nothing more will be shown."""

    def push(self, token_id: int) -> str:
        """The text that may be shown now. What may be the beginning of a stop string is held back."""
        if self.stopped:
            return ""
        if not self._stop:
            return self._stream.push(token_id)
        text = self._held + self._stream.push(token_id)
        end = self._first_stop(text)
        if end is None:
            end = len(text) - self._longest_beginning(text)
            self._held = text[end:]
        else:
            self.stopped = True
        return text[:end]

    def finish(self) -> str:
        """The rest of the text, once no token follows."""
        if self.stopped:
            return ""
        text = self._held + self._stream.flush()
        self._held = ""
        end = self._first_stop(text)
        self.stopped = end is not None
        return text[:end]

    def _first_stop(self, text: str) -> int | None:
        """Where the first stop string begins."""
        # (end, start): the least is the one that ends first, and of those the longest.
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
