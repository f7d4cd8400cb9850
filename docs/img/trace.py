"""Prints one call's trace across processes: python docs/img/trace.py. Takes half a minute.

A program with OpenTelemetry of its own asks a question in a session whose worker has been drained: the gateway gives
the call to the other worker, which brings the session's KV back from Redis. The model is tiny, of random weights.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvservice.client import Client
from kvservice.models.tiny import write_tiny_checkpoint
from kvservice.telemetry.tracing import TRACING

DOCUMENT = "The quick brown fox jumps over the lazy dog. " * 30
END_S = 60.0
SHOWN = ("tokens.cached", "tokens.prompt", "tokens.completion", "tokens.recomputed", "tokens", "tier.bytes", "rpc.code")

Span = Mapping[str, Any]


async def main() -> None:
    """Starts a service of three processes, calls it, and prints the call's trace once they have ended."""
    with tempfile.TemporaryDirectory() as folder:
        spans = await trace(Path(folder))
    sys.stdout.write("\n".join(tree(spans)) + "\n")


async def trace(folder: Path) -> list[Span]:
    """Spans of one question, of all processes."""
    exporter = InMemorySpanExporter()
    TRACING.start("application", "", 1.0, exporter)
    stderr = folder / "stderr"
    with stderr.open("wb") as errors:
        service = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "kvservice", "serve", "--workers", "2", "--port", "0", "--threads", "1"),
            *("--model", str(write_tiny_checkpoint(folder / "tiny")), "--dtype", "fp32"),
            *("--kv-bytes", "16MiB", "--host-bytes", "64MiB", "--redis-bytes", "64MiB"),
            *("--traces", "console", "--log-format", "json"),
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
        )
    assert service.stdout is not None
    try:
        ready = (await service.stdout.readline()).decode()
        if not ready.startswith("ready: "):
            raise SystemExit(stderr.read_text())
        async with Client(ready.removeprefix("ready: ").strip()) as client:
            await question_after_a_drain(client)
    finally:
        service.terminate()
        await asyncio.wait_for(service.wait(), END_S)
        TRACING.stop()
    (asked,) = exporter.get_finished_spans()
    written = [json.loads(line) for line in stderr.read_text().splitlines() if line.startswith("{")]
    spans = [json.loads(asked.to_json()), *(record for record in written if "context" in record)]
    return [span for span in spans if span["context"]["trace_id"] == spans[0]["context"]["trace_id"]]


async def question_after_a_drain(client: Client) -> None:
    """Asks where nobody on a device holds the session."""
    session = (await client.create_session(recipe="recall")).session_id
    await client.append(session, DOCUMENT)
    await client.ask(session, "And then? ", max_new_tokens=8, ignore_eos=True)
    (holder,) = [worker.worker_id for worker in (await client.stats()).workers if worker.resident_sessions]
    await client.drain(holder)
    with TRACING.span("application"):
        await client.ask(session, "And after that? ", max_new_tokens=8, ignore_eos=True)


def tree(spans: Iterable[Span]) -> list[str]:
    """Spans below their parents: when each began and how long it took, and what it counted."""
    below: defaultdict[str | None, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: str(span["start_time"])):
        below[span["parent_id"]].append(span)
    began = _seconds(below[None][0]["start_time"])
    lines = []

    def add(span: Span, depth: int) -> None:
        start, end = _seconds(span["start_time"]) - began, _seconds(span["end_time"]) - began
        counted = " ".join(f"{name}={span['attributes'][name]}" for name in SHOWN if name in span["attributes"])
        process = span["resource"]["attributes"]["service.name"]
        name = "  " * depth + span["name"]
        lines.append(
            f"{name:<42} {process:<17} {start * 1e3:7.1f} ms {(end - start) * 1e3:7.1f} ms  {counted}".rstrip()
        )
        for child in below[span["context"]["span_id"]]:
            add(child, depth + 1)

    for root in below[None]:
        add(root, 0)
    return lines


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


if __name__ == "__main__":
    asyncio.run(main())
