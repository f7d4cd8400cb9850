"""The services as processes: real gateway, workers and redis-servers around a tiny model."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from kvservice.client import Client, Tokens
from kvservice.errors import KVServiceError, Unavailable
from kvservice.models.tiny import write_tiny_checkpoint

READY_S = 60
END_S = 30
DOCUMENT = "The quick brown fox jumps over the lazy dog. " * 20


class Process:
    """`kvservice` with arguments, as a child that is ended with the test."""

    def __init__(self, errors: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self._errors = errors
        with errors.open("wb") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "kvservice", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **(env or {})},
            )

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def ready(self) -> str:
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line.startswith("ready: "), self.errors
        return line.removeprefix("ready: ").strip()

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.popen.pid).children(recursive=True)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(END_S)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def run(*arguments: str, env: dict[str, str] | None = None) -> Process:
        started.append(Process(tmp_path / f"stderr-{len(started)}", *arguments, env=env))
        return started[-1]

    yield run
    for process in started:
        if process.popen.poll() is None:
            leftover = process.children()
            process.popen.kill()
            for child in leftover:
                child.kill()
        process.popen.wait(END_S)
        process.popen.stdout.close()


@pytest.fixture(scope="module")
def service(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service with one worker inside."""
    process = Process(tmp_path_factory.mktemp("service") / "stderr", *serve_arguments(model))
    try:
        yield process.ready()
    finally:
        process.end()
        process.popen.stdout.close()


def serve_arguments(model: str, *more: str) -> tuple[str, ...]:
    return ("serve", "--model", model, "--dtype", "fp32", "--port", "0", "--kv-bytes", "16MiB", *more)


@pytest.fixture
def document(tmp_path: Path) -> str:
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT)
    return str(path)


def wait_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=END_S)
    assert [process.cmdline() for process in alive] == []


def ask(address: str, **sampling) -> str:
    async def run() -> str:
        async with Client(address) as client:
            session = await client.create_session()
            await client.append(session.session_id, DOCUMENT)
            return (await client.ask(session.session_id, "What jumps?", **sampling)).text

    return asyncio.run(run())


def test_chat_streams_answers_about_a_document(kvservice, service: str, document: str) -> None:
    ran = kvservice(
        *("chat", "--address", service, "--document", document, "--recipe", "exact", "--max-new-tokens", "5"),
        *("--question", "What jumps?", "--question", "Over what?"),
    )
    assert ran.code == 0
    assert "> What jumps?" in ran.out
    assert "> Over what?" in ran.out
    assert "900 tokens read" in ran.err
    assert ran.err.count("first after") == 2


def test_chat_holds_answers_to_a_grammar(kvservice, service: str, document: str, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["fox", "dog"]}')
    arguments = ("chat", "--address", service, "--document", document, "--question", "What jumps?")
    ran = kvservice(*arguments, "--json-schema", str(schema), "--temperature", "1.5", "--seed", "3")
    assert ran.out.splitlines()[-1] in ('"fox"', '"dog"')
    assert kvservice(*arguments, "--regex", "[0-9]{4}").out.splitlines()[-1].isdecimal()
    wrong = kvservice(*arguments, "--regex", "(")
    assert wrong.code == 1
    assert "unclosed group" in wrong.err
    schema.write_text("{")
    assert "it isn't JSON" in kvservice(*arguments, "--json-schema", str(schema)).err


def test_chat_starts_a_service_of_its_own_and_takes_questions_until_the_input_ends(
    kvservice, model: str, document: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What jumps?\n\nOver what?\n"))
    before = set(psutil.Process().children(recursive=True))
    ran = kvservice("chat", "--document", document, "--model", model, "--kv-bytes", "16MiB", "--max-new-tokens", "3")
    assert ran.code == 0
    assert "starting a service" in ran.err
    assert ran.err.count("first after") == 2
    assert set(psutil.Process().children(recursive=True)) <= before


def test_chat_leaves_no_session_behind(kvservice, service: str, document: str) -> None:
    arguments = ("chat", "--address", service, "--document", document, "--question", "Hm?", "--max-new-tokens", "1")
    assert kvservice(*arguments).code == 0
    listed = kvservice("sessions", "list", "--address", service)
    assert "0 sessions" in listed.out


def test_sessions_are_listed_shown_and_closed(kvservice, service: str) -> None:
    async def create() -> str:
        async with Client(service) as client:
            session = await client.create_session(recipe="exact")
            await client.append(session.session_id, DOCUMENT)
            return session.session_id

    session_id = asyncio.run(create())
    assert session_id in kvservice("sessions", "list", "--address", service).out
    shown = kvservice("sessions", "show", session_id, "--address", service)
    assert "exact" in shown.out
    assert "900" in shown.out
    closed = kvservice("sessions", "close", session_id, "--address", service)
    assert closed.code == 0
    assert "freed" in closed.out
    again = kvservice("sessions", "show", session_id, "--address", service)
    assert again.code == 1
    assert session_id in again.err


def test_stats_show_each_workers_bytes_by_owner(kvservice, service: str) -> None:
    ran = kvservice("stats", "--address", service)
    assert ran.code == 0
    assert "serving" in ran.out
    assert all(owner in ran.out for owner in ("KV: window", "KV: index", "KV: recall slots", "host", "Redis"))


def test_a_service_that_is_not_there_is_a_failure_with_its_address(kvservice) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    ran = kvservice("stats", "--address", address)
    assert ran.code == 1
    assert address in ran.err


@pytest.mark.parametrize(("content", "says"), [(b"", "empty"), (b" \n", "empty"), (b"caf\xe9", "UTF-8")])
def test_a_document_that_is_no_text_is_refused(kvservice, service: str, tmp_path: Path, content: bytes, says) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    ran = kvservice("chat", "--address", service, "--document", str(path), "--question", "Hm?")
    assert ran.code in (1, 2)
    assert says in ran.err


def test_a_busy_port_ends_the_start_with_its_number(kvservice, service: str, model: str) -> None:
    port = service.rpartition(":")[2]
    ran = kvservice("serve", "--model", model, "--dtype", "fp32", "--port", port)
    assert ran.code == 2
    assert port in ran.err


@pytest.mark.parametrize("role", ["--redis-url", "--state-url"])
def test_a_redis_that_was_demanded_and_is_not_there_fails_the_start(kvservice, model: str, role: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"redis://:hunter2@127.0.0.1:{free.getsockname()[1]}/0"
    ran = kvservice(*serve_arguments(model, role, url))
    assert ran.code == 1
    assert "can't be reached" in ran.err
    assert "hunter2" not in ran.err


def test_a_budget_that_holds_no_workspace_says_how_much_it_takes(kvservice, model: str) -> None:
    ran = kvservice("serve", "--model", model, "--dtype", "fp32", "--port", "0", "--kv-bytes", "100KiB")
    assert ran.code == 2
    assert "the prefill workspace alone takes" in ran.err


def test_other_addresses_than_loopback_need_api_keys(kvservice, model: str) -> None:
    ran = kvservice(*serve_arguments(model, "--host", "0.0.0.0"))
    assert ran.code == 2
    assert "API" in ran.err


def test_a_signal_lets_a_running_answer_end_and_leaves_no_process(start, model: str) -> None:
    process = start(*serve_arguments(model))
    address = process.ready()
    children = process.children()
    assert {child.name() for child in children} == {"redis-server"}
    assert len(children) == 2

    async def answer_over_a_drain() -> int:
        num_tokens = 0
        async with Client(address) as client:
            session = await client.create_session()
            await client.append(session.session_id, DOCUMENT)
            events = client.generate(session.session_id, "And?", max_new_tokens=40, ignore_eos=True)
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Tokens):
                        if num_tokens == 0:
                            process.popen.send_signal(signal.SIGTERM)
                        num_tokens += len(event.token_ids)
        return num_tokens

    assert asyncio.run(answer_over_a_drain()) == 40
    assert process.popen.wait(END_S) == 0
    wait_gone(children)


def test_a_second_signal_ends_at_once(start, model: str) -> None:
    process = start(*serve_arguments(model))
    address = process.ready()
    children = process.children()

    async def interrupted() -> None:
        async with Client(address) as client:
            session = await client.create_session()
            await client.append(session.session_id, DOCUMENT)
            async for event in client.generate(session.session_id, "And?", max_new_tokens=1000, ignore_eos=True):
                if isinstance(event, Tokens):
                    process.popen.send_signal(signal.SIGINT)

    with pytest.raises(KVServiceError):
        asyncio.run(interrupted())
    assert process.popen.wait(END_S) == 1
    wait_gone(children)


def test_worker_processes_serve_and_one_that_dies_is_reported(start, model: str) -> None:
    process = start(*serve_arguments(model, "--workers", "2"))
    address = process.ready()
    children = process.children()
    workers = [child for child in children if "kvservice" in child.cmdline()]
    assert len(workers) == 2
    assert all("redis://" not in " ".join(child.cmdline()) for child in workers)
    assert ask(address, max_new_tokens=3) is not None
    workers[0].kill()
    wait_gone(workers[:1])
    assert ask(address, max_new_tokens=3) is not None
    workers[1].kill()
    assert process.popen.wait(END_S) == 1
    assert process.errors.count('"worker_ended"') == 2
    assert '"no_worker_left"' in process.errors
    wait_gone(children)


def test_nothing_outlives_a_service_that_is_killed(start, model: str) -> None:
    process = start(*serve_arguments(model, "--workers", "1"))
    process.ready()
    children = process.children()
    process.popen.kill()
    wait_gone(children)


def test_a_worker_that_cannot_start_ends_the_service_with_its_exit_code(start, tmp_path: Path) -> None:
    process = start(*serve_arguments(str(tmp_path / "nowhere"), "--workers", "1"))
    assert process.popen.wait(READY_S) == 2
    assert "neither a folder nor a known model" in process.errors


def test_sessions_outlive_a_service_with_a_data_dir(start, model: str, tmp_path: Path) -> None:
    arguments = serve_arguments(model, "--data-dir", str(tmp_path / "data"))

    async def create(address: str) -> str:
        async with Client(address) as client:
            session = await client.create_session()
            await client.append(session.session_id, DOCUMENT)
            return session.session_id

    async def tokens_of(address: str, session_id: str) -> int:
        async with Client(address) as client:
            return (await client.get(session_id)).num_tokens

    first = start(*arguments)
    session_id = asyncio.run(create(first.ready()))
    first.end()
    second = start(*arguments)
    assert asyncio.run(tokens_of(second.ready(), session_id)) == len(DOCUMENT)
    secret = tmp_path / "data" / "secret"
    assert secret.stat().st_mode & 0o077 == 0


def test_gateway_and_worker_run_apart_and_the_gateway_without_torch(
    start, model: str, state_url: str, kv_url: str
) -> None:
    env = {"KVSERVICE_STATE_URL": state_url, "KVSERVICE_REDIS_URL": kv_url, "KVSERVICE_SECRET": "0123456789abcdef"}
    gateway = start("gateway", "--port", "0", env=env)
    address = gateway.ready()
    with pytest.raises(Unavailable):
        ask(address)
    worker = start("worker", "--model", model, "--dtype", "fp32", "--kv-bytes", "16MiB", env=env)
    worker.ready()
    assert ask(address, max_new_tokens=3) is not None
    loaded = {Path(mapped.path).name for mapped in psutil.Process(gateway.popen.pid).memory_maps()}
    assert not [name for name in loaded if name.startswith("libtorch")]
    assert worker.end() == 0
    assert gateway.end() == 0


def test_a_settings_file_starts_a_service_as_flags_do(start, model: str, tmp_path: Path) -> None:
    settings = {
        "gateway": {"port": 0},
        "worker": {"model": model, "dtype": "fp32", "kv_bytes": "16MiB", "recipe": "dense"},
    }
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    address = start("serve", "--config", str(path)).ready()

    async def recipe() -> str:
        async with Client(address) as client:
            return (await client.create_session()).recipe

    assert asyncio.run(recipe()) == "dense"
