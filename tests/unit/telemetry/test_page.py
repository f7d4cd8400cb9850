"""The page for operators: what it is sent with, and what it is fed."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message

import pytest

from kvservice.telemetry.endpoint import MetricsEndpoint
from kvservice.telemetry.page import AdminPage
from kvservice.v1 import admin_pb2, common_pb2


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def stats(window: int = 11) -> admin_pb2.GetStatsResponse:
    held = common_pb2.KvBytes(device_window=window, device_slots=3, host=70, redis=90)
    worker = admin_pb2.WorkerStats(
        worker_id="<b>w1", bytes=held, resident_sessions=7, parked_sessions=2, recall_lookups=100, recall_hits=90
    )
    worker.ledger.held_sessions = 9
    worker.tier.failures["timeout"] = 2
    tenant = admin_pb2.TenantStats(tenant="acme", requests=4, concurrent_calls=3)
    return admin_pb2.GetStatsResponse(
        workers=[worker], tenants=[tenant], running_calls=5, waiting_calls=1, version="1.2"
    )


@pytest.fixture
def endpoint() -> Iterator[MetricsEndpoint]:
    endpoint = MetricsEndpoint()
    yield endpoint
    endpoint.close()


def serve(endpoint: MetricsEndpoint, page: AdminPage) -> str:
    endpoint.show(page)
    return f"http://{endpoint.start('127.0.0.1', 0)}"


def get(url: str, **headers: str) -> tuple[bytes, Message]:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as response:
        return response.read(), response.headers


def test_the_page_is_one_file_that_asks_nobody_else(endpoint: MetricsEndpoint) -> None:
    url = serve(endpoint, AdminPage("gateway", stats))
    html, headers = get(f"{url}/")
    text = html.decode()
    policy = headers["Content-Security-Policy"]
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    addresses = set(re.findall(r"https?://[^\"'\s]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\sstyle=|\son\w+=", text)


def test_the_figures_are_those_of_the_stats(endpoint: MetricsEndpoint) -> None:
    clock = Clock()
    page = AdminPage("gateway", stats, interval_s=1000.0, clock=clock)
    page.look()
    clock.now += 5
    page.look()
    url = serve(endpoint, page)
    content, headers = get(f"{url}/page.json")
    assert headers["Content-Type"] == "application/json"
    assert headers["Cache-Control"] == "no-store"
    found = json.loads(content)
    (worker,) = found["workers"]
    assert (worker["window"], worker["parked"], worker["stored_sessions"], worker["redis_failures"]) == (11, 2, 9, 2)
    assert (found["running"], found["waiting"], found["process"], found["version"]) == (5, 1, "gateway", "1.2")
    (tenant,) = found["tenants"]
    assert (tenant["concurrent_calls"], tenant["tokens_per_minute"]) == (3, None)
    assert [sample["t"] for sample in found["history"]] == [1_000_000_000, 1_000_005_000]
    late = json.loads(get(f"{url}/page.json?since=1000000000")[0])
    assert [sample["t"] for sample in late["history"]] == [1_000_005_000]
    assert json.loads(get(f"{url}/page.json?since=x")[0])["history"] == found["history"]


def test_an_hour_is_kept_and_no_more() -> None:
    clock = Clock()
    page = AdminPage("worker", stats, interval_s=600.0, clock=clock)
    for _ in range(9):
        page.look()
        clock.now += 600
    assert len(json.loads(page.json(0))["history"]) == 6


def test_without_stats_there_is_a_page_all_the_same(endpoint: MetricsEndpoint) -> None:
    url = serve(endpoint, AdminPage("worker", lambda: None, interval_s=0.01))
    found = json.loads(get(f"{url}/page.json")[0])
    assert (found["workers"], found["history"]) == ([], [])


def test_a_look_that_fails_is_not_the_last(endpoint: MetricsEndpoint) -> None:
    asked: list[int] = []

    def read() -> admin_pb2.GetStatsResponse:
        asked.append(1)
        if len(asked) == 1:
            raise RuntimeError("once")
        return stats()

    page = AdminPage("worker", read, interval_s=0.01)
    url = serve(endpoint, page)
    while not json.loads(get(f"{url}/page.json")[0])["history"]:
        pass
    assert len(asked) > 1


@pytest.mark.parametrize(
    ("path", "host", "method", "status"),
    [
        ("/", "evil.example", "GET", 421),
        ("/page.json", "evil.example:80", "GET", 421),
        ("/metrics", "evil.example", "GET", 421),
        ("/page.json", "localhost:9", "GET", 200),
        ("/", "[::1]:9", "GET", 200),
        ("/nothing", "localhost", "GET", 404),
        ("/", "localhost", "POST", 405),
    ],
)
def test_only_this_machine_reads_and_nobody_writes(
    endpoint: MetricsEndpoint, path: str, host: str, method: str, status: int
) -> None:
    url = serve(endpoint, AdminPage("worker", stats))
    request = urllib.request.Request(url + path, headers={"Host": host}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            found = response.status
    except urllib.error.HTTPError as error:
        with error:
            found = error.code
    assert found == status
