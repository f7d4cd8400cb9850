"""Whether a redis-server is fit for its role. Pure; knows nothing of connections.

state   must not evict: a session record that goes is lost
kv      must evict: a full one that doesn't refuses every write, until what is in it has expired
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

LEAST_VERSION = (6, 2)
EVICTS_NOTHING = "noeviction"


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself. Empty, or None: it won't tell."""

    version: tuple[int, ...] = ()
    policy: str = ""
    maxmemory_bytes: int | None = None
    mem_allocator: str = ""

    @classmethod
    def of(cls, server: object, memory: object, settings: object) -> Self:
        """From the answers to INFO server, INFO memory and CONFIG GET maxmemory*; what is an error says nothing."""
        version = str(server.get("redis_version", "")) if isinstance(server, Mapping) else ""
        told = settings if isinstance(settings, Mapping) else memory if isinstance(memory, Mapping) else {}
        policy = told.get("maxmemory-policy", told.get("maxmemory_policy", ""))
        most = told.get("maxmemory")
        return cls(
            version=tuple(int(part) for part in version.split(".") if part.isdigit()),
            policy=str(policy),
            maxmemory_bytes=None if most is None else int(most),
            mem_allocator=str(memory.get("mem_allocator", "")) if isinstance(memory, Mapping) else "",
        )


@dataclass(frozen=True, slots=True)
class Problem:
    """What isn't as it must be (`fatal`) or should be."""

    message: str
    fatal: bool


def problems_of_state(facts: ServerFacts, where: str) -> list[Problem]:
    """What is wrong with a server for session records."""
    problems = _problems_of_any(facts, where)
    if facts.policy not in ("", EVICTS_NOTHING):
        # With no bound on its memory it evicts nothing yet; the day somebody sets one, it does.
        problems.append(
            Problem(
                f"the state Redis at {where} has maxmemory-policy {facts.policy}: it may drop sessions. Set "
                "maxmemory-policy noeviction, and never share it with the kv Redis",
                fatal=bool(facts.maxmemory_bytes),
            )
        )
    return problems


def problems_of_kv(facts: ServerFacts, where: str) -> list[Problem]:
    """What is wrong with a server for frames."""
    problems = _problems_of_any(facts, where)
    if facts.policy == EVICTS_NOTHING:
        problems.append(
            Problem(
                f"the kv Redis at {where} has maxmemory-policy noeviction: once it is full, nothing is written until "
                "something expires. Set maxmemory-policy allkeys-lru",
                fatal=False,
            )
        )
    if facts.maxmemory_bytes == 0:
        problems.append(
            Problem(f"the kv Redis at {where} has no maxmemory: it may take all of its machine's. Set one", fatal=False)
        )
    return problems


def _problems_of_any(facts: ServerFacts, where: str) -> list[Problem]:
    if not facts.version or not facts.policy:
        return [Problem(f"the Redis at {where} doesn't tell its version or maxmemory-policy: not checked", fatal=False)]
    if facts.version < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        found = ".".join(map(str, facts.version))
        return [Problem(f"the Redis at {where} is of version {found}: it must be {least} or later", fatal=True)]
    return []
