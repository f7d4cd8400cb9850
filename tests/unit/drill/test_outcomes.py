"""What is as it must be, and what isn't."""

from __future__ import annotations

import pytest

from kvservice.drill.outcomes import DataReport, Outcome, Probe, judge
from kvservice.drill.run import plan
from kvservice.errors import ConfigError

WELL = DataReport(checked_frames=3)


def judged(outcome, *, may_fail=False, recovered_s=1.0, data=WELL, misses=None, expects=()):
    probes = (Probe("cold", outcome, 1.0, error="UNAVAILABLE"),)
    return judge(probes, recovered_s, data, misses or {}, expects=frozenset(expects), may_fail=may_fail)


@pytest.mark.parametrize("outcome", [Outcome.SAME, Outcome.RECOMPUTED, Outcome.FLAGGED])
def test_right_or_flagged_answers_pass(outcome):
    assert judged(outcome) == ()


@pytest.mark.parametrize("outcome", [Outcome.WRONG, Outcome.HUNG])
def test_wrong_and_hung_never_pass(outcome):
    assert judged(outcome, may_fail=True)


def test_clear_errors_pass_only_where_they_may():
    assert judged(Outcome.ERROR) == ("cold: error (UNAVAILABLE)",)
    assert judged(Outcome.ERROR, may_fail=True) == ()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"recovered_s": None}, "did not recover"),
        ({"recovered_s": 12.0}, "12.0 s"),
        ({"data": DataReport(short_sessions=1)}, "less than was durable"),
        ({"data": DataReport(left_frames=2)}, "2 frames"),
        ({"expects": ("timeout", "breaker"), "misses": {"absent": 1}}, "breaker, timeout"),
    ],
)
def test_what_is_not_as_it_must_be_is_said(changes, word):
    (finding,) = judged(Outcome.SAME, **changes)
    assert word in finding


def test_reduced_plan_is_a_part_of_the_whole_one():
    whole, reduced = plan(reduced=False), plan(reduced=True)
    assert set(reduced.names) < set(whole.names)
    assert {fault.part for fault in reduced.faults} == {"tier", "machine"}
    assert plan(reduced=False, only=("MOVED",)).names == ("MOVED",)
    assert all("Append" in name for name in plan(reduced=False, parts=("process",), only=("Append",)).names)


@pytest.mark.parametrize("wrong", [{"parts": ("moon",)}, {"only": ("no such fault",)}])
def test_unknown_names_are_refused_with_those_known(wrong):
    with pytest.raises(ConfigError, match="there are"):
        plan(reduced=False, **wrong)
