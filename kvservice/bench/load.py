"""Token ids to load a service with. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, islice

RANDOM_IDS = (10, 40_000)
"""Range of random token ids: that of the loads which other servers are measured with."""


def random_ids(rng: random.Random, num_tokens: int, vocab_size: int) -> list[int]:
    """A text of random tokens: its KV takes the time and room of any text's, and no two have a prefix in common."""
    low, high = RANDOM_IDS
    return [rng.randint(min(low, vocab_size - 1), min(high, vocab_size - 1)) for _ in range(num_tokens)]


def rotated_ids(text: Sequence[int], num_tokens: int, start: int) -> list[int]:
    """`num_tokens` tokens of a text that is repeated as often as needed, beginning at token `start`."""
    return list(islice(cycle(text), start % len(text), start % len(text) + num_tokens))
