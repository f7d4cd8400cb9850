"""The OpenAI-compatible HTTP API over a scripted worker, by OpenAI's own client and by hand."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from kvservice.config.gateway import QuotaConfig
from kvservice.config.identity import TlsConfig
from kvservice.config.limits import Limits
from kvservice.errors import ConfigError
from kvservice.gateway.web.requests import ChatBody, parse
from kvservice.types import Role
from tests.unit.gateway.certificates import Authority
from tests.unit.gateway.conftest import Service, eventually, keys, running
from tests.unit.gateway.fake_worker import OVERLOADED, answer_tokens

QUESTION = [{"role": "user", "content": "why?"}]
SEED = {"seed": 3, "max_tokens": 5}
TEXT = bytes(answer_tokens(3, 5)).decode()


class Web:
    """A service with its HTTP port, and clients of it."""

    def __init__(self, service: Service, stack: AsyncExitStack) -> None:
        self.service = service
        self.worker = service.worker if service.workers else None
        self.url = f"http://{service.gateway.http_address}"
        self._stack = stack

    async def openai(self, key: str = "none") -> openai.AsyncOpenAI:
        client = openai.AsyncOpenAI(api_key=key, base_url=f"{self.url}/v1", max_retries=0)
        return await self._stack.enter_async_context(client)

    async def http(self) -> aiohttp.ClientSession:
        return await self._stack.enter_async_context(aiohttp.ClientSession(self.url))


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Web]:
    async with running(**{"http_port": 0, **settings}) as service, AsyncExitStack() as stack:
        yield Web(service, stack)


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    async with serving() as web:
        yield web


async def test_a_chat_is_answered_with_its_turns_in_the_template(web: Web) -> None:
    client = await web.openai()
    turns = [{"role": "system", "content": "short"}, {"role": "user", "content": "hello"}]
    answer = await client.chat.completions.create(model="toy", messages=[*turns, *QUESTION], **SEED)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.object, answer.model) == ("chat.completion", "toy")
    sent = web.worker.submits[0]
    assert bytes(sent.generate.document_token_ids) == b"shorthello"
    assert bytes(sent.generate.prompt_token_ids) == b"why?"
    assert not sent.retain
    assert sent.generate.sampling.temperature == 1.0
    assert answer.usage.completion_tokens == 5
    assert answer._request_id.startswith("req_")


async def test_a_stream_tells_the_same_and_ends_with_reason_and_usage(web: Web) -> None:
    client = await web.openai()
    stream = await client.chat.completions.create(
        model="toy", messages=QUESTION, stream=True, stream_options={"include_usage": True}, **SEED
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_stream_is_framed_as_server_sent_events(web: Web) -> None:
    http = await web.http()
    body = {"model": "toy", "messages": QUESTION, "stream": True, "max_tokens": 1, "seed": 0}
    async with http.post("/v1/chat/completions", json=body) as response:
        assert response.content_type == "text/event-stream"
        assert response.headers["Cache-Control"] == "no-cache"
        events = (await response.text()).split("\n\n")
    assert all(event.startswith("data: ") for event in events[:-1])
    assert events[-2:] == ["data: [DONE]", ""]


async def test_a_prompt_is_completed_as_text_or_as_token_ids(web: Web) -> None:
    client = await web.openai()
    for prompt in ("why?", ["why?"], list(b"why?"), [list(b"why?")]):
        answer = await client.completions.create(model="toy", prompt=prompt, **SEED)
        assert answer.choices[0].text == TEXT
        assert bytes(web.worker.submits[-1].generate.prompt_token_ids) == b"why?"
    stream = await client.completions.create(model="toy", prompt="why?", stream=True, **SEED)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT
    await client.completions.create(model="toy", prompt="why?")
    assert web.worker.submits[-1].generate.sampling.max_new_tokens == 16


async def test_several_answers_and_log_probabilities_come_in_their_places(web: Web) -> None:
    client = await web.openai()
    answer = await client.chat.completions.create(
        model="toy", messages=QUESTION, n=2, logprobs=True, top_logprobs=2, **SEED
    )
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [TEXT, bytes(answer_tokens(4, 5)).decode()]
    first = answer.choices[0].logprobs.content[0]
    assert (first.token, first.logprob) == (f"token_id:{ord(TEXT[0])}", -ord(TEXT[0]))
    assert [top.token for top in first.top_logprobs] == ["token_id:0", "token_id:1"]
    stream = await client.chat.completions.create(model="toy", messages=QUESTION, n=2, stream=True, **SEED)
    streamed = {0: "", 1: ""}
    async for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [streamed[0], streamed[1]] == texts


async def test_a_session_begins_goes_on_and_ends_by_its_header(web: Web) -> None:
    client = await web.openai()
    first = await client.chat.completions.with_raw_response.create(
        model="toy", messages=QUESTION, extra_headers={"Kvservice-Session": "new"}, **SEED
    )
    session = first.headers["kvservice-session"]
    assert first.parse().kvservice["num_tokens"] == 9
    more = [{"role": "user", "content": "and?"}]
    header = {"Kvservice-Session": session}
    second = await client.chat.completions.create(model="toy", messages=more, extra_headers=header, **SEED)
    assert bytes(web.worker.submits[-1].base_token_ids) == b"why?" + TEXT.encode()
    assert web.worker.submits[-1].retain
    assert second.usage.prompt_tokens == 9 + 4
    assert second.usage.prompt_tokens_details.cached_tokens == 9
    assert second.kvservice["session"] == session
    http = await web.http()
    async with http.delete(f"/v1/sessions/{session}") as response:
        assert (await response.json())["deleted"]
    with pytest.raises(openai.NotFoundError, match="unknown session"):
        await client.chat.completions.create(model="toy", messages=more, extra_headers=header)


async def test_a_session_whose_first_request_fails_is_not_left_behind(web: Web) -> None:
    client = await web.openai()
    begin = {"Kvservice-Session": "new"}
    with pytest.raises(openai.BadRequestError) as too_long:
        await client.chat.completions.create(
            model="toy", messages=[{"role": "user", "content": "x" * 3000}], extra_headers=begin
        )
    assert "kvservice-session" not in too_long.value.response.headers
    ours = await web.service.client()

    async def none_is_left() -> bool:
        return [each async for each in ours.list()] == []

    await eventually(none_is_left)
    for wrong in ({"max_tokens": 0}, {"extra_body": {"recipe": "exact"}, "n": 99}):
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model="toy", messages=QUESTION, extra_headers=begin, **wrong)
    await eventually(none_is_left)
    with pytest.raises(openai.BadRequestError):
        # Not even begun: the request can't be served whatever holds it.
        await client.chat.completions.create(
            model="toy", messages=QUESTION, top_logprobs=2, extra_headers={**begin, "Idempotency-Key": "k"}
        )
    assert await none_is_left()


async def test_a_repeat_under_one_idempotency_key_is_answered_from_memory(web: Web) -> None:
    client = await web.openai()
    headers = {"Kvservice-Session": "new", "Idempotency-Key": "k-1"}
    answers = [
        await client.chat.completions.with_raw_response.create(
            model="toy", messages=QUESTION, max_tokens=4, extra_headers=headers
        )
        for _ in range(2)
    ]
    assert len({answer.headers["kvservice-session"] for answer in answers}) == 1
    assert len({answer.parse().choices[0].message.content for answer in answers}) == 1
    assert len(web.worker.submits) == 1


async def test_a_caller_that_goes_away_cancels_its_call(web: Web) -> None:
    web.worker.pause_after = 2
    client = await web.openai()
    stream = await client.chat.completions.create(model="toy", messages=QUESTION, stream=True, max_tokens=50)
    async for _ in stream:
        break
    await stream.close()
    await web.worker.wait_for("cancels", 1)
    # And one that waits for the whole answer.
    waiting = asyncio.create_task(client.chat.completions.create(model="toy", messages=QUESTION, max_tokens=50))
    await web.worker.wait_for("submits", 2)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await web.worker.wait_for("cancels", 2)
    await eventually(lambda: web.service.gateway.levels().running_calls == 0)


async def test_a_deadline_ends_a_call_before_or_within_its_stream(web: Web) -> None:
    web.worker.pause_after = 2
    client = await web.openai()
    soon = {"Kvservice-Timeout-S": "0.2"}
    with pytest.raises(openai.InternalServerError) as late:
        await client.chat.completions.create(model="toy", messages=QUESTION, extra_headers=soon)
    assert late.value.status_code == 504
    stream = await client.chat.completions.create(model="toy", messages=QUESTION, stream=True, extra_headers=soon)
    with pytest.raises(openai.APIError, match=r"deadline|have passed"):
        async for _ in stream:
            pass
    await web.worker.wait_for("cancels", 2)
    with pytest.raises(openai.BadRequestError, match="seconds above 0"):
        await client.models.list(extra_headers={"Kvservice-Timeout-S": "nan"})


async def test_models_are_listed_and_shown(web: Web) -> None:
    client = await web.openai()
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == ["toy"]
    assert (await client.models.retrieve("toy")).max_model_len == 2000
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.models.retrieve("gpt-9")
    assert unknown.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"tools": []}, "tools", "not served"),
        ({"max_tokens": 0}, "max_tokens", "1 to 4096"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal"),
        ({"temperature": 11}, "temperature", "0 to 10"),
        ({"n": 100}, "n", "1 to 8"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "system"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "missing"),
        ({"model": 7}, "model", "string"),
    ],
)
async def test_what_cannot_be_had_is_refused_by_name(web: Web, more: dict, param: str, message: str) -> None:
    http = await web.http()
    async with http.post("/v1/chat/completions", json={"model": "toy", "messages": QUESTION, **more}) as response:
        error = (await response.json())["error"]
        assert response.status == 400, error
        assert response.headers["x-should-retry"] == "false"
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert message in error["message"]
    assert web.worker.submits == []


async def test_an_error_has_the_status_that_clients_know() -> None:
    async with serving(max_wait_s=0.1) as web:
        await check_statuses(web)


async def check_statuses(web: Web) -> None:
    client = await web.openai()
    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError):
        await ask(model="gpt-9", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as too_long:
        await ask(model="toy", messages=[{"role": "user", "content": "x" * 3000}])
    assert too_long.value.code == "context_length_exceeded"
    web.worker.refusals.append(OVERLOADED)
    web.worker.failures.append(OVERLOADED)
    with pytest.raises(openai.RateLimitError) as full:
        await ask(model="toy", messages=QUESTION, max_tokens=1)
    assert full.value.response.headers["x-should-retry"] == "true"
    web.service.gateway.begin_drain(0.0)
    with pytest.raises(openai.InternalServerError) as draining:
        await ask(model="toy", messages=QUESTION)
    assert draining.value.status_code == 503
    assert draining.value.response.headers["retry-after"] == "1"


async def test_a_busy_session_is_a_conflict(web: Web) -> None:
    web.worker.pause_after = 1
    client = await web.openai()
    first = await client.chat.completions.with_raw_response.create(
        model="toy", messages=QUESTION, stream=True, max_tokens=9, extra_headers={"Kvservice-Session": "new"}
    )
    header = {"Kvservice-Session": first.headers["kvservice-session"]}
    with pytest.raises(openai.ConflictError) as busy:
        await client.chat.completions.create(model="toy", messages=QUESTION, extra_headers=header)
    assert busy.value.code == "session_busy"
    web.worker.go.set()
    assert [chunk async for chunk in first.parse()][-1].choices[0].finish_reason == "length"


async def test_keys_decide_the_tenant_and_hold_its_sessions_apart() -> None:
    api_keys = keys(("a", "acme", Role.TENANT), ("b", "beta", Role.TENANT))
    async with serving(api_keys=api_keys) as web:
        with pytest.raises(openai.AuthenticationError) as unknown:
            await (await web.openai("c")).models.list()
        assert unknown.value.code == "invalid_api_key"
        http = await web.http()
        async with http.post("/v1/chat/completions", data=b"x" * 100) as response:
            # Without a key nothing of the body is looked at.
            assert response.status == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
        acme, beta = await web.openai("a"), await web.openai("b")
        begun = await acme.chat.completions.with_raw_response.create(
            model="toy", messages=QUESTION, max_tokens=1, extra_headers={"Kvservice-Session": "new"}
        )
        header = {"Kvservice-Session": begun.headers["kvservice-session"]}
        with pytest.raises(openai.NotFoundError) as foreign:
            await beta.chat.completions.create(model="toy", messages=QUESTION, extra_headers=header)
        with pytest.raises(openai.NotFoundError) as unknown_id:
            await beta.chat.completions.create(
                model="toy", messages=QUESTION, extra_headers={"Kvservice-Session": "0" * 32}
            )
        of_foreign = foreign.value.message.replace(header["Kvservice-Session"], "0" * 32)
        assert of_foreign == unknown_id.value.message
        async with http.delete(
            f"/v1/sessions/{header['Kvservice-Session']}", headers={"Authorization": "Bearer b"}
        ) as response:
            assert response.status == 404


async def test_quotas_and_counts_are_those_of_grpc() -> None:
    async with serving(quota=QuotaConfig(requests_per_minute=2)) as web:
        client, grpc_client = await web.openai(), await web.service.client()
        await client.models.list()
        await grpc_client.list_models()
        with pytest.raises(openai.RateLimitError) as over:
            await client.models.list()
        assert over.value.code == "quota_exceeded"
        assert over.value.body["metadata"]["quota"] == "requests_per_minute"
        assert int(over.value.response.headers["retry-after"]) >= 1
        registry = web.service.gateway.metrics.registry
        labels = {"method": "/v1/models", "code": "RESOURCE_EXHAUSTED"}
        assert registry.get_sample_value("kvservice_rpcs_total", labels) == 1


async def test_a_body_beyond_the_limit_or_of_another_kind_is_refused() -> None:
    async with serving(limits=Limits(http_body_bytes=64 * 1024)) as web:
        http = await web.http()
        async with http.post(
            "/v1/chat/completions", data=b" " * 70_000, headers={"Content-Type": "application/json"}
        ) as response:
            assert response.status == 413
            assert (await response.json())["error"]["code"] == "body_too_large"
        async with http.post("/v1/chat/completions", data={"model": "toy"}) as response:
            assert response.status == 415
        for body in (b"{", b"[]", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"\xff"):
            async with http.post(
                "/v1/chat/completions", data=body, headers={"Content-Type": "application/json"}
            ) as response:
                assert response.status == 400
                json.dumps(await response.json())


async def test_an_upload_that_stops_is_given_up() -> None:
    async with serving(limits=Limits(upload_idle_s=0.1)) as web:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(web.url.rpartition(":")[2]))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        assert b" 408 " in await reader.readline()
        writer.close()
        await writer.wait_closed()


async def test_other_paths_and_methods_answer_in_the_same_form(web: Web) -> None:
    http = await web.http()
    async with http.get("/v1/embeddings") as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "unknown_path"
    async with http.get("/v1/chat/completions") as response:
        assert response.status == 405


async def test_without_keys_no_page_in_a_browser_may_call(web: Web) -> None:
    http = await web.http()
    async with http.get("/v1/models", headers={"Origin": "http://evil.example"}) as response:
        assert response.status == 403


async def test_the_same_certificates_hold_and_are_renewed(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    files = authority.issue("gateway")
    trust = ssl.create_default_context(cafile=str(authority.ca))
    async with serving(tls=TlsConfig(cert=files.cert, key=files.key)) as web:
        address = web.service.gateway.http_address
        assert address is not None

        async def serial() -> str:
            host, _, port = address.rpartition(":")
            _, writer = await asyncio.open_connection(host, int(port), ssl=trust)
            found = writer.get_extra_info("peercert")["serialNumber"]
            writer.close()
            await writer.wait_closed()
            return str(found)

        before = await serial()
        authority.issue("gateway")
        assert await serial() != before
        async with aiohttp.ClientSession() as http, http.get(f"https://{address}/v1/models", ssl=trust) as response:
            assert response.status == 200
        # In the middle of a renewal the old one goes on.
        renewed = await serial()
        files.cert.write_bytes(b"half")
        assert await serial() == renewed


async def test_with_a_client_authority_strangers_get_no_answer(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    files, known = authority.issue("gateway"), authority.issue("caller")
    trust = ssl.create_default_context(cafile=str(authority.ca))
    async with serving(tls=TlsConfig(cert=files.cert, key=files.key, client_ca=authority.ca)) as web:
        url = f"https://{web.service.gateway.http_address}/v1/models"
        async with aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.ClientError):
                await http.get(url, ssl=trust)
        trust.load_cert_chain(known.cert, known.key)
        async with aiohttp.ClientSession() as http, http.get(url, ssl=trust) as response:
            assert response.status == 200


async def test_a_port_in_use_is_told_at_the_start(web: Web) -> None:
    with pytest.raises(ConfigError, match="http_port"):
        async with serving(http_port=int(web.url.rpartition(":")[2])):
            pass


def test_an_answer_may_be_sent_back_as_it_came() -> None:
    turn = {"role": "assistant", "content": "so", "refusal": None, "tool_calls": None, "annotations": []}
    body = parse(ChatBody, json.dumps({"model": "m", "messages": [*QUESTION, turn, *QUESTION]}).encode())
    assert [message.role for message in body.messages] == ["user", "assistant", "user"]


async def lines_of(web: Web, *pieces: bytes) -> bytes:
    """What a raw connection is told after it has sent these, until it is closed."""
    host, _, port = web.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for piece in pieces:
        writer.write(piece)
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize("pieces", [(), (b"GET /v1/mod",), (b"GET /v1/models HTTP/1.1\r\nHost: a\r\n", b"X-A: b\r\n")])
async def test_headers_that_do_not_come_close_the_connection(pieces):
    async with serving(limits=Limits(header_s=0.2)) as web:
        assert (await lines_of(web, *pieces)).startswith(b"HTTP/1.1 408 ")
        async with (await web.http()).get("/v1/models") as reply:
            assert reply.status == 200


async def test_headers_of_a_second_request_have_their_time_too():
    async with serving(limits=Limits(header_s=0.2)) as web, asyncio.timeout(10):
        host, _, port = web.url.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.write(b"GET /v1/mod")
        assert b"HTTP/1.1 408 " in await reader.read()
        writer.close()


async def test_call_may_take_longer_than_its_headers():
    async with serving(limits=Limits(header_s=0.1)) as web:
        client = await web.openai()
        stream = await client.chat.completions.create(model="", messages=QUESTION, stream=True, extra_body=SEED)
        late = asyncio.get_running_loop().time() + 0.3
        await eventually(lambda: asyncio.get_running_loop().time() > late)
        assert [chunk async for chunk in stream]


async def test_connection_beyond_the_limit_is_told_so_and_leaves_room_for_those_that_are_there():
    async with serving(limits=Limits(connections=2, connections_per_address=2)) as web:
        host, _, port = web.url.removeprefix("http://").rpartition(":")
        idle = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
        assert (await lines_of(web)).startswith(b"HTTP/1.1 503 ")
        for _, writer in idle:
            writer.close()
            await writer.wait_closed()

        async def answers() -> bool:
            async with (await web.http()).get("/v1/models") as reply:
                return reply.status == 200

        await eventually(answers)
