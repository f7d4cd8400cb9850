from __future__ import annotations

import re

import grpc
import pytest

from kvservice import errors
from kvservice.errors import KVServiceError


def all_errors(base: type[KVServiceError] = KVServiceError) -> list[type[KVServiceError]]:
    return [base, *(error for child in base.__subclasses__() for error in all_errors(child))]


@pytest.mark.parametrize("error", all_errors())
def test_every_error_has_the_name_of_a_grpc_status(error: type[KVServiceError]) -> None:
    assert error.status in grpc.StatusCode.__members__
    assert error.status != "OK"


@pytest.mark.parametrize("error", all_errors())
def test_every_error_has_a_reason_that_programs_can_read(error: type[KVServiceError]) -> None:
    assert re.fullmatch(r"[a-z_]+", error("what happened").reason)


@pytest.mark.parametrize("error", all_errors())
def test_the_tree_in_the_docstring_names_every_error(error: type[KVServiceError]) -> None:
    assert error.__name__ in (errors.__doc__ or "")


def test_what_callers_are_told_is_kept() -> None:
    error = errors.Overloaded("no room", reason="device_full", field="session_id", retry_after_s=2.5)
    assert (str(error), error.reason, error.field, error.retry_after_s) == ("no room", "device_full", "session_id", 2.5)


def test_only_errors_that_may_pass_are_retryable() -> None:
    retryable = {error.__name__ for error in all_errors() if error.retryable}
    assert retryable == {"Conflict", "Overloaded", "QuotaExceeded", "Unavailable"}
