from __future__ import annotations

import pytest

from kvservice.engine.faults import NO_MEMORY, step_failure
from kvservice.errors import InternalError, Overloaded


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to …"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_memory_that_was_refused_is_a_refusal_that_may_pass(error):
    failure = step_failure(error)
    assert isinstance(failure, Overloaded)
    assert (failure.reason, failure.retryable) == (NO_MEMORY, True)


def test_anything_else_is_a_fault_whose_words_stay_inside():
    failure = step_failure(RuntimeError("secret"))
    assert isinstance(failure, InternalError)
    assert "secret" not in failure.message
