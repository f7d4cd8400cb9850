"""Clients that share no code with us: Node's @grpc/grpc-js from the protos, Python's grpcio by reflection, OpenAI's.

The service is the whole one, with a tiny model of random weights. Node's packages are those of `make foreign`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import socket
import sys
from pathlib import Path

import openai
import pytest
import pytest_asyncio

from kvservice.client import Client, LocalService

ROOT = Path(__file__).parents[2]
FOREIGN = ROOT / "tests" / "foreign"
PROTOS = ROOT / "protos"

pytestmark = pytest.mark.asyncio(loop_scope="module")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from kvservice.models.tiny import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(model):
    sizes = ("--kv-bytes", "48MiB", "--host-bytes", "64MiB", "--dtype", "fp32", "--threads", "1")
    port = free_port()
    arguments = ["--model", str(model), "--log-level", "WARNING", *sizes, "--http-port", str(port)]
    async with LocalService(arguments) as service:
        service.http_url = f"http://127.0.0.1:{port}/v1"
        yield service


async def transcript(*command: str) -> dict[str, str]:
    """What a client printed, by title."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(100):
        out, err = await process.communicate()
    assert process.returncode == 0, out.decode() + err.decode()
    return dict(line.split(": ", 1) for line in out.decode().splitlines())


def check_what_both_say(said: dict[str, str]) -> None:
    assert said["session"] == "recipe recall, 0 tokens"
    assert said["append"] == "920 tokens"
    assert said["events"].replace(" ", "") == '["started","tokens","finished"]'
    assert said["answer"].startswith("6 tokens")
    assert said["answer"].endswith("cached 920")
    assert said["held"] == said["held after the cancel"] == said["held after the deadline"] == "935"
    assert said["cancel"] == "CANCELLED"
    assert said["deadline"] == "DEADLINE_EXCEEDED"
    assert said["unknown session"] == "NOT_FOUND, kvservice/unknown_session, retryable false"
    assert said["wrong request"].startswith("INVALID_ARGUMENT, sampling.max_new_tokens: ")
    assert said["closed"] == "NOT_FOUND"


async def test_node_speaks_to_us_by_the_protos_alone(service) -> None:
    node = shutil.which("node")
    if node is None or not (FOREIGN / "node" / "node_modules").is_dir():
        pytest.skip("needs node, and its packages: make foreign")
    google = importlib.util.find_spec("google.rpc").submodule_search_locations[0]
    said = await transcript(
        node, str(FOREIGN / "node" / "client.mjs"), service.address, str(PROTOS), str(Path(google).parents[1])
    )
    check_what_both_say(said)
    assert "FINISH_REASON_LENGTH" in said["answer"]


async def test_python_speaks_to_us_by_reflection_alone(service) -> None:
    said = await transcript(sys.executable, "-W", "error", str(FOREIGN / "reflecting_client.py"), service.address)
    check_what_both_say(said)
    assert "kvservice.v1.SessionService" in said["services"]


async def test_openai_speaks_to_us_by_http(service) -> None:
    async with (
        openai.AsyncOpenAI(api_key="none", base_url=service.http_url, max_retries=0) as client,
        Client(service.address) as ours,
    ):
        (model,) = [model async for model in client.models.list()]
        turns = [
            {"role": "system", "content": "You know the pass key."},
            {"role": "user", "content": "The pass key is 28478. " * 20},
            {"role": "user", "content": "What is the pass key?"},
        ]
        same = {"model": model.id, "seed": 7, "extra_body": {"ignore_eos": True}}
        whole = await client.chat.completions.create(messages=turns, max_tokens=12, **same)
        stream = await client.chat.completions.create(messages=turns, max_tokens=12, stream=True, **same)
        streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert whole.choices[0].message.content == streamed
        assert whole.usage.completion_tokens == 12

        begun = await client.chat.completions.with_raw_response.create(
            messages=turns, max_tokens=4, extra_headers={"Kvservice-Session": "new"}, **same
        )
        session = begun.headers["kvservice-session"]
        held = begun.parse().kvservice["num_tokens"]
        assert (await ours.get(session)).num_tokens == held == whole.usage.prompt_tokens + 4
        header = {"Kvservice-Session": session}
        more = [{"role": "user", "content": "Again?"}]
        again = await client.chat.completions.create(messages=more, max_tokens=4, extra_headers=header, **same)
        assert again.usage.prompt_tokens_details.cached_tokens == held
        assert again.kvservice["recomputed_tokens"] == 0

        cut = await client.chat.completions.create(
            messages=more, max_tokens=600, stream=True, extra_headers=header, **same
        )
        async for chunk in cut:
            if chunk.choices[0].delta.content:
                break
        await cut.close()
        async with asyncio.timeout(30):
            while (await ours.stats()).running_calls:
                await asyncio.sleep(0.02)
        assert (await ours.get(session)).num_tokens == again.kvservice["num_tokens"]

        raw = await client.completions.create(prompt="Once ", max_tokens=5, logprobs=2, **same)
        assert len(raw.choices[0].logprobs.tokens) == 5
        schema = {
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}},
            "required": ["a"],
            "additionalProperties": False,
        }
        held_to = await client.chat.completions.create(
            model=model.id,
            messages=turns,
            max_tokens=40,
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}},
        )
        assert held_to.choices[0].message.content in ('{"a": 1}', '{"a": 2}')
