"""What a step that failed means for its calls. Knows no step."""

from __future__ import annotations

from kvservice.errors import InternalError, KVServiceError, Overloaded

NO_MEMORY = "out_of_memory"
"""Reason of an Overloaded: the machine refused memory beyond what the ledger reserves."""

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
"""What torch says, and C++."""


def step_failure(error: Exception) -> KVServiceError:
    """What its calls are told. Where memory was refused nothing is wrong with the engine: others may have room."""
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)
    ):
        return Overloaded("the worker's machine has no memory left for a step: call again", reason=NO_MEMORY)
    return InternalError(f"a step failed: {type(error).__name__}")
