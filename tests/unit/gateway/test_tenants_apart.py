"""Attempts of one tenant on another's sessions, over real gRPC. None may tell more than the same on nothing at all."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from kvservice.client.errors import error_from_rpc
from kvservice.errors import KVServiceError
from kvservice.gateway.auth import tenant_tag
from kvservice.internal.prefixes import lengths_by_name
from kvservice.types import Role, TenantId
from kvservice.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc, sessions_pb2, sessions_pb2_grpc
from tests.unit.gateway.conftest import SECRET, keys, running

KEYS = keys(("ann-key", "ann", Role.TENANT), ("eve-key", "eve", Role.TENANT), ("operator-key", "ops", Role.OPERATOR))
EVE = (("authorization", "Bearer eve-key"),)
NEVER_WAS = "0123456789abcdef" * 2


@pytest.fixture
async def service():
    async with running(api_keys=KEYS) as service:
        yield service


async def first(call: Any) -> Any:
    if hasattr(call, "__aiter__"):
        return [message async for message in call][-1]
    return await call


def append(session_id: str):
    return iter(
        [
            sessions_pb2.AppendRequest(start=sessions_pb2.AppendStart(session_id=session_id)),
            sessions_pb2.AppendRequest(data=b"evil"),
        ]
    )


CALLS: dict[str, Callable[[Any, str], Any]] = {
    "Get": lambda stub, name: stub.Get(sessions_pb2.GetRequest(session_id=name), metadata=EVE),
    "Append": lambda stub, name: stub.Append(append(name), metadata=EVE),
    "Append detached": lambda stub, name: stub.Append(
        iter(
            [
                sessions_pb2.AppendRequest(start=sessions_pb2.AppendStart(session_id=name, detach=True)),
                sessions_pb2.AppendRequest(data=b"evil"),
            ]
        ),
        metadata=EVE,
    ),
    "Generate": lambda stub, name: stub.Generate(
        sessions_pb2.SessionServiceGenerateRequest(session_id=name, prompt="?"), metadata=EVE
    ),
    "Generate that expects": lambda stub, name: stub.Generate(
        sessions_pb2.SessionServiceGenerateRequest(session_id=name, prompt="?", expected_num_tokens=8), metadata=EVE
    ),
    "Close": lambda stub, name: stub.Close(sessions_pb2.CloseRequest(session_id=name), metadata=EVE),
    "Close and purge": lambda stub, name: stub.Close(
        sessions_pb2.CloseRequest(session_id=name, purge=True), metadata=EVE
    ),
    "Fork": lambda stub, name: stub.Fork(sessions_pb2.ForkRequest(session_id=name), metadata=EVE),
    "Truncate": lambda stub, name: stub.Truncate(sessions_pb2.TruncateRequest(session_id=name), metadata=EVE),
    "Move": lambda stub, name: stub.Move(sessions_pb2.MoveRequest(session_id=name), metadata=EVE),
    "Create with its document": lambda stub, name: stub.Create(
        sessions_pb2.CreateRequest(document_id=name), metadata=EVE
    ),
    "Create with its document, under a request_id": lambda stub, name: stub.Create(
        sessions_pb2.CreateRequest(document_id=name, request_id="r"), metadata=EVE
    ),
    "Fork, under a request_id": lambda stub, name: stub.Fork(
        sessions_pb2.ForkRequest(session_id=name, request_id="r"), metadata=EVE
    ),
}


async def refusal(call: Any) -> tuple[object, ...]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await first(call)
    error = error_from_rpc(caught.value, "")
    return (
        error.status,
        error.reason,
        error.message,
        error.field,
        error.metadata,
        error.retry_after_s,
        [key for key, _ in caught.value.trailing_metadata()],
    )


@pytest.mark.parametrize("name", list(CALLS))
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_anothers_session_answers_as_one_that_never_was(service, name: str, busy: bool) -> None:
    ann = await service.client("ann-key")
    session = await ann.create_session()
    await ann.append(session.session_id, "document")
    answer: asyncio.Task[Any] | None = None
    if busy:
        service.worker.pause_after = 1
        answer = asyncio.create_task(ann.ask(session.session_id, "q", max_new_tokens=2))
        await service.worker.wait_for("submits", 2)
    num_submits = len(service.worker.submits)
    stub = sessions_pb2_grpc.SessionServiceStub(await service.channel())
    told = await refusal(CALLS[name](stub, session.session_id))
    nothing = await refusal(CALLS[name](stub, NEVER_WAS))
    assert repr(told).replace(session.session_id, "ID") == repr(nothing).replace(NEVER_WAS, "ID")
    # Nothing reached a worker, and nothing changed.
    assert len(service.worker.submits) == num_submits
    assert not service.worker.releases
    if answer is not None:
        service.worker.go.set()
        await answer
    assert (await ann.get(session.session_id)).num_tokens == (11 if busy else 8)


@pytest.mark.parametrize(
    "guess", ["", "*", "%", "../", "ann", "a" * 10_000, "\x00", "ann\x00", "🙂", "kvs:{session:x}:record"]
)
async def test_guesses_find_nothing(service, guess: str) -> None:
    await (await service.client("ann-key")).create_session()
    stub = sessions_pb2_grpc.SessionServiceStub(await service.channel())
    told = await refusal(stub.Get(sessions_pb2.GetRequest(session_id=guess), metadata=EVE))
    assert told[:2] == ("NOT_FOUND", "unknown_session")
    if guess:
        # An empty one is none: the session begins without a document.
        told = await refusal(stub.Create(sessions_pb2.CreateRequest(document_id=guess), metadata=EVE))
        assert told[0] == "NOT_FOUND"


async def test_list_shows_ones_own_and_takes_no_token_of_anothers(service) -> None:
    ann, eve = await service.client("ann-key"), await service.client("eve-key")
    for _ in range(3):
        await ann.create_session()
    own = await eve.create_session()
    assert [session.session_id async for session in eve.list()] == [own.session_id]
    stub = sessions_pb2_grpc.SessionServiceStub(await service.channel())
    page = await stub.List(sessions_pb2.ListRequest(page_size=1), metadata=(("authorization", "Bearer ann-key"),))
    raw = base64.urlsafe_b64decode(page.next_page_token)
    forged = base64.urlsafe_b64encode(bytes(16) + raw[16:]).decode()
    for token in (page.next_page_token, forged, "AAAA", "x"):
        told = await refusal(stub.List(sessions_pb2.ListRequest(page_token=token), metadata=EVE))
        assert told[0] == "INVALID_ARGUMENT"
        assert not any(part in str(told) for part in (raw[16:].decode(), "ann"))


async def test_request_ids_of_others_mean_nothing(service) -> None:
    ann, eve = await service.client("ann-key"), await service.client("eve-key")
    theirs = await ann.create_session(request_id="r1")
    mine = await eve.create_session(request_id="r1")
    assert mine.session_id != theirs.session_id
    answer = await ann.ask(theirs.session_id, "q", request_id="r2", max_new_tokens=2)
    again = await eve.ask(mine.session_id, "q", request_id="r2", max_new_tokens=2)
    # Carried out anew, with another seed: nothing was replayed.
    assert again.started.session_id == mine.session_id
    assert again.started.seed != answer.started.seed
    assert len(service.worker.submits) == 2


async def test_the_same_document_of_two_tenants_goes_under_two_tags(service) -> None:
    """The worker shares and stores KV under the tag alone, so what is equal isn't shared, nor is its timing seen."""
    for name in ("ann", "eve"):
        client = await service.client(f"{name}-key")
        session = await client.create_session()
        await client.append(session.session_id, "the same document")
    tags = [submit.tenant_tag for submit in service.worker.submits]
    assert tags == [tenant_tag(SECRET, TenantId("ann")), tenant_tag(SECRET, TenantId("eve"))]
    assert b"ann" not in tags[0]


@pytest.mark.parametrize(
    "metadata",
    [
        (*EVE, ("tenant", "ann"), ("x-tenant", "ann"), ("kvservice-tenant", "ann")),
        (("authorization", "Bearer eve-key"), ("authorization", "Bearer ann-key")),
        (("authorization", "Bearer ann-key"), ("authorization", "Bearer eve-key")),
        (("authorization", "Bearer eve-key, Bearer ann-key"),),
        (("authorization", "Bearer eve-key ann"),),
    ],
    ids=["names a tenant", "two keys", "two keys turned round", "two keys in one", "key and name"],
)
async def test_nothing_in_metadata_names_another_tenant(service, metadata) -> None:
    ann = await service.client("ann-key")
    session = await ann.create_session()
    stub = sessions_pb2_grpc.SessionServiceStub(await service.channel())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Get(sessions_pb2.GetRequest(session_id=session.session_id), metadata=metadata)
    assert caught.value.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAUTHENTICATED)


async def test_a_tenant_sees_and_sets_nothing_of_the_service(service) -> None:
    admin = admin_pb2_grpc.AdminServiceStub(await service.channel())
    for call in (
        admin.GetStats(admin_pb2.GetStatsRequest(), metadata=EVE),
        admin.SetQuota(admin_pb2.SetQuotaRequest(tenant="ann", requests_per_minute=1), metadata=EVE),
        admin.SetQuota(admin_pb2.SetQuotaRequest(tenant="eve", requests_per_minute=0), metadata=EVE),
        admin.Drain(admin_pb2.DrainRequest(), metadata=EVE),
        admin.Verify(admin_pb2.VerifyRequest(tenant="ann"), metadata=EVE),
        admin.ListUsage(admin_pb2.ListUsageRequest(), metadata=EVE),
        admin.GetStats(admin_pb2.GetStatsRequest(tenant="eve"), metadata=EVE),
    ):
        assert (await refusal(call))[0] == "PERMISSION_DENIED"


async def test_answers_without_a_session_are_no_session_of_anybody(service) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(await service.channel())
    request = inference_pb2.InferenceServiceGenerateRequest(document="d", prompt="q")
    request.sampling.max_new_tokens = 1
    await first(stub.Generate(request, metadata=(("authorization", "Bearer ann-key"),)))
    sessions = sessions_pb2_grpc.SessionServiceStub(await service.channel())
    name = service.worker.submits[0].session_id
    assert (await refusal(sessions.Get(sessions_pb2.GetRequest(session_id=name), metadata=EVE)))[0] == "NOT_FOUND"


async def test_the_timing_of_a_hit_tells_nothing_since_names_of_what_is_held_are_each_tenants_own(service) -> None:
    """Placement looks for what workers hold under the tenant's own names: another's document is never a reason."""
    document = "the same document, longer than a group of 64 tokens, so that a part of it has a name" * 3
    tags = []
    for name in ("ann", "eve"):
        client = await service.client(f"{name}-key")
        session = await client.create_session()
        await client.append(session.session_id, document)
        tags.append(service.worker.submits[-1].tenant_tag)
    ann, eve = (lengths_by_name(tag, "recall", tuple(document.encode())) for tag in tags)
    assert ann
    assert not ann.keys() & eve.keys()


async def test_the_same_document_costs_each_tenant_the_same(service) -> None:
    """What is charged and told doesn't depend on whether another tenant has had it read, forked or closed."""
    ann = await service.client("ann-key")
    session = await ann.create_session()
    await ann.append(session.session_id, "a document")
    fork = await ann.fork_session(session.session_id)
    await ann.close_session(session.session_id)
    usages = []
    for name in ("ann", "eve"):
        client = await service.client(f"{name}-key")
        own = await client.create_session()
        usages.append((await client.append(own.session_id, "a document")).usage)
    assert usages[0] == usages[1]
    assert fork.num_tokens == 10


@pytest.mark.parametrize(
    "limit", [{"sessions": 1}, {"document_tokens": 3}, {"requests_per_minute": 3}, {"concurrent_calls": 1}]
)
async def test_errors_of_one_tenant_speak_of_no_other(service, limit: dict[str, int]) -> None:
    admin = admin_pb2_grpc.AdminServiceStub(await service.channel())
    operator = (("authorization", "Bearer operator-key"),)
    await admin.SetQuota(admin_pb2.SetQuotaRequest(tenant="eve", **limit), metadata=operator)
    ann, eve = await service.client("ann-key"), await service.client("eve-key")
    theirs = await ann.create_session()
    own = await eve.create_session()
    told: list[str] = []
    for attempt in range(4):
        for call in (
            lambda: eve.create_session(),
            lambda: eve.append(own.session_id, "x" * 9),
            lambda: eve.fork_session(theirs.session_id),
            lambda attempt=attempt: eve.ask(theirs.session_id, "q", request_id=f"r{attempt}"),  # type: ignore[misc]
        ):
            try:
                await call()
            except KVServiceError as error:
                told.append(f"{error.message} {error.reason} {error.metadata}".replace(theirs.session_id, ""))
    assert told
    assert not any(word in text for text in told for word in ("ann", "ops", "w1", service.worker.address))
