"""What is trained on: parts of texts, drawn by a seed and a number, so that a run that was cut off goes on alike."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvservice.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TrainingText:
    """One text.

    Attributes:
        name: of its file.
        sha256: of its file.
        token_ids: int32 `[n]`.
    """

    name: str
    sha256: str
    token_ids: Tensor


class Texts:
    """Some texts to draw parts from.

    Args:
        texts: shorter ones than `context` are left out.
        context: tokens of a part.

    Raises:
        ConfigError: none is long enough.
    """

    def __init__(self, texts: Sequence[TrainingText], context: int) -> None:
        self.texts = tuple(text for text in texts if text.token_ids.numel() >= context)
        self.context = context
        if not self.texts:
            raise ConfigError(f"none of {len(texts)} texts has {context:,} tokens: give longer ones, or less --context")
        # Half-way between one vote a text and one a token: no long text drowns the others.
        self._weights = [text.token_ids.numel() ** 0.5 for text in self.texts]

    @property
    def num_tokens(self) -> int:
        """Of all texts."""
        return sum(text.token_ids.numel() for text in self.texts)

    @property
    def digest(self) -> str:
        """32 hex digits that stand for the texts and what is drawn from them."""
        text = f"{self.context} {[text.sha256 for text in self.texts]}"
        return hashlib.blake2b(text.encode(), digest_size=16, person=b"kv1-train-texts").hexdigest()

    def part(self, seed: int, number: int) -> Tensor:
        """`context` tokens, int64: a function of the texts, the seed and the number."""
        drawn = random.Random(f"{seed} {number}")
        (text,) = drawn.choices(self.texts, self._weights)
        return self._cut(text, drawn)

    def one_of_each(self, seed: int) -> list[Tensor]:
        """One part of each text, likewise."""
        return [self._cut(text, random.Random(f"{seed} {text.sha256}")) for text in self.texts]

    def _cut(self, text: TrainingText, drawn: random.Random) -> Tensor:
        first = drawn.randint(0, text.token_ids.numel() - self.context)
        return text.token_ids[first : first + self.context].to(torch.int64)
