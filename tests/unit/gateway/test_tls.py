from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvservice.client import Client
from kvservice.config.identity import InternalTlsConfig, TlsConfig
from kvservice.errors import ConfigError, Unavailable
from kvservice.internal.tls import PemFiles, server_credentials
from kvservice.internal.v1 import worker_pb2, worker_pb2_grpc
from kvservice.store.base import StateStore, WorkerRecord
from tests.unit.gateway.certificates import Authority
from tests.unit.gateway.conftest import ONCE, running
from tests.unit.gateway.fake_worker import FakeWorker


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def client(address: str, tls: PemFiles | None) -> Client:
    return Client(address, retry=ONCE, timeout_s=5.0, tls=tls)


async def test_calls_are_encrypted_and_health_stays_plain(authority: Authority) -> None:
    files = authority.issue("gateway")
    async with running(tls=TlsConfig(cert=files.cert, key=files.key), health_port=0) as service:
        async with client(service.address, PemFiles(None, None, authority.ca)) as trusting:
            assert await trusting.list_models()
        async with client(service.address, None) as plain:
            with pytest.raises(Unavailable):
                await plain.list_models()
        async with grpc.aio.insecure_channel(service.gateway.health_address) as channel:
            response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert response.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_client_of_another_authority_trusts_no_such_server(authority: Authority, tmp_path: Path) -> None:
    files = authority.issue("gateway")
    other = Authority(tmp_path, "other")
    async with (
        running(tls=TlsConfig(cert=files.cert, key=files.key)) as service,
        client(service.address, PemFiles(None, None, other.ca)) as doubting,
    ):
        with pytest.raises(Unavailable):
            await doubting.list_models()


async def test_with_a_client_authority_only_its_clients_get_in(authority: Authority, tmp_path: Path) -> None:
    files, known = authority.issue("gateway"), authority.issue("caller")
    stranger = Authority(tmp_path, "other").issue("stranger")
    tls = TlsConfig(cert=files.cert, key=files.key, client_ca=authority.ca)
    async with running(tls=tls) as service:
        async with client(service.address, known) as welcome:
            assert await welcome.list_models()
        for refused in (PemFiles(None, None, authority.ca), PemFiles(stranger.cert, stranger.key, authority.ca)):
            async with client(service.address, refused) as unwelcome:
                with pytest.raises(Unavailable):
                    await unwelcome.list_models()


async def test_a_renewed_certificate_is_shown_without_a_restart_and_half_of_one_is_not(
    authority: Authority, tmp_path: Path
) -> None:
    files = authority.issue("gateway")
    async with running(tls=TlsConfig(cert=files.cert, key=files.key)) as service:

        async def shown() -> bytes:
            ca = files.ca.read_text()
            context = ssl.create_default_context(cadata=ca)
            host, port = service.address.split(":")
            _, writer = await asyncio.open_connection(host, int(port), ssl=context)
            found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.close()
            return found

        first = await shown()
        assert await shown() == first
        old_key = files.key.read_bytes()
        authority.issue("gateway")
        new_key = files.key.read_bytes()
        files.key.write_bytes(old_key)
        assert await shown() == first
        files.key.write_bytes(new_key)
        assert await shown() != first


def test_files_that_do_not_fit_together_are_refused_by_name(authority: Authority, tmp_path: Path) -> None:
    one, two = authority.issue("one"), authority.issue("two")
    with pytest.raises(ConfigError, match=r"one\.crt.*pair"):
        server_credentials(PemFiles(one.cert, two.key, None))
    with pytest.raises(ConfigError, match="No such file"):
        server_credentials(PemFiles(tmp_path / "none", one.key, None))
    with pytest.raises(ConfigError, match="give both or neither"):
        server_credentials(PemFiles(one.cert, None, None))


class SecureWorker(FakeWorker):
    """A fake behind mutual TLS."""

    files: PemFiles

    async def start(self, store: StateStore) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        port = self._server.add_secure_port("127.0.0.1:0", server_credentials(self.files))
        await self._server.start()
        self.address = f"127.0.0.1:{port}"
        self.epoch = await store.next_epoch()
        await store.register_worker(WorkerRecord(self.worker_id, self.address, self.epoch), 3600.0)


async def test_gateways_and_workers_know_one_another_by_their_authority(authority: Authority, tmp_path: Path) -> None:
    worker = SecureWorker()
    worker.files = authority.issue("worker", dns="kvservice-worker")
    mine = authority.issue("gateway")
    tls = InternalTlsConfig(cert=mine.cert, key=mine.key, ca=authority.ca)
    async with running([worker], internal_tls=tls) as service:
        session = await (await service.client()).create_session()
        assert session.session_id
        # Whoever has no certificate of the authority isn't heard.
        stranger = Authority(tmp_path, "other").issue("stranger")
        for files in (PemFiles(None, None, authority.ca), PemFiles(stranger.cert, stranger.key, authority.ca)):
            cert, key, ca = files.read()
            credentials = grpc.ssl_channel_credentials(ca, key, cert)
            options = (("grpc.ssl_target_name_override", "kvservice-worker"),)
            async with grpc.aio.secure_channel(worker.address, credentials, options=options) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await worker_pb2_grpc.WorkerServiceStub(channel).GetStats(worker_pb2.GetStatsRequest(), timeout=5.0)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
