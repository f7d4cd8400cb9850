"""What is asked in the demonstration, and what a session under one recipe came to. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvservice.client import AppendResult, Finished
from kvservice.types import KvTelemetry


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and the beginning of the answer, which the model then completes."""

    text: str
    lead: str
    max_new_tokens: int

    @property
    def prompt(self) -> str:
        """The raw form: a small model answers a long document better when it only has to go on."""
        return f"\n{self.text} {self.lead}"


@dataclass(slots=True)
class Reader:
    """A session under one recipe, and what it came to."""

    recipe: str
    session_id: str
    read: AppendResult
    answers: list[str] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)

    def has_answered(self, pass_key: str) -> bool:
        """Whether the first number of the first answer is the pass key."""
        numbers = "".join(character if character.isdigit() else " " for character in self.answers[0]).split()
        return numbers[:1] == [pass_key]

    @property
    def kv(self) -> KvTelemetry:
        """Where its bytes were when it had answered last."""
        return self.finished[-1].kv

    @property
    def device_bytes(self) -> int:
        """All of its KV on the device, the index included."""
        return self.kv.window_bytes + self.kv.index_bytes + self.kv.slot_bytes

    @property
    def off_device(self) -> float:
        """Share of its exact KV, of all its tokens, that wasn't on the device. The index isn't exact KV."""
        # Blocks round up, so `dense` holds a little more than its tokens take.
        return max(0.0, 1 - (self.kv.window_bytes + self.kv.slot_bytes) / self.kv.dense_bytes)

    @property
    def hit_rate(self) -> float | None:
        """Recalled cells that were on the device already, over all answers; None without recall."""
        lookups = sum(one.kv.recall_lookups for one in self.finished)
        return sum(one.kv.recall_hits for one in self.finished) / lookups if lookups else None

    @property
    def ttft_ms(self) -> float:
        """To the first token, mean over the answers."""
        return sum(one.timings.ttft_ms for one in self.finished) / len(self.finished)

    @property
    def ms_per_token(self) -> float:
        """Of every token but the first of each answer."""
        tokens = sum(one.usage.completion_tokens - 1 for one in self.finished)
        return sum(one.timings.decode_ms for one in self.finished) / max(1, tokens)
