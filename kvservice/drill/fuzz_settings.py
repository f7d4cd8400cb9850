"""More that the fuzzer feeds: what operators write into files, and what callers post over HTTP.

settings    of the whole service, as JSON or TOML
seals       the file of keys that stored KV is sealed with
bodies      of OpenAI's requests, and the messages that they become
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from pydantic import ValidationError

from kvservice.config.service import ServiceConfig
from kvservice.drill.fuzz import Target
from kvservice.errors import InvalidRequest, KVServiceError
from kvservice.gateway.web.requests import Body, ChatBody, CompletionBody, parse
from kvservice.tier.sealing import load_keyring
from kvservice.v1 import inference_pb2, sessions_pb2

ACCEPTED = "accepted"


def more_targets(folder: Path) -> tuple[Target, ...]:
    """Files that a parser wants by name are written into `folder`."""
    seals = folder / "seals.json"

    def read_seals(data: bytes) -> str:
        seals.write_bytes(data)
        seals.chmod(0o600)
        try:
            load_keyring(seals)
        except KVServiceError as error:
            return f"refused: {error.reason or error.status}"
        return ACCEPTED

    return (
        Target("settings", _settings(), _read_settings, ("kvservice/config/",)),
        Target("seals", _seals(), read_seals, ("kvservice/tier/sealing",)),
        Target("bodies", _bodies(), _read_body, ("kvservice/gateway/web/requests",)),
    )


def _settings() -> list[bytes]:
    gateway = {"secret": "s" * 32, "port": 0, "limits": {"min_ttl_s": 1.0}, "quota": {"requests_per_minute": 5}}
    worker = {"model": "m", "kv_bytes": "64MiB", "host_bytes": 128, "deterministic": True, "redis_url": "redis://h:1/0"}
    whole = {"gateway": gateway, "worker": worker, "workers": 2, "state_url": "redis://h:2/0", "log_level": "INFO"}
    in_toml = b'workers = 2\n[gateway]\nport = 0\nsecret = "ssssssssssssssssssssssssssssssss"\n[worker]\nmodel = "m"\n'
    return [json.dumps(each).encode() for each in (whole, {"gateway": gateway}, {"worker": worker}, {})] + [in_toml]


def _read_settings(data: bytes) -> str:
    try:
        text = data.decode()
        settings = json.loads(text) if text.startswith("{") else tomllib.loads(text)
    except (ValueError, RecursionError):
        return "refused: illegible"
    if not isinstance(settings, dict):
        return "refused: not a table"
    try:
        ServiceConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        return f"refused: {first['type']}"
    return ACCEPTED


def _seals() -> list[bytes]:
    keys = {"1": "00" * 32, "2": "ff" * 32}
    return [json.dumps({"current": 2, "keys": keys}).encode(), b'{"current": 1, "keys": {"1": "aa"}}']


def _bodies() -> list[bytes]:
    """The first byte says which kind it is."""
    sampling = {"temperature": 0.5, "top_p": 0.9, "n": 2, "stop": ["a"], "seed": 3, "logit_bias": {"5": -3}}
    chat = {"model": "m", "messages": [{"role": "user", "content": "why?"}], "max_tokens": 5, **sampling}
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    completion = {"prompt": [1, 2, 300], "max_tokens": 5, "logprobs": 2, "stream": True, **sampling}
    formed = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "response_format": schema}
    return [b"\0" + json.dumps(each).encode() for each in (chat, formed)] + [b"\1" + json.dumps(completion).encode()]


def _read_body(data: bytes) -> str:
    try:
        body: Body = parse(CompletionBody, data[1:]) if data[:1] == b"\1" else parse(ChatBody, data[1:])
        for message in (sessions_pb2.SessionServiceGenerateRequest(), inference_pb2.InferenceServiceGenerateRequest()):
            body.fill(message)
    except InvalidRequest as error:
        return f"refused: {error.reason}"
    return f"accepted: {type(body).__name__}"
