"""Every way to connect to a Redis, on real servers: TLS with an ACL user, and sentinels."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis import Redis

from kvservice.errors import Unavailable
from kvservice.store.embedded import EmbeddedRedis, find_redis_server
from kvservice.tier.base import open_source, open_tier
from kvservice.tier.header import FrameHeader, FrameRole
from kvservice.tier.reader import FrameReader, FrameWant, Miss
from kvservice.tier.wire import encode_frame
from kvservice.types import SessionId

PACKAGES = ("redis-server", "redis-tools", "liblzf1", "libjemalloc2")
"""Debian's server, and what it needs that a small system may lack."""
START_S = 20.0
PAYLOAD = bytes(range(256)) * 4000
HEADER = FrameHeader(bytes(16), SessionId("s"), bytes(16), 0, FrameRole.KV, bytes(16), 16, 80, (len(PAYLOAD),), "uint8")


@dataclass(frozen=True)
class Binary:
    path: Path
    env: dict[str, str]


@pytest.fixture(scope="session")
def tls_binary(tmp_path_factory: pytest.TempPathFactory) -> Binary:
    """A redis-server that speaks TLS, which those inside wheels don't: the one on PATH, or Debian's, unpacked."""
    if (found := shutil.which("redis-server")) and _speaks_tls(Binary(Path(found), {})):
        return Binary(Path(found), {})
    if not all(map(shutil.which, ("apt-get", "dpkg", "openssl"))):
        pytest.skip("no redis-server with TLS on PATH, and no apt-get, dpkg or openssl to get one with")
    folder = tmp_path_factory.mktemp("debian-redis")
    done = subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, capture_output=True, text=True, check=False)
    packages = list(folder.glob("*.deb"))
    if len(packages) < len(PACKAGES):
        pytest.skip(f"Debian's redis-server can't be downloaded: {done.stderr[-200:]}")
    for package in packages:
        subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)
    libraries = next(path.parent for path in folder.rglob("liblzf.so.1"))
    binary = Binary(folder / "usr/bin/redis-server", {"LD_LIBRARY_PATH": str(libraries)})
    if not _speaks_tls(binary):
        pytest.skip("Debian's redis-server doesn't run here")
    return binary


def _speaks_tls(binary: Binary) -> bool:
    # A server without TLS doesn't know the setting; one with it misses its certificate. Both end at once.
    done = subprocess.run(
        [str(binary.path), "--port", "0", "--tls-port", str(_free_port()), "--save", ""],
        env={**os.environ, **binary.env},
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    return "certificate" in (done.stdout + done.stderr).lower() or "TLS" in done.stdout.replace("tls-port", "")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], env: dict[str, str], settings: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, env={**os.environ, **env}, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stdin is not None
    try:
        process.stdin.write("\n".join(settings).encode() + b"\n")
        process.stdin.close()
        give_up = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None, "redis-server ended"
            assert time.monotonic() < give_up, "redis-server didn't start"
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def tls_url(tls_binary: Binary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=test"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"),
        ],
        cwd=folder,
        capture_output=True,
        check=True,
    )
    port = _free_port()
    settings = [
        *("port 0", f"tls-port {port}", "bind 127.0.0.1", 'save ""', f"dir {folder}", "tls-auth-clients no"),
        *(f"tls-cert-file {folder}/cert.pem", f"tls-key-file {folder}/key.pem", f"tls-ca-cert-file {folder}/cert.pem"),
        "user default off",
        "user kv on >pass@word ~kv1* +@all -@dangerous +info +scan",
    ]
    with running([str(tls_binary.path), "-"], tls_binary.env, settings, port):
        yield f"rediss://kv:pass%40word@127.0.0.1:{port}/0?ssl_ca_certs={folder}/cert.pem"


async def put_and_read(url: str) -> Miss | None:
    tier = open_tier(url)
    await tier.put_many([(HEADER.key, encode_frame(HEADER, PAYLOAD))], 60)
    assert (await tier.get_many([HEADER.key]))[0] is not None
    reader = FrameReader(open_source(url))
    memory = bytearray(len(PAYLOAD))
    (read,) = list(reader.fetch([FrameWant(HEADER, [memoryview(memory)])], time.monotonic() + START_S))
    reader.close()
    assert await tier.delete_session(bytes(16), SessionId("s")) == 1
    await tier.aclose()
    assert read.miss or bytes(memory) == PAYLOAD
    return read.miss


async def test_frames_pass_by_tls_and_an_acl_user(tls_url):
    assert await put_and_read(tls_url) is None


async def test_certificate_that_nobody_vouches_for_is_refused(tls_url):
    tier = open_tier(tls_url.partition("?")[0])
    with pytest.raises(Unavailable):
        await tier.get_many([HEADER.key])
    await tier.aclose()
    with pytest.raises(Unavailable) as caught:
        open_source(tls_url.partition("?")[0]).connect("", 5)
    assert isinstance(caught.value.__cause__, Exception)
    assert "CERTIFICATE_VERIFY_FAILED" in str(caught.value.__cause__) or ssl.SSLError in type(caught.value).__mro__


async def test_acl_user_may_do_no_more_than_the_tier_needs(tls_url):
    with Redis.from_url(tls_url) as client, pytest.raises(Exception, match=r"(?i)perm"):
        client.set("other", "x")


@pytest.fixture
def sentinel_url(kv_server: EmbeddedRedis, kv_url: str, tmp_path: Path) -> Iterator[str]:
    password, _, address = kv_url.removeprefix("redis://:").partition("@")
    port, redis_port = _free_port(), address.partition("/")[0].partition(":")[2]
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\nsentinel monitor main 127.0.0.1 {redis_port} 1\n"
        f"sentinel auth-pass main {password}\n"
    )
    with running([str(find_redis_server()), str(config), "--sentinel"], {}, [], port):
        yield f"redis+sentinel://:{password}@127.0.0.1:{port}/main"


async def test_frames_pass_to_the_primary_that_sentinels_name(sentinel_url):
    assert await put_and_read(sentinel_url) is None


async def test_name_that_sentinels_do_not_know_is_a_miss(sentinel_url):
    with pytest.raises(Unavailable):
        open_source(sentinel_url.replace("/main", "/other")).connect("", 5)
