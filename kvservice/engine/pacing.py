"""How much prefill a step may do beside decoding, so that nobody's tokens come too slowly. Knows no calls.

Prefill goes in chunks of tokens, and a chunk through the layers in spans, a span a step: a step may so take as little
of it as it likes, and a chunk is still large enough to use the machine well. What a step does is counted in
token-layers: tokens times layers.
"""

from __future__ import annotations

CHUNK_TOKENS = 128
"""A chunk beside decoding, unless a step may take a larger one whole: weights and distant KV are read once a chunk."""

LEAST_TOKENS = 16
"""A chunk is never smaller, and gets a layer of every step, whatever it costs: a document must come to an end."""

FIRST_GUESS_LAYERS = 2
"""Of a chunk, until a step has been measured."""

PROBE_STEPS = 32
"""Of so many steps that decode, one goes without prefill, to learn what decoding takes by itself."""

SMOOTHING = 0.2
"""Weight of the newest measurement."""

MOST_STRETCH = 4.0
"""However many wait to be read: who decodes goes on faster than people read."""


class Pace:
    """Learns what steps cost, and plans the prefill of a mixed one.

    Args:
        stretch: a step that decodes may take this many times as long as it would without prefill, if one other
            sequence waits to be read.
        num_layers: of the model.
    """

    def __init__(self, stretch: float, num_layers: int) -> None:
        self._stretch = stretch
        self._num_layers = num_layers
        self._decode_s: float | None = None
        self._token_layer_s: float | None = None
        self._steps_since_probe = 0

    def chunk_tokens(self, num_decodes: int, num_waiting: int, budget: int) -> int:
        """Tokens of the next chunk, at most `budget`."""
        if num_decodes == 0:
            return budget
        allowed = self._allowed(num_decodes, num_waiting)
        return min(budget, max(LEAST_TOKENS, min(CHUNK_TOKENS, allowed), allowed // self._num_layers))

    def layers(self, num_decodes: int, num_waiting: int, num_tokens: int) -> int:
        """How many layers further a chunk of `num_tokens` tokens may go in the next step; 0: it must wait."""
        if num_decodes == 0:
            return self._num_layers
        if self._steps_since_probe >= PROBE_STEPS:
            return 0
        return min(self._num_layers, max(1, self._allowed(num_decodes, num_waiting) // num_tokens))

    def note(self, num_decodes: int, token_layers: int, seconds: float) -> None:
        """Takes in what a step took."""
        if num_decodes and not token_layers:
            self._decode_s = _smoothed(self._decode_s, seconds)
            self._steps_since_probe = 0
        elif num_decodes:
            self._steps_since_probe += 1
            if self._decode_s is not None:
                extra = max(seconds - self._decode_s, 0.01 * self._decode_s)
                self._token_layer_s = _smoothed(self._token_layer_s, extra / token_layers)

    def _allowed(self, num_decodes: int, num_waiting: int) -> int:
        """Token-layers of a mixed step."""
        if self._decode_s is None or self._token_layer_s is None:
            return FIRST_GUESS_LAYERS * CHUNK_TOKENS
        more = fair_stretch(self._stretch, num_decodes, num_waiting) - 1.0
        return int(more * self._decode_s / self._token_layer_s)


def fair_stretch(stretch: float, num_decodes: int, num_waiting: int) -> float:
    """How many times as long a step may take for those that wait to be read.

    One that waits adds what `stretch` allows. Several add as much each, or as much as each that decodes has of a step,
    whichever is less: a queue of documents doesn't stand still because one answer is under way.

    Args:
        stretch: for one that waits.
        num_decodes: sequences that decode, at least one.
        num_waiting: sequences that wait to be read.
    """
    for_one = stretch - 1.0
    for_all = max(for_one, num_waiting * min(for_one, 1.0 / num_decodes))
    return 1.0 + min(for_all, max(MOST_STRETCH - 1.0, for_one))


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
