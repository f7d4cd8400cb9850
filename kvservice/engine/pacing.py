"""How much prefill a step may do beside decoding, so that nobody's tokens come too slowly. Knows no calls.

Prefill goes in chunks of tokens, and a chunk through the layers in spans, a span a step: a step may so take as little
of it as it likes, and a chunk is still large enough to use the machine well. What a step does is counted in
token-layers: tokens times layers, tokens that cost more counted as several.
"""

from __future__ import annotations

CHUNK_TOKENS = 128
"""A chunk beside decoding, unless a step may take a larger one whole: weights and distant KV are read once a chunk."""

LEAST_TOKENS = 16
"""A chunk is never smaller, and gets a layer of every step, whatever it costs: a document must come to an end."""

FIRST_GUESS_LAYERS = 2
"""Of a chunk, until a step has been measured."""

PROBE_STEPS = 32
"""Of so many steps that decode, one at least keeps prefill in a pass of its own, to learn what each takes by itself."""

SMOOTHING = 0.2
"""Weight of the newest measurement."""

MOST_STRETCH = 8.0
"""However many wait to be read, who decodes goes on: where a token takes 25 ms alone, as fast as people read."""


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
        self._num_decodes = 0
        self._decode_s: float | None = None
        self._token_layer_s: float | None = None
        self._steps_since_decodes = 0

    def chunk_tokens(
        self, num_decodes: int, num_waiting: int, budget: int, *, gives_way: bool = False, matched: int = 0
    ) -> int:
        """Tokens of the next chunk.

        Args:
            num_decodes: sequences that decode.
            num_waiting: sequences that wait to be read.
            budget: at most.
            gives_way: those that decode have to give way to it.
            matched: token-layers of others that aren't paced and pass it by: it may have as many beside its own.
        """
        if num_decodes == 0:
            return budget
        allowed = matched + self._allowed(num_decodes, num_waiting, gives_way=gives_way)
        return min(budget, max(LEAST_TOKENS, min(CHUNK_TOKENS, allowed), allowed // self._num_layers))

    def layers(
        self, num_decodes: int, num_waiting: int, num_tokens: int, *, gives_way: bool = False, matched: int = 0
    ) -> int:
        """How many layers further a chunk of `num_tokens` tokens may go in the next step; see `chunk_tokens`."""
        if num_decodes == 0:
            return self._num_layers
        allowed = matched + self._allowed(num_decodes, num_waiting, gives_way=gives_way)
        return min(self._num_layers, max(1, allowed // num_tokens))

    def may_merge(self, num_decodes: int) -> bool:
        """Whether prefill may go through all layers along with those that decode: one pass reads the weights once.

        Not if it isn't known, or was measured long ago, what so many take by themselves.
        """
        return num_decodes == 0 or (num_decodes == self._num_decodes and self._steps_since_decodes < PROBE_STEPS)

    def note_decodes(self, num_decodes: int, seconds: float) -> None:
        """Takes in what a pass took in which so many decode and nothing else happens."""
        known = self._decode_s if num_decodes == self._num_decodes else None
        self._decode_s = _smoothed(known, seconds)
        self._num_decodes = num_decodes
        self._steps_since_decodes = 0

    def note_prefill(self, token_layers: int, seconds: float) -> None:
        """Takes in what a pass of nothing but prefill took."""
        self._token_layer_s = _smoothed(self._token_layer_s, seconds / token_layers)

    def note_merged(self) -> None:
        """Takes in that a pass had both."""
        self._steps_since_decodes += 1

    def _allowed(self, num_decodes: int, num_waiting: int, *, gives_way: bool) -> int:
        """Token-layers of a mixed step."""
        if self._decode_s is None or self._token_layer_s is None:
            return FIRST_GUESS_LAYERS * CHUNK_TOKENS
        usual = fair_stretch(self._stretch, num_decodes, num_waiting)
        more = (max(usual, MOST_STRETCH) if gives_way else usual) - 1.0
        return int(more * self._decode_s / self._token_layer_s)


def fair_stretch(stretch: float, num_decodes: int, num_waiting: int) -> float:
    """How many times as long a step may take for those that wait to be read.

    The first adds what `stretch` allows. Each further one adds as much as each that decodes has of a step: a queue of
    documents doesn't stand still because one answer is under way, and decoding many at once is cheaper than one by one.

    Args:
        stretch: for one that waits.
        num_decodes: sequences that decode, at least one.
        num_waiting: sequences that wait to be read.
    """
    return min(stretch + (num_waiting - 1) / num_decodes, max(MOST_STRETCH, stretch))


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
