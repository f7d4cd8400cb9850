"""The policy between tenants, driven by a server of one place that serves whoever goes first, a slice at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.internal.fair import FairShares, Price, Turn, cannot_meet, expected_answer_tokens

SLICE = 0.125


@dataclass(eq=False)
class Call:
    turn: Turn
    left: float
    came: float
    actual: float


class Server:
    """Always serves the call that goes first, and may put another before it after each slice."""

    def __init__(self) -> None:
        self.shares = FairShares()
        self.now = 0.0
        self.calls: list[Call] = []
        self.done: list[tuple[Call, float]] = []
        self.served: dict[object, float] = {}

    def add(
        self, tenant: object, seconds: float, weight: float = 1.0, actual: float | None = None, priority: int = 0
    ) -> Call:
        actual = seconds if actual is None else actual
        call = Call(self.shares.join(tenant, seconds, weight, priority=priority), actual, self.now, actual)
        self.calls.append(call)
        return call

    def slice(self) -> None:
        call = min(self.calls, key=lambda each: each.turn.order)
        self.shares.serve(call.turn)
        part = min(SLICE, call.left)
        call.left -= part
        call.turn.count(part)
        self.now += part
        self.served[call.turn.tenant] = self.served.get(call.turn.tenant, 0.0) + part
        if call.left <= 1e-9:
            self.calls.remove(call)
            self.shares.leave(call.turn, call.actual)
            self.done.append((call, self.now))

    def waiting(self, tenant: object) -> int:
        return sum(call.turn.tenant == tenant for call in self.calls)

    def until_done(self, call: Call) -> float:
        """Seconds from its arrival to its end."""
        while call in self.calls:
            self.slice()
        return next(end for other, end in self.done if other is call) - call.came

    def keep_busy(self, tenants: dict[object, tuple[float, list[float]]], seconds: float) -> None:
        """So long, each tenant always has two calls waiting; theirs take what the lists say, over and over."""
        made = dict.fromkeys(tenants, 0)
        until = self.now + seconds
        while self.now < until:
            for tenant, (weight, sizes) in tenants.items():
                while self.waiting(tenant) < 2:
                    self.add(tenant, sizes[made[tenant] % len(sizes)], weight)
                    made[tenant] += 1
            self.slice()


sizes = st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]), min_size=1, max_size=5)
weights = st.sampled_from([0.5, 1.0, 2.0, 3.0])


@given(st.lists(st.tuples(weights, sizes), min_size=2, max_size=5))
def test_shares_come_to_the_weights_whatever_the_calls_sizes(tenants) -> None:
    server = Server()
    server.keep_busy(dict(enumerate(tenants)), 200.0)
    of_weight = [server.served[tenant] / weight for tenant, (weight, _) in enumerate(tenants)]
    # Nobody is ahead of anybody by more than a few calls of the largest size, however long it goes on.
    most = max(max(sizes) / weight for weight, sizes in tenants)
    assert max(of_weight) - min(of_weight) <= 3 * most


@given(st.lists(st.tuples(weights, sizes), min_size=1, max_size=4), st.floats(1.0, 60.0))
def test_a_tenant_that_was_idle_gets_no_more_than_a_head_start_of_a_call(others, idle_s) -> None:
    server = Server()
    tenants: dict[object, tuple[float, list[float]]] = dict(enumerate(others))
    server.add("idler", 1.0)
    server.keep_busy(tenants, idle_s)
    before = dict(server.served)
    server.keep_busy({**tenants, "idler": (1.0, [1.0])}, 100.0)
    gained = {tenant: server.served[tenant] - before.get(tenant, 0.0) for tenant in server.served}
    most = max(1.0, *(max(sizes) / weight for weight, sizes in others))
    for tenant, (weight, _) in enumerate(others):
        assert gained["idler"] - gained[tenant] / weight <= 4 * most


@given(sizes, st.floats(0.0, 30.0))
def test_a_newcomer_has_half_of_the_time_and_waits_for_no_more_than_one_call_of_a_flood(flood, after_s) -> None:
    server = Server()
    for _ in range(50):
        for seconds in flood:
            server.add("flood", seconds)
    while server.now < after_s and server.calls:
        server.slice()
    if not server.calls:
        return
    one = server.add("one", 1.0)
    assert server.until_done(one) <= 2.0 + max(flood) + SLICE


@pytest.mark.parametrize("after_s", [0.0, 0.1, 1.0, 7.3])
def test_a_newcomer_whose_call_is_like_those_of_the_flood_is_served_at_once(after_s: float) -> None:
    server = Server()
    for _ in range(50):
        server.add("flood", 1.0)
    server.slice()
    while server.now < after_s:
        server.slice()
    assert server.until_done(server.add("one", 1.0)) <= 1.0 + SLICE


@given(
    st.lists(st.tuples(st.sampled_from([0.25, 1.0, 4.0]), st.integers(-2, 2)), min_size=1, max_size=30),
    st.integers(0, 40),
)
def test_priorities_order_a_tenants_calls_and_leave_anothers_as_they_are(arrivals, slices) -> None:
    """Ann's calls come one by one, so that each may go before one of hers that is being served; Bob's are there."""

    def serve(priorities: bool) -> tuple[Server, list[Call]]:
        server = Server()
        bob = [server.add("bob", 1.0) for _ in range(5)]
        for seconds, priority in arrivals:
            server.add("ann", seconds, priority=priority if priorities else 0)
            for _ in range(min(slices, 4)):
                server.slice()
        while server.calls:
            server.slice()
        return server, bob

    ends = []
    for priorities in (False, True):
        server, bob = serve(priorities)
        assert len(server.done) == len(arrivals) + 5
        ends.append([next(end for other, end in server.done if other is call) for call in bob])
    # She may have a call of hers begun, and another one go before it: what she is ahead by is one call at most.
    assert all(after <= before + 2 * 4.0 + SLICE for before, after in zip(*ends, strict=True))


def test_of_one_tenant_the_highest_priority_goes_first_and_equals_as_they_came() -> None:
    server = Server()
    calls = [server.add("ann", 1.0, priority=priority) for priority in (0, 5, -1, 5, 0)]
    while server.calls:
        server.slice()
    assert [calls.index(call) for call, _ in server.done] == [1, 3, 0, 4, 2]


def test_priorities_that_rise_for_ever_starve_nobody() -> None:
    server = Server()
    server.add("ann", 4.0)
    server.slice()
    one = server.add("bob", 4.0)
    for priority in range(1, 200):
        if one not in server.calls:
            break
        # What she began waits, nearly done; it isn't forgotten that she had it.
        server.add("ann", 4.0, priority=priority)
        for _ in range(31):
            server.slice()
    assert priority <= 4


def test_a_call_that_is_given_up_moves_those_behind_it_up_again() -> None:
    shares = FairShares()
    first, second = shares.join("a", 1.0), shares.join("a", 2.0)
    orders = first.order, second.order
    shares.leave(shares.join("a", 8.0, priority=1), 0.0)
    assert (first.order, second.order) == pytest.approx(orders)
    shares.leave(first, 0.0)
    assert second.order == pytest.approx(2.0)


def test_nobody_starves_while_new_tenants_come_for_ever() -> None:
    server = Server()
    server.add("old", 1.0)
    server.slice()
    waits = server.add("old", 1.0)
    for newcomer in range(1000):
        if waits not in server.calls:
            break
        server.until_done(server.add(newcomer, 1.0))
    assert waits not in server.calls
    assert newcomer <= 10


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.25, 1.0, 3.0])), min_size=1, max_size=40))
def test_all_is_served_and_a_tenants_calls_in_their_order(arrivals) -> None:
    server = Server()
    for tenant, seconds in arrivals:
        server.add(tenant, seconds)
    while server.calls:
        server.slice()
    # Work conserving: there was always somebody who went first.
    assert server.now == pytest.approx(sum(seconds for _, seconds in arrivals))
    for tenant in {tenant for tenant, _ in arrivals}:
        came = [call.turn.order for call, _ in server.done if call.turn.tenant == tenant]
        assert came == sorted(came)


def test_who_takes_more_than_was_predicted_pays_for_it() -> None:
    server = Server()
    while server.now < 300.0:
        for tenant, actual in (("long", 2.0), ("short", 1.0)):
            while server.waiting(tenant) < 2:
                server.add(tenant, 1.0, actual=actual)
        server.slice()
    assert server.served["long"] == pytest.approx(server.served["short"], rel=0.05)


def test_calls_that_are_given_up_cost_nothing() -> None:
    shares = FairShares()
    for turn in [shares.join("a", 10.0) for _ in range(5)]:
        shares.leave(turn, 0.0)
    assert shares.join("a", 1.0).order == FairShares().join("a", 1.0).order


def test_tenants_that_went_are_forgotten() -> None:
    shares = FairShares()
    for tenant in range(5000):
        turn = shares.join(tenant, 1.0)
        shares.serve(turn)
        shares.leave(turn, 1.0)
    assert len(shares._accounts) <= 1001


def test_an_answer_counts_by_measured_speeds_and_is_guessed_until_then() -> None:
    assert Price.of(0.0, 0.0).seconds(1000, 100) == pytest.approx(2.0)
    assert Price.of(1000.0, 50.0).seconds(1000, 100) == pytest.approx(3.0)
    # However fast it is: shares don't change when the machine gets slower.
    assert Price.of(10.0, 0.5) == Price.of(1000.0, 50.0)
    assert Price.of(10.0, 100.0).answer_reads == 1.0
    assert Price.of(1e9, 1.0).answer_reads == 100.0
    assert expected_answer_tokens(10, 2) == 20
    assert expected_answer_tokens(4096, 1) == 64


def test_a_deadline_is_given_up_only_with_a_margin() -> None:
    assert cannot_meet(2.1, 1.0)
    assert not cannot_meet(1.9, 1.0)
    assert cannot_meet(0.1, 0.0)
    assert not cannot_meet(5.0, math.inf)
