"""Gathers the facts that `doctor` judges: asks servers and machine, and measures. Changes nothing that lasts."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import resource
import secrets
import socket
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from kvservice.drill.doctor import MachineFacts, RedisFacts
from kvservice.errors import ConfigError, KVServiceError
from kvservice.store.servers import ServerFacts
from kvservice.tier.base import open_source, open_tier
from kvservice.tier.header import TAG_BYTES, FrameHeader, FrameRole, chunk_hash
from kvservice.tier.reader import FrameReader, FrameWant
from kvservice.tier.redis import FAULTS, connect, redacted
from kvservice.tier.wire import encode_frame
from kvservice.types import SessionId

TIMEOUT_S = 5.0
PINGS = 20
FRAME_BYTES = 250_000
NUM_FRAMES = 64
ROUNDS = 3
TTL_S = 60.0
READ_TIMEOUT_S = 30.0


async def ask_redis(role: str, url: str, *, measures_speed: bool) -> RedisFacts:
    """Facts of one server. With `measures_speed` 16 MB are written to it, read, and deleted.

    Raises:
        ConfigError: the URL is malformed.
    """
    where = redacted(url)
    client = connect(url, timeout_s=TIMEOUT_S, max_connections=1)
    try:
        server, memory, stats, replication = [
            _table(await _told(client, "INFO", name)) for name in ("server", "memory", "stats", "replication")
        ]
        settings = await _settings(client)
        round_trips, ahead = [], []
        for _ in range(PINGS):
            before, started = time.time(), time.perf_counter()
            seconds, micros = await _told(client, "TIME")
            round_trips.append(time.perf_counter() - started)
            ahead.append(float(seconds) + float(micros) / 1e6 - (before + time.time()) / 2)
        read_gb_per_s = await _read_speed(url) if measures_speed else None
    except (*FAULTS, KVServiceError) as error:
        return RedisFacts(role, where, error=str(error) or type(error).__name__)
    finally:
        await client.aclose()
    host = urlsplit(url).hostname or ""
    return RedisFacts(
        role,
        where,
        run_id=str(server.get("run_id", "")),
        replication=str(replication.get("role", "")),
        facts=ServerFacts.of(server, memory, settings),
        used_bytes=int(memory.get("used_memory", 0)),
        is_on_disk=settings.get("appendonly") == "yes" and settings.get("appendfsync") == "always",
        num_replicas=int(replication.get("connected_slaves", 0)),
        is_encrypted=urlsplit(url).scheme == "rediss" or "tls=true" in url,
        is_local=urlsplit(url).scheme == "unix" or _is_local(host),
        round_trip_ms=statistics.median(round_trips) * 1e3,
        clock_ahead_s=statistics.median(ahead),
        evicted_keys=int(stats.get("evicted_keys", 0)),
        read_gb_per_s=read_gb_per_s,
    )


def ask_machine(needed_bytes: int) -> MachineFacts:
    """Facts of this machine."""
    shared = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return MachineFacts(
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shared_bytes=shared.f_bavail * shared.f_frsize if shared is not None else 0,
        memory_bytes=_available_bytes() or pages,
        needed_bytes=needed_bytes,
    )


def _available_bytes() -> int:
    """Of the machine's memory, and of what this process's group of processes may have of it."""
    free = [*_free_of_machine(), *_free_of_group()]
    return min(free, default=0)


def _free_of_machine() -> list[int]:
    try:
        with open("/proc/meminfo") as lines:
            return [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        return []


def _free_of_group(folder: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Inside a container that folder is its own group's (cgroup v2); without a limit there is nothing to tell."""
    try:
        most, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return []
    return [int(most) - used] if most.isdigit() else []


async def _told(client: Any, *command: str) -> Any:  # noqa: ANN401 -- a client of `connect`, and its answer
    return await client.execute_command(*command)


async def _settings(client: Any) -> Mapping[str, str]:  # noqa: ANN401 -- a client of `connect`
    """Of CONFIG GET; empty where the server doesn't tell."""
    try:
        found = await _told(client, "CONFIG GET", "*")
    except FAULTS:
        return {}
    return {_text(name): _text(value) for name, value in found.items()}


def _table(answer: object) -> Mapping[str, Any]:
    return answer if isinstance(answer, Mapping) else {}


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _is_local(host: str) -> bool:
    try:
        return all(ipaddress.ip_address(found[4][0]).is_loopback for found in socket.getaddrinfo(host, None))
    except (OSError, ValueError):
        return False


async def _read_speed(url: str) -> float:
    """10^9 bytes a second of frames, the way that workers read them; the median of a few rounds."""
    session, tag = SessionId(f"doctor-{secrets.token_hex(8)}"), secrets.token_bytes(TAG_BYTES)
    payload = secrets.token_bytes(FRAME_BYTES)
    headers = [
        FrameHeader(tag, session, tag, 0, FrameRole.KV, chunk_hash(tag, b"", [index]), 16, 80, (FRAME_BYTES,), "uint8")
        for index in range(NUM_FRAMES)
    ]
    backend = open_tier(url)
    try:
        await backend.put_many([(header.key, encode_frame(header, payload)) for header in headers], TTL_S)
        return await asyncio.to_thread(_read_all, url, headers)
    finally:
        try:
            await backend.delete_session(tag, session)
        finally:
            await backend.aclose()


def _read_all(url: str, headers: list[FrameHeader]) -> float:
    memory = [np.zeros(FRAME_BYTES, np.uint8).data for _ in headers]
    wants = [FrameWant(header, [into]) for header, into in zip(headers, memory, strict=True)]
    reader = FrameReader(open_source(url))
    try:
        speeds = []
        for _ in range(ROUNDS):
            started = time.monotonic()
            results = list(reader.fetch(wants, started + READ_TIMEOUT_S))
            missed = {result.miss.value for result in results if result.miss is not None}
            if missed:
                raise ConfigError(f"frames written a moment ago can't be read: {', '.join(sorted(missed))}")
            speeds.append(NUM_FRAMES * FRAME_BYTES / (time.monotonic() - started) / 1e9)
    finally:
        reader.close()
    return statistics.median(speeds)
