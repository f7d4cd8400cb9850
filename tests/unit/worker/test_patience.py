"""How long stored KV is waited for, and what isn't asked for twice."""

from __future__ import annotations

import pytest

from kvservice.types import SessionId
from kvservice.worker.patience import LEAST_S, MAX_KNOWN, MOST_S, KnownMissing, fetch_timeout_s

S = SessionId("s")


@pytest.mark.parametrize(
    ("left_s", "compute_s", "expected"),
    [
        (None, None, MOST_S),
        (None, 0.1, LEAST_S),
        (None, 3.0, 3.0),
        (None, 60.0, MOST_S),
        (4.0, None, 2.0),
        (10.0, 3.0, 3.0),
        (8.0, 3.0, 2.0),
        (5.0, 3.0, 0.0),
        (-1.0, None, 0.0),
    ],
)
def test_fetch_takes_no_longer_than_computing_and_leaves_time_for_it(left_s, compute_s, expected):
    assert fetch_timeout_s(left_s, compute_s) == pytest.approx(expected)


def test_what_is_gone_is_known_until_another_manifest_comes():
    known = KnownMissing()
    known.note(S, 3, 7, 5, {"absent": 2, "checksum": 1})
    assert known.groups(S, 3, 7) == 5
    assert known.groups(S, 3, 8) is None
    assert known.groups(S, 4, 7) is None
    assert known.groups(SessionId("other"), 3, 7) is None


@pytest.mark.parametrize("misses", [{}, {"timeout": 1}, {"absent": 1, "breaker": 1}])
def test_what_may_come_another_day_is_asked_for_again(misses):
    known = KnownMissing()
    known.note(S, 3, 7, 5, {"absent": 1})
    known.note(S, 3, 7, 5, misses)
    assert known.groups(S, 3, 7) is None


def test_the_oldest_knowledge_goes_first():
    known = KnownMissing()
    for index in range(MAX_KNOWN + 1):
        known.note(SessionId(str(index)), 1, 1, 0, {"absent": 1})
    assert known.groups(SessionId("0"), 1, 1) is None
    assert known.groups(SessionId(str(MAX_KNOWN)), 1, 1) == 0
