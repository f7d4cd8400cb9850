from __future__ import annotations

import logging

import grpc
import pytest

from kvservice import errors
from kvservice.client.errors import error_from_rpc
from kvservice.config.gateway import QuotaConfig
from kvservice.errors import InternalError, KVServiceError, PermissionDenied, Unauthenticated
from kvservice.gateway.auth import Authenticator, secret_key_id, tenant_tag
from kvservice.gateway.interceptors import ServiceInterceptor, error_status
from kvservice.gateway.metering import Metering
from kvservice.gateway.quotas import Quotas
from kvservice.gateway.reception import Reception
from kvservice.store.rates import MemoryRateStore
from kvservice.store.usage import MemoryUsageLog
from kvservice.telemetry.metrics import GatewayMetrics
from kvservice.types import Role, TenantId
from kvservice.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.unit.gateway.conftest import keys, running


def all_errors(base: type[KVServiceError] = KVServiceError) -> list[type[KVServiceError]]:
    return [base, *(each for child in base.__subclasses__() for each in all_errors(child))]


MESSAGE_S = 0.5

# These end a start, or stay inside: no caller sees them.
NOT_ON_THE_WIRE = {errors.KVServiceError, errors.ConfigError, errors.ModelError, errors.CorruptFrame}


class Raising(inference_pb2_grpc.InferenceServiceServicer):
    """Raises `error`; a stream does so after one message."""

    error: Exception

    async def ListModels(self, request, context):
        raise self.error

    async def Generate(self, request, context):
        yield inference_pb2.InferenceServiceGenerateResponse()
        raise self.error


@pytest.fixture
async def raising():
    servicer = Raising()
    metrics = GatewayMetrics()
    metering = Metering(MemoryUsageLog(), lambda: 0.0)
    quotas = Quotas(MemoryRateStore(), QuotaConfig(), metrics, metering)
    reception = Reception(Authenticator(None), quotas, metrics)
    server = grpc.aio.server(interceptors=[ServiceInterceptor(reception, message_s=MESSAGE_S)])
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield servicer, inference_pb2_grpc.InferenceServiceStub(channel), channel
    await server.stop(None)


async def raised(call) -> KVServiceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_rpc(caught.value, "here")


async def last(stream) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
async def test_every_error_crosses_the_wire_whole(raising, cls: type[KVServiceError]) -> None:
    servicer, stub, _ = raising
    servicer.error = cls("a sentence — with ünicode", field="some.field", retry_after_s=2.5, metadata={"n": "1"})
    for call in (
        stub.ListModels(inference_pb2.ListModelsRequest()),
        last(stub.Generate(inference_pb2.InferenceServiceGenerateRequest())),
    ):
        error = await raised(call)
        assert error.status == cls.status
        assert error.message == "a sentence — with ünicode"
        assert (error.reason, error.field, error.retry_after_s) == (cls.default_reason, "some.field", 2.5)
        assert error.metadata == {"n": "1"}
        if cls not in NOT_ON_THE_WIRE:
            assert type(error) is cls


async def test_an_unexpected_exception_is_internal_and_tells_nothing(raising, caplog: pytest.LogCaptureFixture) -> None:
    servicer, stub, _ = raising
    servicer.error = ValueError("a secret path")
    for call in (
        lambda: stub.ListModels(inference_pb2.ListModelsRequest()),
        lambda: last(stub.Generate(inference_pb2.InferenceServiceGenerateRequest())),
    ):
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            error = await raised(call())
        assert isinstance(error, InternalError)
        assert "secret" not in error.message
        assert caplog.records[0].getMessage() == "rpc_failed"
        assert "a secret path" in caplog.text


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
def test_every_status_is_one_that_grpc_knows(cls: type[KVServiceError]) -> None:
    assert error_status(cls("x")).code is grpc.StatusCode[cls.status]


async def test_an_unknown_rpc_is_unimplemented(raising) -> None:
    _, _, channel = raising
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/kvservice.v1.InferenceService/Guess")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


TWO = keys(("tenant-key", "acme", Role.TENANT), ("operator-key", "ops", Role.OPERATOR))


@pytest.mark.parametrize(
    "metadata",
    [(), (("authorization", "tenant-key"),), (("authorization", "Bearer wrong"),), (("authorization", "Bearer "),)],
)
async def test_without_a_known_key_nothing_is_served(metadata) -> None:
    async with running([], TWO) as service, grpc.aio.insecure_channel(service.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        error = await raised(stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata))
        assert isinstance(error, Unauthenticated)
        assert "wrong" not in error.message


async def test_operators_calls_need_an_operators_key() -> None:
    async with running([], TWO) as service:
        tenant, operator = await service.client("tenant-key"), await service.client("operator-key")
        await tenant.list_models()
        assert (await operator.stats()).running_calls == 0
        with pytest.raises(PermissionDenied, match="role operator"):
            await tenant.stats()
        with pytest.raises(PermissionDenied):
            await tenant.drain()
        async with grpc.aio.insecure_channel(service.address) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            bearer = (("authorization", "Bearer operator-key"),)
            error = await raised(stub.SetQuota(admin_pb2.SetQuotaRequest(), metadata=bearer))
            assert error.field == "tenant"
            asked = admin_pb2.SetQuotaRequest(tenant="a", weight=-1)
            error = await raised(stub.SetQuota(asked, metadata=bearer))
            assert (error.status, error.field) == ("INVALID_ARGUMENT", "weight")
            for refused in (stub.SetQuota(admin_pb2.SetQuotaRequest()), stub.Verify(admin_pb2.VerifyRequest())):
                assert (await raised(refused)).status == "UNAUTHENTICATED"
            error = await raised(stub.Verify(admin_pb2.VerifyRequest(tenant="a"), metadata=bearer))
            assert error.status == "UNAVAILABLE"
            error = await raised(stub.Verify(admin_pb2.VerifyRequest(tenant="a", session_id="*"), metadata=bearer))
            assert error.status == "INVALID_ARGUMENT"
            await stub.SetQuota(admin_pb2.SetQuotaRequest(tenant="a", redis_bytes=77), metadata=bearer)
            assert (await service.store.ledger.tenant_bytes(TenantId("a"))).quota_bytes == 77


def test_tags_of_tenants_differ_and_depend_on_the_secret() -> None:
    secret, other = b"s" * 16, b"t" * 16
    tags = {tenant_tag(secret, TenantId("a")), tenant_tag(secret, TenantId("b")), tenant_tag(other, TenantId("a"))}
    assert len(tags) == 3
    assert {len(tag) for tag in tags} == {16}
    # The first two bytes say which secret a tag was made with.
    assert {tag[:2] for tag in tags} == {secret_key_id(secret), secret_key_id(other)}
    assert secret_key_id(secret) != secret_key_id(other)


@pytest.mark.parametrize("method", ["ListModels", "Generate"])
async def test_call_whose_message_never_comes_is_ended(raising, method) -> None:
    _, _, channel = raising
    # As a hostile client would: the headers of a call, and nothing behind them.
    open_call = channel.stream_stream(f"/kvservice.v1.InferenceService/{method}")()
    assert await open_call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "didn't come within" in await open_call.details()


async def test_call_that_ends_before_its_message_is_refused(raising) -> None:
    _, _, channel = raising
    call = channel.stream_stream("/kvservice.v1.InferenceService/ListModels")()
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
