from __future__ import annotations

import pytest

from kvservice.drill.faults_of_machines import has_own_network
from kvservice.drill.outcomes import DataReport, Outcome, Probe, judge
from kvservice.drill.run import DEFAULT_PARTS, PARTS, plan
from kvservice.errors import ConfigError


def test_every_fault_has_a_name_of_its_own():
    names = plan(reduced=False).names
    assert len(names) == len(set(names))
    assert len(names) > 60


def test_reduced_form_is_a_part_of_the_whole():
    assert set(plan(reduced=True).names) < set(plan(reduced=False).names)


def test_part_of_a_name_chooses():
    found = plan(reduced=False, only=["disk full"])
    assert len(found.names) == 2
    assert not found.process_faults


@pytest.mark.parametrize("wanted", [{"parts": ["tiers"]}, {"only": ["no such fault"]}])
def test_what_there_is_not_is_refused(wanted):
    with pytest.raises(ConfigError):
        plan(reduced=False, **wanted)


@pytest.mark.skipif(has_own_network(), reason="this is a network that may be cut")
def test_network_that_others_use_is_not_cut():
    assert "network" in PARTS
    assert "network" not in DEFAULT_PARTS
    with pytest.raises(ConfigError, match="unshare"):
        plan(reduced=False, parts=["network"])


def test_answer_that_takes_too_long_is_found_where_its_time_is_limited():
    probe = Probe("cold", Outcome.SAME, seconds=9.0, usual_s=1.0)
    assert judge((probe,), 1.0, DataReport(), {}) == ()
    assert judge((probe,), 1.0, DataReport(), {}, most_s=10.0) == ()
    assert judge((probe,), 1.0, DataReport(), {}, most_s=5.0) == ("cold took 9.0 s: more than 5",)
