"""Prompts that hide one or two numbers in a long text. Pure text; token counts come from the caller.

The form is that of the passkey test of Mohtashami and Jaggi, "Landmark Attention", arXiv:2305.16300, §4.2, as raw text
that the model completes: small models lose long contexts in chat form even under `dense`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from kvservice.errors import InvalidRequest

OPENING = "There is important information hidden in the following text. Find it and memorize it.\n"
NAMES = ("pass key", "door code")
"""What is hidden. The second is ours: the test has one."""
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
DEPTHS_PERCENT = (5, 25, 50, 75, 95)

CountTokens = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Needle:
    """A number in the haystack, and how deep it lies."""

    name: str
    number: str
    depth_percent: int

    @property
    def sentence(self) -> str:
        """What hides it."""
        return f"The {self.name} is {self.number}. Remember it. {self.number} is the {self.name}."

    @property
    def question(self) -> str:
        """What asks for it."""
        return f"\nWhat is the {self.name}? The {self.name} is"


@dataclass(frozen=True, slots=True)
class PasskeyCase:
    """One text, and what must be answered."""

    document: str
    needles: tuple[Needle, ...]


def noise_units() -> list[str]:
    """The repeated sentences of the original test."""
    return [NOISE]


def prose_units(text: str) -> list[str]:
    """A text's paragraphs, each on a line of its own with an empty line behind it.

    Raises:
        InvalidRequest: there is no text.
    """
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    units = [f"{paragraph}\n\n" for paragraph in paragraphs if paragraph]
    if not units:
        raise InvalidRequest("the haystack's text is empty: give a file with prose")
    return units


def make_cases(
    units: Sequence[str],
    *,
    is_prose: bool,
    num_tokens: int,
    num_cases: int,
    seed: int,
    count: CountTokens,
    num_needles: int = 1,
) -> list[PasskeyCase]:
    """Cases at the depths in turn, each with numbers of its own. A second needle lies two depths further on.

    Units are repeated when they are too few. In prose, each round of the depths starts at another paragraph.

    Args:
        units: what the haystack is made of, in order.
        is_prose: whether a needle stands on a line of its own.
        num_tokens: what document and question take at most.
        num_cases: how many.
        seed: of the numbers.
        count: tokens of a text.
        num_needles: in each text, one or two.

    Raises:
        InvalidRequest: not one unit fits.
    """
    rng = random.Random(seed)
    cases = []
    for number in range(num_cases):
        needles = [
            Needle(name, str(rng.randint(10_000, 99_999)), DEPTHS_PERCENT[(number + 2 * place) % len(DEPTHS_PERCENT)])
            for place, name in enumerate(NAMES[:num_needles])
        ]
        end = "\n\n" if is_prose else " "
        room = num_tokens - count(OPENING + "".join(needle.sentence + end for needle in needles))
        room -= max(count(needle.question) for needle in needles)
        start = number // len(DEPTHS_PERCENT) * (len(units) // 5) % len(units)
        hay = _fill(islice(cycle(units), start, None), room, count)
        if not hay:
            raise InvalidRequest(f"--tokens {num_tokens}: too few for one paragraph of the haystack; ask for more")
        # The deepest first, so that none moves another.
        for needle in sorted(needles, key=lambda needle: -needle.depth_percent):
            hay = _hide(hay, needle.sentence + end, needle.depth_percent)
        cases.append(PasskeyCase(OPENING + "".join(hay).rstrip(), tuple(needles)))
    return cases


def is_answered(answer: str, number: str) -> bool:
    """Whether the first number in the answer is the hidden one."""
    digits = "".join(character if character.isdigit() else " " for character in answer).split()
    return digits[:1] == [number]


def _fill(units: Iterable[str], room: int, count: CountTokens) -> list[str]:
    hay: list[str] = []
    for unit in units:
        room -= count(unit)
        if room < 0:
            break
        hay.append(unit)
    return hay


def _hide(hay: Sequence[str], hidden: str, depth_percent: int) -> list[str]:
    """Puts the needle before the first unit that begins at or behind the depth, measured in characters."""
    target = sum(len(unit) for unit in hay) * depth_percent / 100
    before = 0
    for index, unit in enumerate(hay):
        if before >= target:
            return [*hay[:index], hidden, *hay[index:]]
        before += len(unit)
    return [*hay, hidden]
