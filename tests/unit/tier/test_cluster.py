"""The tier in a real Redis Cluster of three servers, whose slots move."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.crc import key_slot

from kvservice.errors import ConfigError, Unavailable
from kvservice.store.blobs import RedisBlobs, all_blobs
from kvservice.store.embedded import find_redis_server
from kvservice.tier.base import open_source, open_tier
from kvservice.tier.header import FrameHeader, FrameRole
from kvservice.tier.reader import FrameReader, FrameWant, Miss
from kvservice.tier.redis_cluster import NUM_SLOTS, ClusterUrl, SlotMap
from kvservice.tier.wire import encode_frame
from kvservice.types import SessionId
from tests.unit.tier.test_connections import running

TAG, PASSWORD = bytes(range(16)), "secret"
START_S = 30.0
PAYLOAD = bytes(range(256)) * 1000


class Cluster:
    def __init__(self, ports: list[int]) -> None:
        self.ports = ports
        self.clients = [Redis(port=port, password=PASSWORD) for port in ports]
        self.ids = [client.execute_command("CLUSTER", "MYID").decode() for client in self.clients]

    @property
    def url(self) -> str:
        # The first is all that needs to be known.
        return f"redis+cluster://:{PASSWORD}@127.0.0.1:{self.ports[0]}"

    def join(self) -> None:
        for index, client in enumerate(self.clients):
            slots = range(index * NUM_SLOTS // 3, (index + 1) * NUM_SLOTS // 3)
            client.execute_command("CLUSTER", "ADDSLOTS", *slots)
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", self.ports[0])
        give_up = time.monotonic() + START_S
        while any(self._state(client) != ("ok", "16384", "3") for client in self.clients):
            assert time.monotonic() < give_up, "the cluster didn't come together"

    @staticmethod
    def _state(client: Redis) -> tuple[str, ...]:
        told = client.execute_command("CLUSTER", "INFO")
        info = dict(line.split(":") for line in told.decode().split()) if isinstance(told, bytes) else told
        return tuple(str(info[f"cluster_{name}"]) for name in ("state", "slots_assigned", "known_nodes"))

    def owner_of(self, key: bytes) -> int:
        ranges = self.clients[0].execute_command("CLUSTER", "SLOTS")
        slots = SlotMap.of(ranges, f"127.0.0.1:{self.ports[0]}")
        return self.ports.index(int(slots.place_of(key).rpartition(":")[2]))

    def give(self, key: bytes, index: int) -> None:
        """The slot of a key is another server's from now on; what was in it is gone."""
        slot = key_slot(key)
        for each in self.clients[index : index + 1] + self.clients[:index] + self.clients[index + 1 :]:
            names = each.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1000)
            if names:
                each.delete(*names)
            each.execute_command("CLUSTER", "SETSLOT", slot, "NODE", self.ids[index])

    def empty(self) -> None:
        for client in self.clients:
            client.flushall()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    ports = _ports()
    with contextlib.ExitStack() as stack:
        for port in ports:
            folder = tmp_path_factory.mktemp("cluster")
            stack.enter_context(running([str(find_redis_server()), "-"], {}, _settings(port, folder), port))
        cluster = Cluster(ports)
        for client in cluster.clients:
            stack.enter_context(client)
        cluster.join()
        yield cluster


@pytest.fixture
def cluster(servers: Cluster) -> Cluster:
    servers.empty()
    return servers


def _ports() -> list[int]:
    """Free ones, whose bus ports are free too."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < 3:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            bus = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError, OverflowError):
                bus.bind(("127.0.0.1", port - 10_000))
                found.append(port - 10_000)
    return found


def _settings(port: int, folder: Path) -> list[str]:
    return [
        *(f"port {port}", "bind 127.0.0.1", 'save ""', f"dir {folder}", f"requirepass {PASSWORD}"),
        *("cluster-enabled yes", "cluster-config-file nodes.conf", "cluster-node-timeout 5000"),
        *("maxmemory 64mb", "maxmemory-policy allkeys-lru"),
    ]


def header(session: str, number: int = 0) -> FrameHeader:
    name = bytes([number]) * 16
    return FrameHeader(TAG, SessionId(session), bytes(16), 0, FrameRole.KV, name, 16, 80, (len(PAYLOAD),), "uint8")


def sessions_everywhere(cluster: Cluster) -> list[str]:
    """A session for each server."""
    found: dict[int, str] = {}
    for number in range(1000):
        found.setdefault(cluster.owner_of(header(f"s{number}").key), f"s{number}")
        if len(found) == 3:
            break
    return [found[index] for index in range(3)]


def read(reader: FrameReader, headers: list[FrameHeader]) -> list[Miss | None]:
    memory = [bytearray(len(PAYLOAD)) for _ in headers]
    wants = [FrameWant(each, [memoryview(into)]) for each, into in zip(headers, memory, strict=True)]
    results = list(reader.fetch(wants, time.monotonic() + START_S))
    assert all(result.miss or bytes(into) == PAYLOAD for result, into in zip(results, memory, strict=True))
    return [result.miss for result in results]


async def test_frames_pass_to_every_server_and_back(cluster):
    headers = [header(name, number) for name in sessions_everywhere(cluster) for number in range(4)]
    async with contextlib.aclosing(open_tier(cluster.url)) as tier:
        await tier.put_many([(each.key, encode_frame(each, PAYLOAD)) for each in headers], 60)
        assert all(client.dbsize() == 4 + 1 for client in cluster.clients)
        assert all(await tier.get_many([each.key for each in headers]))
        assert (await tier.usage()).frames == len(headers)
        reader = FrameReader(open_source(cluster.url), connections=4)
        assert read(reader, headers) == [None] * len(headers)
        reader.close()
        assert await tier.delete_session(TAG, headers[0].session_id) == 4
        assert (await tier.usage()).frames == len(headers) - 4


async def test_slot_that_has_moved_is_found_again(cluster):
    frame = header("wanderer")
    async with contextlib.aclosing(open_tier(cluster.url)) as tier:
        reader = FrameReader(open_source(cluster.url))
        for _ in range(3):
            await tier.put_many([(frame.key, encode_frame(frame, PAYLOAD))], 60)
            assert read(reader, [frame]) == [None]
            cluster.give(frame.key, (cluster.owner_of(frame.key) + 1) % 3)
            # Where it is now, it isn't there any more; and that is told by who has the slot.
            assert read(reader, [frame]) == [Miss.ABSENT]
            assert await tier.get_many([frame.key]) == [None]
        reader.close()


async def test_all_frames_are_met_sized_renewed_and_deleted(cluster):
    headers = [header(name, number) for name in sessions_everywhere(cluster) for number in range(20)]
    keys = [each.key for each in headers]
    async with (
        contextlib.aclosing(open_tier(cluster.url)) as tier,
        contextlib.aclosing(RedisBlobs(cluster.url)) as blobs,
    ):
        assert [problem.message for problem in await blobs.check()] == []
        await tier.put_many([(each.key, encode_frame(each, PAYLOAD)) for each in headers], 60)
        assert {blob.key async for blob in all_blobs(blobs, TAG)} == set(keys)
        assert len(set(await blobs.sizes(keys))) == 1
        assert await blobs.renew(keys, 600) == len(keys)
        assert await blobs.corrupt(keys) == []
        assert await blobs.delete(keys) == len(keys)
        assert [blob async for blob in all_blobs(blobs, TAG)] == []


async def test_cluster_that_nobody_answers_for_is_unavailable(unused_tcp_port):
    url = f"redis+cluster://127.0.0.1:{unused_tcp_port}"
    async with contextlib.aclosing(open_tier(url)) as tier:
        with pytest.raises(Unavailable) as caught:
            await tier.get_many([header("s").key])
        assert caught.value.reason == "connection"
    with pytest.raises(Unavailable):
        open_source(url).place_of(header("s").key)


async def test_one_redis_is_no_cluster(kv_url):
    async with contextlib.aclosing(open_tier(kv_url.replace("redis://", "redis+cluster://"))) as tier:
        with pytest.raises(Unavailable, match="cluster support disabled"):
            await tier.get_many([header("s").key])


@pytest.mark.parametrize(
    "url", ["redis+cluster://", "redis+cluster://a:1/3", "redis+cluster://a:1,:2", "redis+cluster://a/x"]
)
def test_malformed_urls_are_refused_without_their_password(url):
    with pytest.raises(ConfigError) as caught:
        ClusterUrl.of(url.replace("//", "//:hunter2@"))
    assert "hunter2" not in caught.value.message


def test_urls_of_servers_have_login_and_options():
    url = ClusterUrl.of("rediss+cluster://user:pa%40ss@a:1,b?ssl_ca_certs=x")
    assert url.seeds == ("a:1", "b:6379")
    assert url.at("c:2") == "rediss://user:pa%40ss@c:2/0?ssl_ca_certs=x"
