"""Bodies of OpenAI's requests, and the messages of our own API that they become. Knows nothing of HTTP.

What is named here is honoured, or said to be without effect; everything else is refused by name.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvservice.errors import InvalidRequest
from kvservice.v1 import common_pb2, inference_pb2, sessions_pb2

BodyT = TypeVar("BodyT", bound="_Body")

COMPLETION_TOKENS = 16
"""OpenAI's default for completions; an answer to a chat has the service's."""
MOST_UINT32 = 2**32 - 1

Uint32 = Annotated[int, Field(ge=0, le=MOST_UINT32)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
TokenIds = list[Uint32]

ANY_OBJECT = '{"type": "object"}'

ROLES = {
    "system": common_pb2.CHAT_ROLE_SYSTEM,
    "developer": common_pb2.CHAT_ROLE_SYSTEM,
    "user": common_pb2.CHAT_ROLE_USER,
    "assistant": common_pb2.CHAT_ROLE_ASSISTANT,
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextPart(_Part):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class Message(_Part):
    """A turn of a conversation. An answer may be sent back as it came: what is empty in it is let through."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    annotations: list[object] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: list[object] | None = Field(None, max_length=0)

    def to_proto(self) -> common_pb2.ChatMessage:
        """The message with its text in one piece."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return common_pb2.ChatMessage(role=ROLES[self.role], content=text)


class StreamOptions(_Part):
    """What a stream holds beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class NamedSchema(_Part):
    """A JSON schema. Answers always fit it, whether `strict` or not."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, object] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Part):
    """What an answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def schema_text(self) -> str | None:
        """The JSON schema that an answer must fit, if any."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise InvalidRequest("response_format.json_schema is missing: send the schema", field="response_format")
            return json.dumps(self.json_schema.schema_)
        return ANY_OBJECT if self.type == "json_object" else None


class _Body(BaseModel):
    """What both kinds of request have in common. `recipe`, `priority` and the lower half of sampling are ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Uint32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Uint32 | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[Uint32, float] | None = None
    # Without effect.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None
    # Beyond OpenAI's.
    recipe: str = ""
    priority: Int32 = 0
    top_k: Uint32 | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, max_tokens: int | None, logprobs: int | None, schema: str | None) -> common_pb2.SamplingParams:
        return common_pb2.SamplingParams(
            # OpenAI's default.
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            seed=None if self.seed is None else self.seed % 2**64,
            max_new_tokens=max_tokens,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop,
            ignore_eos=self.ignore_eos,
            logit_bias=self.logit_bias,
            grammar=None if schema is None else common_pb2.Grammar(json_schema=schema),
            n=self.n,
            logprobs=logprobs,
        )


class ChatBody(_Body):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Uint32 | None = None
    logprobs: bool = False
    top_logprobs: Uint32 | None = None
    response_format: ResponseFormat | None = None

    def fill(self, request: GenerateRequest) -> None:
        """Puts the conversation and how it is to be answered into `request`."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs=true", field="top_logprobs")
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        schema = self.response_format.schema_text() if self.response_format is not None else None
        request.messages.extend(message.to_proto() for message in self.messages)
        request.sampling.CopyFrom(self._sampling(most, (self.top_logprobs or 0) if self.logprobs else None, schema))


class CompletionBody(_Body):
    """`POST /v1/completions`. One prompt."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    max_tokens: Uint32 | None = COMPLETION_TOKENS
    logprobs: Uint32 | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def fill(self, request: GenerateRequest) -> None:
        """Puts the prompt and how it is to be completed into `request`."""
        prompt = self._only_prompt()
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.prompt_token_ids.extend(prompt)
        request.sampling.CopyFrom(self._sampling(self.max_tokens, self.logprobs, None))

    def _only_prompt(self) -> str | TokenIds:
        if isinstance(self.prompt, str):
            return self.prompt
        several: list[str | TokenIds] = [each for each in self.prompt if not isinstance(each, int)]
        if not several:
            return [each for each in self.prompt if isinstance(each, int)]
        if len(several) > 1:
            raise InvalidRequest(f"prompt holds {len(several)} prompts: send one a request", field="prompt")
        return several[0]


GenerateRequest = sessions_pb2.SessionServiceGenerateRequest | inference_pb2.InferenceServiceGenerateRequest
Body = ChatBody | CompletionBody


def parse(kind: type[BodyT], data: bytes) -> BodyT:
    """The body of a request.

    Raises:
        InvalidRequest: not JSON, a value of the wrong kind, or a parameter that isn't served; `field` names it.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        # What was sent is left out: it may be a text of users.
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    # Words such as `str` in it are branches of a union; the parameter itself comes first.
    place = first["loc"]
    field = str(place[0]) if place else "body"
    if first["type"] == "extra_forbidden":
        name = ".".join(str(part) for part in place)
        raise InvalidRequest(
            f"{name}: this parameter is not served; leave it out", field=field, reason="unsupported_parameter"
        )
    raise InvalidRequest(f"{'.'.join(str(part) for part in place) or 'body'}: {first['msg']}", field=field)
