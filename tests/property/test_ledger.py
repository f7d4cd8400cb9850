"""Whatever is done to a ledger and in whatever order, its sum is that of a slow model that forgets nothing."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from redis import Redis

from kvservice.errors import Conflict, LimitExceeded
from kvservice.store.base import StateStore
from kvservice.store.ledger import Held, Position, split_bytes
from kvservice.store.manifests import Manifest
from kvservice.store.memory import MemoryStateStore
from kvservice.store.redis import RedisStateStore
from kvservice.types import SessionId, TenantId, WorkerId

ANN = TenantId("ann")
QUOTA = 1000
SESSIONS = st.sampled_from([SessionId(name) for name in "abc"])
WORKERS = st.sampled_from([WorkerId("v"), WorkerId("w")])
RESERVATIONS = st.sampled_from(["p", "q"])
BYTES = st.integers(0, 600)
SHARED = st.dictionaries(SESSIONS, BYTES, max_size=2)
TTLS = st.sampled_from([10.0, 30.0, 100.0])


@dataclass
class Lease:
    """A session in the model."""

    worker: str
    epoch: int
    version: int
    until: float
    homes: dict[str, int] = field(default_factory=dict)


class Model:
    """All leases and reservations there ever were; it looks at every one each time."""

    def __init__(self) -> None:
        # A server drops keys by its own clock.
        self.now = float(int(time.time()))
        self.leases: dict[str, Lease] = {}
        self.reservations: dict[str, tuple[int, float]] = {}

    def live(self) -> dict[str, Lease]:
        return {name: lease for name, lease in self.leases.items() if lease.until > self.now}

    def stored(self, leases: dict[str, Lease] | None = None) -> int:
        leases = self.live() if leases is None else leases
        homes = {home for lease in leases.values() for home in lease.homes}
        return sum(max(lease.homes.get(home, 0) for lease in leases.values()) for home in homes)

    def reserved(self) -> int:
        return sum(num_bytes for num_bytes, until in self.reservations.values() if until > self.now)

    def reservation(self, name: str) -> int:
        num_bytes, until = self.reservations.get(name, (0, 0.0))
        return num_bytes if until > self.now else 0


class LedgerMachine(RuleBasedStateMachine):
    """Reserves, acquires, publishes, renews, deletes and lets time pass."""

    acquisitions = Bundle("acquisitions")

    @initialize()
    def begin(self) -> None:
        self.model = Model()
        self.loop = asyncio.new_event_loop()
        self.store = self.make_store()
        self.ledger = self.store.ledger
        self.last_epoch = 0

    def make_store(self) -> StateStore:
        return MemoryStateStore(lambda: self.model.now, QUOTA)

    def run(self, awaitable):
        return self.loop.run_until_complete(awaitable)

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.run(self.store.aclose())
            self.loop.close()

    @rule(seconds=st.sampled_from([1.0, 10.0, 29.0, 100.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.model.now += seconds

    @rule(name=RESERVATIONS, num_bytes=BYTES, ttl_s=TTLS)
    def reserve(self, name: str, num_bytes: int, ttl_s: float) -> None:
        model, before = self.model, self.model.reservation(name)
        fits = model.stored() + model.reserved() - before + num_bytes <= QUOTA
        try:
            self.run(self.ledger.reserve_bytes(ANN, name, num_bytes, ttl_s))
        except LimitExceeded:
            assert not fits
            assert num_bytes > before
        else:
            assert fits or num_bytes <= before
            model.reservations[name] = (num_bytes, model.now + ttl_s)

    @rule(target=acquisitions, session_id=SESSIONS, worker=WORKERS, ttl_s=TTLS)
    def acquire(self, session_id: SessionId, worker: WorkerId, ttl_s: float) -> tuple[SessionId, int]:
        at = self.run(self.ledger.acquire_session(ANN, session_id, worker, ttl_s))
        assert at.epoch > self.last_epoch
        self.last_epoch = at.epoch
        until = self.model.now + ttl_s
        found = self.model.live().get(session_id) or Lease(worker, 0, 0, until)
        assert at.version == found.version
        self.model.leases[session_id] = Lease(worker, at.epoch, at.version, max(until, found.until), found.homes)
        return session_id, at.epoch

    @rule(
        by=acquisitions, own=BYTES, shared=st.dictionaries(SESSIONS, BYTES, max_size=2), ttl_s=TTLS, name=RESERVATIONS
    )
    def publish(
        self, by: tuple[SessionId, int], own: int, shared: dict[SessionId, int], ttl_s: float, name: str
    ) -> None:
        session_id, epoch = by
        model, live = self.model, self.model.live()
        found = live.get(session_id)
        at = Position(found.epoch, found.version) if found else Position()
        homes = {**shared, session_id: own}
        known = {home for lease in live.values() for home in lease.homes}
        manifest = Manifest(session_id, ANN, b"t" * 16, b"f" * 16, epoch, 0, 0, 16)
        after = {**live, session_id: Lease("", 0, 0, 0.0, homes)}
        reserved, growth = model.reservation(name), model.stored(after) - model.stored()
        fits = growth <= reserved or model.stored() + model.reserved() - reserved + growth <= QUOTA
        publication = self.ledger.publish_manifest(manifest, at, bytes_by_home=homes, ttl_s=ttl_s, reservation_id=name)
        refused: Conflict | None = None
        try:
            kept = self.run(publication)
        except Conflict as error:
            refused = error
        except LimitExceeded:
            assert not fits
        else:
            assert fits
            assert epoch >= at.epoch
            assert kept.version == at.version + 1
            until = model.now + ttl_s
            worker = found.worker if found else ""
            lasts = max(until, found.until) if found else until
            elsewhere = {home for name, lease in live.items() if name != session_id for home in lease.homes}
            # A closed session's home that nobody names any more goes with the last one that did.
            gone = (found.homes.keys() if found else set()) - elsewhere - live.keys() - homes.keys()
            model.leases[session_id] = Lease(worker, epoch, kept.version, lasts, homes | dict.fromkeys(gone, 0))
            model.reservations.pop(name, None)
        if refused is not None:
            assert refused.reason == ("fenced" if epoch < at.epoch else "home_gone")
            assert epoch < at.epoch or not homes.keys() <= known | {session_id}
            assert refused.metadata["epoch"] == str(at.epoch)

    @rule(worker=WORKERS, ttl_s=TTLS)
    def renew(self, worker: WorkerId, ttl_s: float) -> None:
        live = self.model.live()
        held = [Held(ANN, SessionId(name), lease.epoch) for name, lease in live.items()]
        lost = self.run(self.ledger.renew_leases(worker, held, ttl_s))
        assert {each.session_id for each in lost} == {name for name, each in live.items() if each.worker != worker}
        for lease in live.values():
            if lease.worker == worker:
                lease.until = max(lease.until, self.model.now + ttl_s)

    @rule(session_id=SESSIONS)
    def delete(self, session_id: SessionId) -> None:
        live = self.model.live()
        lease = live.pop(session_id, None)
        self.model.leases.pop(session_id, None)
        left = {home for each in live.values() for home in each.homes}
        freed = {session_id, *(lease.homes if lease else ())} - left
        assert self.run(self.ledger.delete_manifest(ANN, session_id)) == sorted(freed)

    @invariant()
    def sum_is_right(self) -> None:
        if not hasattr(self, "ledger"):
            return
        found = self.run(self.ledger.tenant_bytes(ANN))
        assert (found.stored_bytes, found.reserved_bytes) == (self.model.stored(), self.model.reserved())
        assert self.run(self.ledger.settle(ANN)).drift_bytes == 0
        leases = self.run(self.ledger.list_leases(ANN))
        assert [lease.session_id for lease in leases] == sorted(self.model.live())
        assert sum(split_bytes(leases).values()) == self.model.stored()


LIMITS = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_memory_ledger_is_always_right():
    run_state_machine_as_test(LedgerMachine, settings=LIMITS)


@pytest.mark.slow
def test_redis_ledger_is_always_right(state_url: str):
    class RedisMachine(LedgerMachine):
        def make_store(self) -> StateStore:
            with Redis.from_url(state_url) as client:
                client.flushall()
            return RedisStateStore(state_url, clock=lambda: self.model.now, default_quota_bytes=QUOTA)

    run_state_machine_as_test(RedisMachine, settings=settings(LIMITS, max_examples=15))
