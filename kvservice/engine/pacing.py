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


class Pace:
    """Learns what steps cost, and plans the prefill of a mixed one.

    Args:
        stretch: a step that decodes may take this many times as long as it would without prefill.
        num_layers: of the model.
    """

    def __init__(self, stretch: float, num_layers: int) -> None:
        self._stretch = stretch
        self._num_layers = num_layers
        self._decode_s: float | None = None
        self._token_layer_s: float | None = None
        self._steps_since_probe = 0

    def chunk_tokens(self, num_decodes: int, budget: int) -> int:
        """Tokens of the next chunk, at most `budget`."""
        if num_decodes == 0:
            return budget
        allowed = self._allowed()
        return min(budget, max(LEAST_TOKENS, min(CHUNK_TOKENS, allowed), allowed // self._num_layers))

    def layers(self, num_decodes: int, num_tokens: int) -> int:
        """How many layers further a chunk of `num_tokens` tokens may go in the next step; 0: it must wait."""
        if num_decodes == 0:
            return self._num_layers
        if self._steps_since_probe >= PROBE_STEPS:
            return 0
        return min(self._num_layers, max(1, self._allowed() // num_tokens))

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

    def _allowed(self) -> int:
        """Token-layers of a mixed step."""
        if self._decode_s is None or self._token_layer_s is None:
            return FIRST_GUESS_LAYERS * CHUNK_TOKENS
        return int((self._stretch - 1.0) * self._decode_s / self._token_layer_s)


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
