"""A mutational fuzzer with a kept corpus, guided by the lines of code that an input reaches. Knows no parser.

    corpus ─► choose, mutate ─► target ─► verdict: accepted, or refused with a reason ─► anything else is a finding
      ▲                            │
      └──── new verdict or lines ──┘

Lines are traced for a part of the inputs only, since tracing costs a hundred times the parser's own time.
"""

from __future__ import annotations

import hashlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

TRACE_EVERY = 64
MAX_INPUT_BYTES = 1 << 16
MAX_CORPUS = 4096
MAX_FINDINGS = 20
MOST_AT_ONCE = 4
"""Mutations of one input."""
NESTED = 100_000
INTERESTING = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    (1 << 64) - 1,
)
WORDS = (
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"Infinity",
    b'"',
    b"\\ud800",
    b"\xff\xfe",
    b"{}",
    b"[]",
    b"\0",
    b"\r\n",
    b"$-1\r\n",
)


class FalseAcceptanceError(Exception):
    """A parser took what it must refuse."""


@dataclass(frozen=True, slots=True)
class Target:
    """A parser to feed.

    Attributes:
        name: unique; the folder of its corpus.
        seeds: inputs that are right, or nearly.
        feed: gives the verdict; raises for nothing that a parser may rightly refuse.
        mend: makes what was mutated plausible again, such as by a new checksum.
        modules: path parts of the files whose lines are traced.
    """

    name: str
    seeds: Sequence[bytes]
    feed: Callable[[bytes], str]
    modules: Sequence[str]
    mend: Callable[[bytes], bytes] | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """What a parser did that it must not, and the input that had it do so."""

    what: str
    data: bytes


@dataclass(frozen=True, slots=True)
class FuzzReport:
    """What came of one target.

    Attributes:
        verdicts: inputs by verdict.
        corpus: inputs kept: each reaches lines or verdicts that those before it didn't.
        lines: of code that were reached.
    """

    target: str
    inputs: int
    seconds: float
    verdicts: Mapping[str, int]
    corpus: int
    lines: int
    findings: tuple[Finding, ...] = field(default=())


class Mutator:
    """Makes inputs of others."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._ways = (
            self._flip,
            self._set_byte,
            self._cut,
            self._drop,
            self._double,
            self._insert,
            self._number,
            self._word,
            self._splice,
        )

    def mutate(self, data: bytes, other: bytes) -> bytes:
        """`data`, changed in a few ways; `other` may lend parts."""
        changed = bytearray(data)
        for _ in range(self._rng.randint(1, MOST_AT_ONCE)):
            self._rng.choice(self._ways)(changed, other)
        if self._rng.random() < 0.0005:
            changed[:] = self._rng.choice((b"[", b'{"a":', b"(", b"*1\r\n")) * NESTED
        del changed[MAX_INPUT_BYTES + NESTED * 5 :]
        return bytes(changed)

    def _place(self, data: bytearray) -> int:
        return self._rng.randrange(len(data)) if data else 0

    def _span(self, data: bytes | bytearray) -> slice:
        start = self._rng.randrange(len(data)) if data else 0
        return slice(start, start + self._rng.choice((1, 2, 4, 8, 16, 64)))

    def _flip(self, data: bytearray, other: bytes) -> None:
        del other
        if data:
            data[self._place(data)] ^= 1 << self._rng.randrange(8)

    def _set_byte(self, data: bytearray, other: bytes) -> None:
        del other
        if data:
            data[self._place(data)] = self._rng.choice((0, 1, 0x20, 0x7F, 0x80, 0xFF, self._rng.randrange(256)))

    def _cut(self, data: bytearray, other: bytes) -> None:
        del other
        del data[self._place(data) :]

    def _drop(self, data: bytearray, other: bytes) -> None:
        del other
        del data[self._span(data)]

    def _double(self, data: bytearray, other: bytes) -> None:
        del other
        span = self._span(data)
        data[span.start : span.start] = bytes(data[span]) * self._rng.choice((1, 1, 2, 16))

    def _insert(self, data: bytearray, other: bytes) -> None:
        del other
        place = self._place(data)
        data[place:place] = self._rng.randbytes(self._rng.choice((1, 2, 4, 8)))

    def _number(self, data: bytearray, other: bytes) -> None:
        del other
        width = self._rng.choice((1, 2, 4, 8))
        number = self._rng.choice(INTERESTING) % (1 << 8 * width)
        place = self._place(data)
        data[place : place + width] = number.to_bytes(width, "little")

    def _word(self, data: bytearray, other: bytes) -> None:
        del other
        place = self._place(data)
        data[place : place + self._rng.choice((0, 1, 4))] = self._rng.choice(WORDS)

    def _splice(self, data: bytearray, other: bytes) -> None:
        place = self._place(data)
        data[place:] = other[self._rng.randrange(len(other)) if other else 0 :]


class _Lines:
    """Which lines of some modules have been reached."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = tuple(modules)
        self._wanted: dict[CodeType, bool] = {}
        self.reached: set[tuple[str, int]] = set()

    def traced(self, feed: Callable[[bytes], str], data: bytes) -> tuple[str, bool]:
        """The verdict, and whether any line was new."""
        before = len(self.reached)
        outer = sys.gettrace()
        sys.settrace(self._trace)
        try:
            verdict = feed(data)
        finally:
            sys.settrace(outer)
        return verdict, len(self.reached) > before

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:  # noqa: ANN401 -- as sys.settrace wants it
        code = frame.f_code
        wanted = self._wanted.get(code)
        if wanted is None:
            wanted = self._wanted[code] = any(part in code.co_filename for part in self._modules)
        if not wanted:
            return None
        if event == "line":
            self.reached.add((code.co_filename, frame.f_lineno))
        return self._trace


class Fuzzer:
    """Feeds one target.

    Args:
        target: what is fed.
        seed: of all that is random.
        folder: of kept corpora; None: only the seeds are known, and nothing is kept.
    """

    def __init__(self, target: Target, seed: int, folder: Path | None) -> None:
        self._target = target
        self._rng = random.Random(f"{target.name} {seed}")
        self._mutator = Mutator(self._rng)
        self._folder = folder / target.name if folder is not None else None
        self._lines = _Lines(target.modules)
        self._corpus: list[bytes] = []
        self._verdicts: Counter[str] = Counter()
        self._findings: list[Finding] = []

    def run(self, inputs: int, report: Callable[[int], None]) -> FuzzReport:
        """Feeds the corpus, then so many inputs made of it. Blocks. `report` gets how many are through."""
        started = time.monotonic()
        known = list(dict.fromkeys([*self._target.seeds, *self._kept()]))
        for data in known:
            self._corpus.append(data)
            self._feed(data, is_traced=True)
        for index in range(inputs):
            data = self._mutator.mutate(self._rng.choice(self._corpus), self._rng.choice(self._corpus))
            if self._target.mend is not None:
                data = self._target.mend(data)
            if self._feed(data, is_traced=index % TRACE_EVERY == 0) and self._has_room(data):
                self._corpus.append(data)
                self._keep(data, "")
            if index % 1000 == 999:
                report(index + 1)
            if len(self._findings) >= MAX_FINDINGS:
                break
        return FuzzReport(
            self._target.name,
            sum(self._verdicts.values()),
            time.monotonic() - started,
            dict(self._verdicts),
            len(self._corpus),
            len(self._lines.reached),
            tuple(self._findings),
        )

    def _has_room(self, data: bytes) -> bool:
        return len(self._corpus) < MAX_CORPUS and len(data) <= MAX_INPUT_BYTES

    def _feed(self, data: bytes, *, is_traced: bool) -> bool:
        """Whether the input is worth keeping."""
        is_new = False
        try:
            if is_traced:
                verdict, is_new = self._lines.traced(self._target.feed, data)
            else:
                verdict = self._target.feed(data)
        except Exception as error:  # noqa: BLE001 -- whatever a parser fails with is what a fuzzer is there to find
            verdict = f"crash: {type(error).__name__}"
            if verdict not in self._verdicts or isinstance(error, FalseAcceptanceError):
                self._findings.append(Finding(f"{type(error).__name__}: {error}"[:300], data))
                self._keep(data, "finding-")
        is_new |= verdict not in self._verdicts
        self._verdicts[verdict] += 1
        return is_new

    def _kept(self) -> Iterator[bytes]:
        if self._folder is not None and self._folder.is_dir():
            for path in sorted(self._folder.iterdir()):
                yield path.read_bytes()

    def _keep(self, data: bytes, prefix: str) -> None:
        if self._folder is not None and len(data) <= MAX_INPUT_BYTES:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{prefix}{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
