"""What the chart renders, run here: Ray Serve deploys the rendered application, a gateway reads the rendered
configuration, with the certificates and keys that the chart makes. Only paths and ports are others."""

from __future__ import annotations

import base64
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from kvservice.models.tiny import write_tiny_checkpoint
from kvservice.store.embedded import EmbeddedRedis, RedisRole
from tests.deploy.chart import BIN, CHART, Manifest, helm, template
from tests.deploy.test_chart_monitoring import SERIES, expressions

PATIENCE_S = 300.0
VALUES = """
models:
  - deployment:
      name: tiny
      num_cpus: 0.5
      health_check_period_s: 1
      worker: {model: /models/tiny, kv_bytes: 48MiB, host_bytes: 64MiB, dtype: fp32, drain_grace_s: 5}
    source: {type: volume, claimName: models}
"""
PORTS = ("api", "internal", "health", "gateway_metrics", "worker_metrics", "gcs", "dashboard", "agent", "client")
RENDERED_PORTS = {"api": 50051, "internal": 50052, "health": 50053}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass
class Service:
    """The running parts."""

    folder: Path
    ray_folder: Path
    ports: dict[str, int]
    redis_ports: dict[str, int]
    environment: dict[str, str]
    gateway: psutil.Process
    ray: psutil.Process
    operator_key: str
    made: list[Manifest]

    @property
    def address(self) -> str:
        return f"localhost:{self.ports['api']}"

    def worker(self) -> psutil.Process:
        """The replica's process."""
        for process in self.ray.children(recursive=True):
            if self.ports["internal"] in listening(process):
                return process
        raise AssertionError("no replica listens")

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
            cwd=self.folder,
            env={**self.environment, "KVSERVICE_API_KEY": self.operator_key, **environment},
        )


def listening(process: psutil.Process) -> set[int]:
    return {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def connected_to(process: psutil.Process) -> set[int]:
    """Ports of others that the process has gone to: not those that others have come to it by."""
    own = listening(process)
    return {
        c.raddr.port
        for c in process.net_connections("tcp")
        if c.status == psutil.CONN_ESTABLISHED and c.laddr.port not in own
    }


def free_ports() -> dict[str, int]:
    sockets = [socket.socket() for _ in PORTS]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = dict(zip(PORTS, (each.getsockname()[1] for each in sockets), strict=True))
    for each in sockets:
        each.close()
    return ports


def unpacked(made: list[Manifest], folder: Path) -> str:
    """What Secrets are mounted, as files; and the operator's key."""
    data = {each["metadata"]["name"]: each["data"] for each in made if each["kind"] == "Secret"}
    tls = data["kv-kvservice-internal-tls"]
    for side in ("gateway", "worker"):
        mount = folder / side / "internal-tls"
        mount.mkdir(parents=True)
        for name, key in (("ca.crt", "ca.crt"), ("tls.crt", f"{side}.crt"), ("tls.key", f"{side}.key")):
            (mount / name).write_bytes(base64.b64decode(tls[key]))
    keys = folder / "gateway" / "keys"
    keys.mkdir()
    (keys / "api-keys.json").write_bytes(base64.b64decode(data["kv-kvservice-api-keys"]["api-keys.json"]))
    (keys / "api-keys.json").chmod(0o440)
    return base64.b64decode(data["kv-kvservice-api-keys"]["operator-key"]).decode()


def moved(text: str, side: Path, models: Path, ports: dict[str, int], metrics: int) -> str:
    """Rendered text with the paths and ports of this machine."""
    text = text.replace("/etc/kvservice", str(side)).replace("/models", str(models)).replace("0.0.0.0", "127.0.0.1")
    for name, port in RENDERED_PORTS.items():
        text = re.sub(rf"\b{port}\b", str(ports[name]), text)
    return re.sub(r"\b9464\b", str(metrics), text)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("chart")
    values = folder / "values.yaml"
    values.write_text(VALUES)
    made = template("--values", str(values))
    ports = free_ports()
    models = folder / "models"
    models.mkdir()
    write_tiny_checkpoint(models / "tiny")
    operator_key = unpacked(made, folder)
    (config,) = (
        each["data"]["config.json"]
        for each in made
        if (each["kind"], each["metadata"]["name"]) == ("ConfigMap", "kv-kvservice")
    )
    (ray_service,) = (each for each in made if each["kind"] == "RayService")
    with ExitStack() as stack:
        state = stack.enter_context(EmbeddedRedis(RedisRole.STATE, data_dir=folder / "state"))
        kv = stack.enter_context(EmbeddedRedis(RedisRole.KV, maxmemory_bytes=64 << 20))
        for side in ("gateway", "worker"):
            text = moved(config, folder / side, models, ports, ports[f"{side}_metrics"])
            (folder / side / "config.json").write_text(text)
        serve = folder / "serve.yaml"
        serve.write_text(
            moved(ray_service["spec"]["serveConfigV2"], folder / "worker", models, ports, ports["worker_metrics"])
        )
        environment = {
            **os.environ,
            "KVSERVICE_STATE_URL": state.url,
            "KVSERVICE_REDIS_URL": kv.url,
            "KVSERVICE_WORKER_HOST": "127.0.0.1",
            "KVSERVICE_CONFIG": str(folder / "worker" / "config.json"),
            "KVSERVICE_SECRET": "s" * 32,
            "RAY_USAGE_STATS_ENABLED": "0",
            # As KubeRay sets them for `authOptions`.
            "RAY_AUTH_MODE": ray_service["spec"]["rayClusterConfig"]["authOptions"]["mode"],
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        # Sockets lie in it, whose names may not be long.
        ray_folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        stack.callback(shutil.rmtree, ray_folder, ignore_errors=True)
        ray = _start_ray(stack, ray_folder, ray_service, environment, ports)
        deployed = subprocess.run(
            [str(BIN / "serve"), "deploy", str(serve), "--address", f"http://127.0.0.1:{ports['dashboard']}"],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert deployed.returncode == 0, deployed.stderr
        gateway = _start_gateway(stack, folder, environment)
        redis_ports = {"state": int(state.url.split(":")[3][:-2]), "kv": int(kv.url.split(":")[3][:-2])}
        running = Service(folder, ray_folder, ports, redis_ports, environment, gateway, ray, operator_key, made)
        _wait_for_a_worker(running)
        yield running


def _start_ray(
    stack: ExitStack, folder: Path, service: Manifest, environment: dict[str, str], ports: dict[str, int]
) -> psutil.Process:
    """A node that is head and worker in one, started as KubeRay starts both: by `ray start --block`."""
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    # In KubeRay's words quoted for a shell.
    (resources,) = shlex.split(group["rayStartParams"]["resources"])
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--temp-dir", str(folder), "--node-ip-address", "127.0.0.1"),
        *("--port", str(ports["gcs"]), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(ports["dashboard"])),
        *("--dashboard-agent-listen-port", str(ports["agent"]), "--num-cpus", group["rayStartParams"]["num-cpus"]),
        *("--resources", resources, "--object-store-memory", group["rayStartParams"]["object-store-memory"]),
        *("--ray-client-server-port", str(ports["client"]), "--disable-usage-stats"),
    ]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    stack.callback(_end, process)
    _until(lambda: _status(f"http://127.0.0.1:{ports['dashboard']}/api/gcs_healthz") == 200, process)
    return psutil.Process(process.pid)


def _start_gateway(stack: ExitStack, folder: Path, environment: dict[str, str]) -> psutil.Process:
    errors = (folder / "gateway.log").open("wb")
    stack.callback(errors.close)
    process = subprocess.Popen(
        [sys.executable, "-m", "kvservice", "gateway", "--config", str(folder / "gateway" / "config.json")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    stack.callback(_end, process)
    assert process.stdout is not None
    stack.callback(process.stdout.close)
    assert process.stdout.readline().startswith("ready: "), (folder / "gateway.log").read_text()
    return psutil.Process(process.pid)


def _end(process: subprocess.Popen) -> None:
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    for each in alive:
        each.kill()


def _wait_for_a_worker(service: Service) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while "workers" not in service.run(sys.executable, "-c", ASK_HEALTH, str(service.ports["health"])).stdout:
        if time.monotonic() > deadline:
            logs = service.ray_folder.glob("session_latest/logs/serve/*.log")
            raise AssertionError("no worker: " + "".join(log.read_text()[-3000:] for log in logs))
        time.sleep(0.5)


ASK_HEALTH = """
import sys
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
with grpc.insecure_channel(f"127.0.0.1:{sys.argv[1]}") as channel:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
print("workers" if answer.status == 1 else "none")
"""


def _until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, "it ended"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.5)


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_the_check_of_helm_test_passes(service: Service) -> None:
    ran = service.run(sys.executable, str(CHART / "files" / "check.py"), service.address)
    assert (ran.returncode, ran.stdout) == (0, "tiny: 8 tokens\n"), ran.stderr


def test_probes_of_rays_pods_are_answered_without_a_token_and_nothing_else_is(service: Service) -> None:
    agent, dashboard = service.ports["agent"], service.ports["dashboard"]
    assert _status(f"http://127.0.0.1:{dashboard}/api/serve/applications/") == 401
    assert _status(f"http://127.0.0.1:{agent}/api/local_raylet_healthz") == 200
    assert _status(f"http://127.0.0.1:{dashboard}/api/gcs_healthz") == 200


def test_processes_listen_on_the_ports_that_are_let_in_and_go_where_they_may(service: Service) -> None:
    ports = service.ports
    assert listening(service.gateway) == {ports["api"], ports["health"], ports["gateway_metrics"]}
    assert connected_to(service.gateway) == {ports["internal"], service.redis_ports["state"]}
    worker = service.worker()
    assert {ports["internal"], ports["worker_metrics"]} <= listening(worker)
    assert not {ports["api"], ports["health"]} & listening(worker)
    goes_to = connected_to(worker)
    assert set(service.redis_ports.values()) <= goes_to
    # The rest are Ray's own processes.
    rays = {port for each in (service.ray, *service.ray.children(recursive=True)) for port in listening(each)}
    assert goes_to - set(service.redis_ports.values()) <= rays


def test_what_dashboards_and_alerts_ask_for_is_in_a_scrape(service: Service) -> None:
    families: set[str] = set()
    for name in ("gateway_metrics", "worker_metrics"):
        with urllib.request.urlopen(f"http://127.0.0.1:{service.ports[name]}/metrics", timeout=30) as response:
            found = re.findall(r"^# TYPE (\S+) (\S+)$", response.read().decode(), flags=re.MULTILINE)
        families |= {
            f"{family}{suffix}"
            for family, kind in found
            for suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
        }
    asked = {name for each in expressions() for name in re.findall(r"\b(kvservice_[a-z_]+)\{", each)}
    assert asked <= families
    assert set(SERIES) - families == set()


def test_the_commands_of_the_notes_that_need_no_cluster_run(service: Service) -> None:
    values = str(service.folder / "values.yaml")
    shown = helm("install", "kv", str(CHART), "--dry-run=client", "--namespace", "kvservice", "--values", values)
    _, _, notes = shown.stdout.partition("NOTES:")
    commands = [line.strip() for line in notes.splitlines() if line.strip().startswith("kvservice ")]
    assert len(commands) == 2
    # The document is whatever lies where they are typed.
    (service.folder / "README.md").write_text("kvservice answers questions about long documents. " * 10)
    for command in commands:
        words = shlex.split(command.replace("localhost:50051", service.address))
        ran = service.run(sys.executable, "-m", *words)
        assert ran.returncode == 0, ran.stderr


def test_a_key_that_is_none_is_refused(service: Service) -> None:
    ran = service.run(sys.executable, "-m", "kvservice", "stats", "--address", service.address, KVSERVICE_API_KEY="no")
    assert ran.returncode == 1


def test_the_hook_before_a_pods_end_drains_its_worker(service: Service) -> None:
    ran = service.run(sys.executable, "-m", "kvservice", "drain-worker")
    assert (ran.returncode, "has drained" in ran.stderr) == (0, True), ran.stderr
    # Ray Serve finds a replica that answers no more, and starts another: a new worker.
    _wait_for_a_worker(service)
