"""Turns of a conversation instead of a prompt, over gRPC."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from kvservice.types import ChatMessage, ChatRole, PromptFormat
from kvservice.v1 import common_pb2, inference_pb2, sessions_pb2
from tests.unit.gateway.conftest import Service

USER, ASSISTANT = common_pb2.CHAT_ROLE_USER, common_pb2.CHAT_ROLE_ASSISTANT
CHAT, RAW = common_pb2.PROMPT_FORMAT_CHAT, common_pb2.PROMPT_FORMAT_RAW
SAMPLING = common_pb2.SamplingParams(max_new_tokens=3)


def turns(*texts: str) -> list[common_pb2.ChatMessage]:
    roles = (USER, ASSISTANT)
    return [common_pb2.ChatMessage(role=roles[i % 2], content=text) for i, text in enumerate(texts)]


async def events(responses: Any) -> list[common_pb2.GenerateEvent]:
    return [response.event async for response in responses]


async def refusal(responses: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await events(responses)
    return raised.value


async def test_the_last_turn_is_the_question_and_those_before_are_read(service: Service) -> None:
    stub = await service.inference()
    request = inference_pb2.InferenceServiceGenerateRequest(
        prompt_format=CHAT, messages=turns("one", "two", "three"), sampling=SAMPLING
    )
    finished = (await events(stub.Generate(request)))[-1].finished
    sent = service.worker.submits[0].generate
    assert (bytes(sent.document_token_ids), bytes(sent.prompt_token_ids)) == (b"onetwo", b"three")
    assert finished.usage.completion_tokens == 3
    assert service.worker.tokenized[0].first


async def test_a_session_goes_on_by_turns(service: Service) -> None:
    stub = await service.sessions()
    created = await stub.Create(sessions_pb2.CreateRequest(prompt_format=CHAT))
    for text in ("hello", "again"):
        request = sessions_pb2.SessionServiceGenerateRequest(
            session_id=created.session.session_id, messages=turns(text), sampling=SAMPLING
        )
        await events(stub.Generate(request))
    assert [each.first for each in service.worker.tokenized] == [True, False]
    assert len(service.worker.submits[1].base_token_ids) == len("hello") + 3


async def test_our_client_sends_turns_too(service: Service) -> None:
    client = await service.client()
    session = await client.create_session(prompt_format=PromptFormat.CHAT)
    said = [ChatMessage(ChatRole.USER, "one"), ChatMessage(ChatRole.ASSISTANT, "two"), ChatMessage(ChatRole.USER, "x")]
    answer = await client.ask(session.session_id, messages=said, max_new_tokens=2)
    assert answer.finished.usage.prompt_tokens == len("onetwox")
    async for event in client.complete(messages=said, prompt_format=PromptFormat.CHAT, max_new_tokens=2):
        last = event
    assert last.usage == answer.finished.usage


async def test_a_repeat_with_other_turns_is_another_request(service: Service) -> None:
    stub = await service.sessions()
    session = (await stub.Create(sessions_pb2.CreateRequest(prompt_format=CHAT))).session

    def request(text: str) -> sessions_pb2.SessionServiceGenerateRequest:
        return sessions_pb2.SessionServiceGenerateRequest(
            session_id=session.session_id, request_id="r", messages=turns(text), sampling=SAMPLING
        )

    first = await events(stub.Generate(request("a")))
    assert await events(stub.Generate(request("a"))) == first
    assert (await refusal(stub.Generate(request("b")))).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_turns_need_the_chat_form_and_no_prompt_beside_them(service: Service) -> None:
    stub, inference = await service.sessions(), await service.inference()
    session = (await stub.Create(sessions_pb2.CreateRequest(prompt_format=RAW))).session
    raw = await refusal(
        stub.Generate(sessions_pb2.SessionServiceGenerateRequest(session_id=session.session_id, messages=turns("a")))
    )
    both = await refusal(
        inference.Generate(
            inference_pb2.InferenceServiceGenerateRequest(prompt_format=CHAT, prompt="a", messages=turns("a"))
        )
    )
    for error, words in ((raw, "prompt format CHAT"), (both, "not both")):
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in error.details()
    assert service.worker.submits == []
