from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvservice.errors import ConfigError
from kvservice.telemetry.endpoint import MetricsEndpoint
from kvservice.telemetry.logging import JsonFormatter, bind_log_fields, configure_logging
from kvservice.telemetry.metrics import (
    ALL_METRICS,
    GatewayCollector,
    GatewayLevels,
    GatewayMetrics,
    Kind,
    WorkerCollector,
    metrics_table,
)
from kvservice.telemetry.tracing import Tracing
from kvservice.types import Headroom, TierStats, Usage, WorkerStats

LEVELS = GatewayLevels(3, 1, 2, False, 0, 4)
STATS = WorkerStats(
    headroom=Headroom(device_free_bytes=5, resident_sessions=7),
    window_bytes=11,
    recall_lookups=100,
    recall_hits=90,
    steps=12,
    tier=TierStats(connected=True, written_bytes=13, failures={"timeout": 2}),
)


@pytest.fixture
def endpoint() -> Iterator[MetricsEndpoint]:
    metrics = GatewayMetrics()
    metrics.note_rpc("/x/Get", "OK", 0.02)
    metrics.note_call("acme", Usage(prompt_tokens=5, completion_tokens=2), queue_ms=3.0, ttft_ms=40.0)
    metrics.note_quota_refusal("acme", "concurrent_calls")
    metrics.note_auth_failure()
    endpoint = MetricsEndpoint(metrics.registry)
    endpoint.add(GatewayCollector(lambda: LEVELS))
    endpoint.add(WorkerCollector("w1", lambda: STATS))
    yield endpoint
    endpoint.close()


def read(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        return response.read().decode()


def test_every_metric_that_is_declared_is_served(endpoint: MetricsEndpoint) -> None:
    text = read(endpoint.start("127.0.0.1", 0))
    for spec in ALL_METRICS:
        name = f"{spec.name}_total" if spec.kind is Kind.COUNTER else spec.name
        assert f"# HELP {name} {spec.help}" in text
        if spec.unit in ("bytes", "seconds"):
            assert spec.name.endswith(spec.unit)
    for line in (
        'kvservice_rpcs_total{code="OK",method="/x/Get"} 1.0',
        'kvservice_tokens_total{kind="prompt",tenant="acme"} 5.0',
        "kvservice_running_calls 3.0",
        'kvservice_worker_device_bytes{owner="window",worker="w1"} 11.0',
        'kvservice_worker_recall_hits_total{worker="w1"} 90.0',
        'kvservice_tier_failures_total{reason="timeout",worker="w1"} 2.0',
    ):
        assert line in text


def test_a_worker_that_has_stopped_shows_nothing_and_hides_nobody() -> None:
    endpoint = MetricsEndpoint()
    endpoint.add(WorkerCollector("w1", lambda: None))
    endpoint.add(GatewayCollector(lambda: LEVELS))
    try:
        text = read(endpoint.start("127.0.0.1", 0))
    finally:
        endpoint.close()
    assert "kvservice_worker" not in text
    assert "kvservice_waiting_calls 1.0" in text


def test_a_port_that_is_taken_is_an_error_with_a_name(endpoint: MetricsEndpoint) -> None:
    port = int(endpoint.start("127.0.0.1", 0).split(":")[1])
    with pytest.raises(ConfigError, match=f"metrics_port={port}"):
        MetricsEndpoint().start("127.0.0.1", port)


def test_the_documentation_has_every_metric() -> None:
    assert metrics_table() in (Path(__file__).parents[3] / "docs" / "telemetry.md").read_text()


def test_what_was_bound_is_in_each_record_of_the_task_and_of_those_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    root = logging.getLogger()
    before = root.handlers[:]
    logger = logging.getLogger("kvservice.tests")
    try:
        configure_logging("INFO", json=True)

        async def call(tenant: str) -> None:
            bind_log_fields(tenant=tenant)
            logger.info("one")
            await asyncio.create_task(later())

        async def later() -> None:
            bind_log_fields(session_id="s")
            logger.info("two")

        async def main() -> None:
            await asyncio.gather(call("a"), call("b"))
            logger.info("three")

        asyncio.run(main())
    finally:
        for handler in root.handlers[:]:
            if isinstance(handler.formatter, JsonFormatter) and handler not in before:
                root.removeHandler(handler)
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    found = sorted((line["event"], line.get("tenant", ""), line.get("session_id", "")) for line in lines)
    assert found == [("one", "a", ""), ("one", "b", ""), ("three", "", ""), ("two", "a", "s"), ("two", "b", "s")]


def test_spans_go_on_across_processes_and_errors_are_named_not_quoted() -> None:
    near, far, here, there = Tracing(), Tracing(), InMemorySpanExporter(), InMemorySpanExporter()
    near.start("near", "", 1.0, here)
    far.start("far", "", 1.0, there)

    def fail() -> None:
        with near.span("call", rpc="x"):
            span = far.begin("work", near.traceparent(), worker="w")
            assert span is not None
            span.phase("prefill", 1_000, 2_000)
            with far.within(span.traceparent), far.span("fetch"):
                pass
            span.end({"tokens": 3})
            raise ValueError("a secret")

    with pytest.raises(ValueError, match="a secret"):
        fail()
    near.stop()
    far.stop()
    spans = {span.name: span for span in (*here.get_finished_spans(), *there.get_finished_spans())}
    assert set(spans) == {"call", "work", "prefill", "fetch"}
    assert len({span.context.trace_id for span in spans.values()}) == 1
    assert spans["work"].parent.span_id == spans["call"].context.span_id
    assert spans["prefill"].parent.span_id == spans["work"].context.span_id
    assert spans["fetch"].parent.span_id == spans["work"].context.span_id
    assert spans["work"].attributes == {"worker": "w", "tokens": 3}
    assert spans["call"].status.description == "ValueError"
    assert "secret" not in "".join(span.to_json() for span in spans.values())


def test_no_more_than_the_wanted_part_is_traced_whatever_a_caller_asks_for() -> None:
    tracing, exported = Tracing(), InMemorySpanExporter()
    tracing.start("x", "", 0.01, exported)
    for number in range(200):
        # As a client may: a trace of its own, marked as sampled.
        trace_id = (number * 0x9E3779B97F4A7C15F39CC0605CEDC835) % 2**128
        with tracing.span("call", f"00-{trace_id:032x}-00000000000000{number % 255 + 1:02x}-01"):
            pass
    tracing.stop()
    assert len(exported.get_finished_spans()) < 20


def test_without_tracing_we_load_nothing_and_make_nothing() -> None:
    tracing = Tracing()
    with tracing.span("call", "00-" + "1" * 32 + "-" + "2" * 16 + "-01") as note:
        note({"a": 1})
        assert tracing.traceparent() == ""
        assert tracing.begin("work", "") is None
    assert not tracing.is_on
    # In a process of its own: this one has loaded it for the tests above.
    code = (
        "import sys, kvservice.telemetry.tracing; print([name for name in sys.modules if name.startswith('opentel')])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
