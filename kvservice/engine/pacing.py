"""How many prefill tokens a step may take beside decoding, so that nobody's tokens come too slowly. Knows no calls."""

from __future__ import annotations

LEAST_TOKENS = 16
"""Prefill gets this much of every step, whatever it costs: a document must come to an end."""

FIRST_GUESS_TOKENS = 64
"""Until a step has been measured."""

SMOOTHING = 0.2
"""Weight of the newest measurement."""


class Pace:
    """Learns what steps cost, and plans the prefill of a mixed one.

    Args:
        stretch: a step that decodes may take this many times as long as it would without prefill.
    """

    def __init__(self, stretch: float) -> None:
        self._stretch = stretch
        self._decode_s: float | None = None
        self._token_s: float | None = None

    def prefill_tokens(self, num_decodes: int, budget: int) -> int:
        """Prefill tokens of the next step, at most `budget`."""
        if num_decodes == 0:
            return budget
        if self._decode_s is None or self._token_s is None:
            return min(budget, FIRST_GUESS_TOKENS)
        allowed = int((self._stretch - 1.0) * self._decode_s / self._token_s)
        return min(budget, max(LEAST_TOKENS, allowed))

    def note(self, num_decodes: int, num_prefill: int, seconds: float) -> None:
        """Takes in what a step took."""
        if num_decodes and not num_prefill:
            self._decode_s = _smoothed(self._decode_s, seconds)
        elif num_decodes and self._decode_s is not None:
            extra = max(seconds - self._decode_s, 0.01 * self._decode_s)
            self._token_s = _smoothed(self._token_s, extra / num_prefill)


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
