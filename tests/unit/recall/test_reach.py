from hypothesis import given
from hypothesis import strategies as st

from kvservice.recall.reach import Reach, ReachLog

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("compute"), st.integers(1, 9), st.sampled_from(Reach)),
        st.tuples(st.just("forget"), st.integers(0, 40), st.none()),
        st.tuples(st.just("truncate"), st.integers(0, 40), st.none()),
    ),
    max_size=30,
)


def read(log):
    """Each position's reach, run by run."""
    found = []
    while len(found) < log.end:
        reach, stop = log.at(len(found))
        assert stop > len(found)
        found += [reach] * (stop - len(found))
    assert len(found) == log.end
    return found


@given(STEPS)
def test_a_log_is_a_list_of_how_each_position_was_computed_first(steps):
    log, expected, computed = ReachLog(), [], 0
    for what, count, reach in steps:
        if what == "compute":
            log.record(computed, computed + count, reach)
            computed += count
            expected += [reach] * (computed - len(expected))
        elif what == "forget":
            computed = min(computed, count)
        else:
            computed = min(computed, count)
            log.truncate(count)
            del expected[count:]
        assert read(log) == expected
        full = next((i for i, each in enumerate(expected) if each is Reach.SELECT), len(expected))
        assert log.full_prefix == full


@given(STEPS)
def test_a_fork_of_a_log_goes_its_own_way(steps):
    log = ReachLog()
    log.record(0, 20, Reach.FULL)
    log.record(20, 30, Reach.SELECT)
    twin, before = log.fork(), read(log)
    for what, count, reach in steps:
        if what == "compute":
            twin.record(twin.end, twin.end + count, reach)
        else:
            twin.truncate(count)
    assert read(log) == before


def test_computing_again_with_another_reach_changes_no_record():
    log = ReachLog()
    log.record(0, 10, Reach.FULL)
    log.record(4, 14, Reach.SELECT)
    assert [log.at(9), log.at(10)] == [(Reach.FULL, 10), (Reach.SELECT, 14)]
