from __future__ import annotations

import pytest

from kvservice.errors import ConfigError
from kvservice.store import open_state_store
from kvservice.store.blobs import RedisBlobs
from kvservice.store.servers import ServerFacts, problems_of_kv, problems_of_state
from kvservice.store.sizes import Allocator

GOOD = ServerFacts((7, 0, 15), "noeviction", 0, "jemalloc-5.3.0")


def said(server: dict[str, object], **settings: object) -> ServerFacts:
    return ServerFacts.of(server, {"mem_allocator": "libc"}, settings)


def test_facts_come_from_the_answers_and_from_info_where_config_is_forbidden():
    facts = said({"redis_version": "6.2.14"}, **{"maxmemory-policy": "allkeys-lru", "maxmemory": "100"})
    assert facts == ServerFacts((6, 2, 14), "allkeys-lru", 100, "libc")
    memory = {"mem_allocator": "libc", "maxmemory_policy": "volatile-ttl", "maxmemory": 5}
    facts = ServerFacts.of({"redis_version": "8.2.0"}, memory, PermissionError())
    assert (facts.policy, facts.maxmemory_bytes) == ("volatile-ttl", 5)


def test_state_that_keeps_everything_is_fit():
    assert problems_of_state(GOOD, "x") == []


def test_state_that_evicts_is_refused_and_one_that_might_is_warned_of():
    (problem,) = problems_of_state(ServerFacts((7, 0), "allkeys-lru", 100), "h:1")
    assert problem.fatal
    assert "the state Redis at h:1 has maxmemory-policy allkeys-lru: it may drop sessions" in problem.message
    (problem,) = problems_of_state(ServerFacts((7, 0), "volatile-lru", 0), "h:1")
    assert not problem.fatal


def test_old_server_is_refused_and_a_silent_one_warned_of():
    (problem,) = problems_of_state(ServerFacts((6, 0, 9), "noeviction", 0), "h:1")
    assert problem.fatal
    assert "is of version 6.0.9: it must be 6.2 or later" in problem.message
    (problem,) = problems_of_kv(ServerFacts(), "h:1")
    assert (problem.fatal, "doesn't tell" in problem.message) == (False, True)


def test_kv_that_evicts_within_a_bound_is_fit_and_others_are_warned_of():
    assert problems_of_kv(ServerFacts((7, 0), "allkeys-lfu", 100), "x") == []
    messages = [problem.message for problem in problems_of_kv(ServerFacts((7, 0), "noeviction", 0), "x")]
    assert ["noeviction" in messages[0], "no maxmemory" in messages[1], len(messages)] == [True, True, 2]


async def test_state_store_does_not_start_on_a_server_that_evicts(kv_url):
    with pytest.raises(ConfigError, match="may drop sessions"):
        await open_state_store(kv_url)


async def test_servers_of_both_roles_are_fit_and_the_allocator_is_known(kv_url, state_url):
    blobs = RedisBlobs(kv_url)
    assert await blobs.check() == []
    assert blobs.allocator is Allocator.LIBC
    await blobs.aclose()
    await (await open_state_store(state_url)).aclose()
