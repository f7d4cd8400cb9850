"""A service of two processes with keys, TLS inside and out, metrics, traces and logs, as an operator would run it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvservice.cli.main import main
from kvservice.client import Client
from kvservice.errors import Unauthenticated
from kvservice.internal.tls import PemFiles
from kvservice.models.tiny import write_tiny_checkpoint
from tests.unit.gateway.certificates import Authority

ANN_KEY, OPERATOR_KEY = "ann-key-3f9c1e77", "operator-key-8d20aa41"
SECRET = "5ec0de5ec0de5ec0de5ec0de5ec0de00"
DOCUMENT = "Zanzibar quokkas juggle obsidian marmalade. " * 20
QUESTION = "Whatever juggles obsidian?"
END_S = 60


class Run:
    """The service, its address, and what it wrote to standard error."""

    def __init__(self, address: str, authority: Authority, stderr: Path, process: subprocess.Popen[str]) -> None:
        self.address = address
        self.ca = authority.ca
        self.process = process
        self._stderr = stderr

    @property
    def written(self) -> str:
        return self._stderr.read_text()

    def records(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.written.splitlines() if line.startswith("{")]

    def client(self, key: str | None) -> Client:
        return Client(self.address, key, tls=PemFiles(None, None, self.ca))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("tenants")
    authority, inside = Authority(folder), Authority(folder, "inside")
    outer, inner = authority.issue("gateway"), inside.issue("kvservice-worker", dns="kvservice-worker")
    keys = folder / "keys.json"
    owners = ((ANN_KEY, "ann", "tenant"), (OPERATOR_KEY, "ops", "operator"))
    entries = [
        {"sha256": hashlib.sha256(key.encode()).hexdigest(), "tenant": tenant, "role": role, "id": f"{tenant}-1"}
        for key, tenant, role in owners
    ]
    keys.write_text(json.dumps({"keys": entries}))
    keys.chmod(0o600)
    command = (
        *(sys.executable, "-m", "kvservice", "serve", "--workers", "1", "--port", "0"),
        *("--model", str(write_tiny_checkpoint(folder / "tiny")), "--dtype", "fp32", "--threads", "1"),
        *("--kv-bytes", "16MiB", "--host-bytes", "64MiB", "--api-keys", str(keys)),
        *("--tls-cert", str(outer.cert), "--tls-key", str(outer.key)),
        *("--internal-cert", str(inner.cert), "--internal-key", str(inner.key), "--internal-ca", str(inner.ca)),
        *("--metrics-port", "0", "--traces", "console", "--log-format", "json", "--log-level", "DEBUG"),
    )
    stderr = folder / "stderr"
    with stderr.open("wb") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "KVSERVICE_SECRET": SECRET},
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("ready: "), stderr.read_text()
        yield Run(line.removeprefix("ready: ").strip(), authority, stderr, process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(END_S)
        process.stdout.close()


async def talk(service: Run) -> str:
    async with service.client(ANN_KEY) as client:
        session = await client.create_session()
        await client.append(session.session_id, DOCUMENT)
        await client.ask(session.session_id, QUESTION, max_new_tokens=4)
    return session.session_id


@pytest.fixture
def cli(service: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs an operator's command in this process; gives what it printed."""
    monkeypatch.setenv("KVSERVICE_TLS_CA", str(service.ca))
    monkeypatch.setenv("KVSERVICE_API_KEY", OPERATOR_KEY)

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--address", service.address])
        captured = capsys.readouterr()
        assert ended.value.code == 0, captured.err
        return captured.out

    return run


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_metrics_commands_logs_and_traces_of_one_talk(service: Run, cli: Callable[..., str]) -> None:
    session_id = asyncio.run(talk(service))

    async def refused() -> None:
        async with service.client("no-key-of-ours-77") as client:
            with pytest.raises(Unauthenticated):
                await client.list_models()

    asyncio.run(refused())

    # Commands.
    cli("tenants", "set", "ann", "--requests-per-minute", "6000")
    assert re.search(r"ann .*6,000", cli("tenants", "list"))
    shown = cli("stats")
    assert "KV: window" in shown
    assert "recall hit rate" in shown
    assert re.search(r"ann .*6,000", shown)

    cli("tenants", "set", "ann", "--weight", "2", "--host-bytes", "1GiB", "--sessions", "7")
    shown = cli("tenants", "show", "ann")
    for row in ("weight .*2", "most sessions .*7", "most host bytes on each worker .*1.0 GiB"):
        assert re.search(row, shown)
    *records, last = (json.loads(line) for line in cli("usage", "--tenant", "ann").splitlines())
    assert [(each["kind"], each["session_id"]) for each in records] == [("call", session_id)] * 2
    assert all(each["prompt_tokens"] and each["device_byte_s"] for each in records)
    assert json.loads(cli("usage", "--after", last["cursor"])) == last

    # Metrics, of both processes.
    addresses = [str(record["address"]) for record in service.records() if record.get("event") == "metrics_started"]
    assert len(addresses) == 2
    texts = []
    for address in addresses:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as response:
            texts.append(response.read().decode())
    both = "\n".join(texts)
    assert 'kvservice_tokens_total{kind="prompt",tenant="ann"}' in both
    assert "kvservice_auth_failures_total 1.0" in both
    assert re.search(r'kvservice_worker_steps_total\{worker="worker-0"\} [1-9]', both)

    # What is left is written when they end.
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(END_S) == 0

    # Logs: whose, but never what.
    records = service.records()
    started = [record for record in records if "context" in record]
    audits = [record for record in records if record.get("event") == "operator_call"]
    assert [(record["by_key"], record["code"]) for record in audits] == [("ops-1", "OK")] * 8
    assert any(record.get("request") == {"tenant": "ann", "requests_per_minute": 6000.0} for record in audits)
    words = [*set(re.findall(r"\w{6,}", DOCUMENT + QUESTION)), ANN_KEY, OPERATOR_KEY, SECRET, "no-key-of-ours-77"]
    written = service.written
    assert [word for word in words if word in written] == []
    assert session_id in written

    # Traces: one tree through both processes.
    spans = {span["context"]["span_id"]: span for span in started}
    calls = [span for span in started if span["name"] == "worker.call"]
    assert len(calls) == 2
    for call in calls:
        parent = spans[call["parent_id"]]
        assert parent["name"] in ("kvservice.v1.SessionService/Append", "kvservice.v1.SessionService/Generate")
        assert parent["context"]["trace_id"] == call["context"]["trace_id"]
        services = {span["resource"]["attributes"]["service.name"] for span in (call, parent)}
        assert services == {"kvservice", "kvservice-worker"}
        below = {span["name"] for span in started if span["parent_id"] == call["context"]["span_id"]}
        assert "engine.prefill" in below
        assert call["attributes"]["session_id"] == session_id
