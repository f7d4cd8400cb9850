"""What churn looks at, in processes and in servers."""

from __future__ import annotations

import os

from kvservice.drill.churn import key_kinds, read_process
from kvservice.drill.servers import STATE_SETTINGS, DrillServer


async def test_keys_are_counted_by_what_they_are_of(tmp_path):
    server = DrillServer("state", tmp_path / "state", STATE_SETTINGS)
    try:
        await server.start()
        for key in ("kvs:{session:a}:record", "kvs:{session:b}:lock", "kvs:{expiry}:sessions", "bare"):
            await server.command("SET", key, "1")
        assert await key_kinds(server) == {"session": 2, "expiry": 1, "bare": 1}
    finally:
        server.kill()


def test_descriptors_and_threads_of_a_process_are_counted():
    before = read_process(os.getpid())
    ours, theirs = os.pipe()
    try:
        assert read_process(os.getpid()).files == before.files + 2
    finally:
        os.close(ours)
        os.close(theirs)
    assert before.threads >= 1
    assert before.rss_bytes > 1 << 20
