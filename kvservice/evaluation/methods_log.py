"""What `eval methods` has measured, kept as it comes: a run that was stopped goes on from it. Measures nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from kvservice.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Measured:
    """One recipe, budget and seed on one text; lists have a number for each forced token.

    Attributes:
        control: it is the method's broken twin.
        mass: of dense attention, what falls on held tokens, for every fourth token; empty where nothing is dropped.
        tokens_read: by a query in a KV head.
        tier_bytes: fetched from host memory for a token.
    """

    text: str
    recipe: str
    kept_tokens: int
    seed: int
    control: bool
    context: int
    kl: list[float]
    agrees: list[bool]
    nll: list[float]
    nll_dense: list[float]
    mass: list[float]
    device_bytes: int
    dense_bytes: int
    tokens_read: float
    tier_bytes: float
    ms_per_token: float

    @property
    def key(self) -> tuple[object, ...]:
        """What was measured."""
        return (self.text, self.recipe, self.kept_tokens, self.seed, self.control, self.context, len(self.kl))


@dataclass(frozen=True, slots=True)
class Asked:
    """One recipe and budget asked for the pass key of one case."""

    case: int
    recipe: str
    kept_tokens: int
    tokens: int
    seed: int
    is_correct: bool

    @property
    def key(self) -> tuple[object, ...]:
        """What was asked."""
        return (self.case, self.recipe, self.kept_tokens, self.tokens, self.seed)


class Log:
    """What has been measured, a line of JSON for each.

    Args:
        path: of the file; None: nothing is kept.

    Raises:
        ConfigError: the file holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._measured: dict[tuple[object, ...], Measured] = {}
        self._asked: dict[tuple[object, ...], Asked] = {}
        if path is None or not path.exists():
            return
        try:
            for line in path.read_text().splitlines():
                fields = json.loads(line)
                self._take(Asked(**fields) if "case" in fields else Measured(**fields))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} isn't a log of this command ({error}): name another file") from None

    def measured(self, *key: object) -> Measured | None:
        """What was measured before."""
        return self._measured.get(key)

    def asked(self, *key: object) -> Asked | None:
        """What was asked before."""
        return self._asked.get(key)

    def add(self, one: Measured | Asked) -> None:
        """Keeps one more."""
        self._take(one)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(one)) + "\n")

    def _take(self, one: Measured | Asked) -> None:
        if isinstance(one, Asked):
            self._asked[one.key] = one
        else:
            self._measured[one.key] = one
