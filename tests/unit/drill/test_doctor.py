"""The doctor's judgement, and the facts it is given by real servers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvservice.client import LedgerReport, ServiceStats, TenantReport, TierReport, WorkerReport
from kvservice.drill import doctor
from kvservice.drill.doctor import Level, MachineFacts, RedisFacts
from kvservice.drill.examination import ask_machine, ask_redis
from kvservice.store.servers import ServerFacts

STATE = RedisFacts("state", "redis://s:6379", run_id="1", replication="master", is_on_disk=True)
STATE = replace(STATE, facts=ServerFacts((7, 2, 0), "noeviction", 0), round_trip_ms=0.2)
KV = RedisFacts(
    "kv", "redis://k:6379", run_id="2", replication="master", facts=ServerFacts((7, 2), "allkeys-lru", 1 << 30)
)
WORKER = WorkerReport(
    **{name: 0 for name in WorkerReport.__dataclass_fields__ if name not in ("tier", "ledger")} | {"model": "m"},
    tier=TierReport(True, 0, 0, 0, {}),
    ledger=LedgerReport(kv_fingerprint="aa"),
)


def levels(findings):
    return [finding.level for finding in findings]


def test_good_servers_are_fine():
    assert set(levels([*doctor.of_redis(STATE), *doctor.of_redis(KV)])) == {Level.FINE}
    assert doctor.of_both(STATE, KV) == []


@pytest.mark.parametrize(
    ("facts", "level", "word"),
    [
        (replace(STATE, error="can't be reached"), Level.BROKEN, "start it"),
        (replace(STATE, replication="slave"), Level.BROKEN, "primary"),
        (replace(STATE, facts=ServerFacts((7, 2), "allkeys-lru", 1 << 30)), Level.BROKEN, "noeviction"),
        (replace(STATE, facts=ServerFacts((5, 0), "noeviction", 0)), Level.BROKEN, "6.2"),
        (replace(STATE, is_on_disk=False), Level.WARNING, "appendfsync always"),
        (replace(STATE, round_trip_ms=40.0), Level.WARNING, "nearer"),
        (replace(STATE, clock_ahead_s=-90.0), Level.WARNING, "time service"),
        (replace(STATE, is_local=False), Level.WARNING, "rediss://"),
        (replace(KV, facts=ServerFacts((7, 2), "noeviction", 1 << 30)), Level.WARNING, "allkeys-lru"),
        (replace(KV, used_bytes=1 << 30, evicted_keys=9), Level.NOTE, "maxmemory"),
    ],
)
def test_each_thing_amiss_is_found_with_what_to_do(facts, level, word):
    findings = doctor.of_redis(facts)
    assert doctor.worst(findings) is level
    assert any(word in finding.advice + finding.found for finding in findings if finding.level is level)


def test_one_server_in_both_roles_is_broken():
    assert levels(doctor.of_both(STATE, replace(KV, run_id="1"))) == [Level.BROKEN]


@pytest.mark.parametrize(
    ("read", "break_even", "expected"),
    [(None, 1.0, []), (0.5, None, [Level.NOTE]), (2.0, 1.0, [Level.FINE]), (0.5, 1.0, [Level.WARNING])],
)
def test_speed_is_held_against_break_even(read, break_even, expected):
    assert levels(doctor.of_speed(replace(KV, read_gb_per_s=read), break_even)) == expected


def test_service_is_looked_at_worker_by_worker():
    sick = replace(WORKER, tier=TierReport(False, 0, 0, 0, {"oom": 3}), ledger=LedgerReport(failures={"timeout": 1}))
    findings = doctor.of_service(ServiceStats(workers=(WORKER, sick), version="1"))
    assert levels(findings) == [Level.FINE, Level.WARNING, Level.NOTE, Level.WARNING]
    for ledger in (LedgerReport(kv_fingerprint="bb"), LedgerReport(kv_fingerprint="aa", sharing_fingerprint="cc")):
        other = replace(WORKER, ledger=ledger)
        assert "2 kinds" in doctor.of_service(ServiceStats(workers=(WORKER, other)))[-1].found
    assert levels(doctor.of_service(ServiceStats())) == [Level.BROKEN]
    refused = TenantReport("acme", requests=9, refused=4, tokens=0, running_calls=0)
    assert "4 of 9" in doctor.of_service(ServiceStats(workers=(WORKER,), tenants=(refused,)))[-1].found


def test_machine_that_is_too_small_is_told():
    assert levels(doctor.of_machine(MachineFacts(1 << 20, 1 << 30, 1 << 34))) == [Level.FINE]
    assert levels(doctor.of_machine(MachineFacts(256, 0, 1 << 30, 1 << 31))) == [
        Level.WARNING,
        Level.NOTE,
        Level.WARNING,
    ]
    assert ask_machine(0).memory_bytes > 0


async def test_facts_come_from_real_servers_and_nothing_is_left_behind(state_url, kv_url):
    state = await ask_redis("state", state_url, measures_speed=False)
    assert doctor.worst(doctor.of_redis(state)) is Level.FINE
    assert (state.is_on_disk, state.is_local, state.replication) == (True, True, "master")
    kv = await ask_redis("kv", kv_url, measures_speed=True)
    assert kv.read_gb_per_s is not None
    assert kv.read_gb_per_s > 0
    assert doctor.of_both(state, kv) == []
    from redis import Redis

    with Redis.from_url(kv_url) as client:
        assert client.dbsize() == 0


async def test_server_that_is_away_is_a_finding(unused_tcp_port):
    facts = await ask_redis("kv", f"redis://127.0.0.1:{unused_tcp_port}", measures_speed=False)
    assert levels(doctor.of_redis(facts)) == [Level.BROKEN]
